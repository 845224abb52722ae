"""Affinities against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from segkit.pretraining.affinity import (
    Affinities,
    MessagePassing,
    edge_affinity,
    global_affinity,
    local_affinity,
    nearest_neighbours,
)


def test_neighbours_are_the_nearest_by_cosine_and_never_the_node_itself() -> None:
    angles = torch.tensor([0.0, 10.0, 25.0, 90.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=1)[None] * torch.tensor([[1.0], [5.0], [2.0], [3.0]])
    assert nearest_neighbours(features, 2).tolist() == [[[1, 2], [0, 2], [1, 0], [2, 1]]]
    assert nearest_neighbours(features, 9).shape == (1, 4, 3)


def test_a_message_is_the_mean_with_both_degrees() -> None:
    # Node 0 - node 1 - node 2, named from one side only: degrees with the self-loop are 2, 3, 2.
    passing = MessagePassing(1, 1, residual=False)
    torch.nn.init.ones_(passing.layers[0].weight)  # type: ignore[arg-type]
    out = passing(torch.tensor([[[1.0], [2.0], [4.0]]]), torch.tensor([[[1], [2], [1]]]))
    root = math.sqrt(6)
    heard = [1 / 2 + 2 / root, 1 / root + 2 / 3 + 4 / root, 2 / root + 4 / 2]
    assert out.flatten().tolist() == pytest.approx(heard)
    passing.residual = True
    out = passing(torch.tensor([[[1.0], [2.0], [4.0]]]), torch.tensor([[[1], [2], [1]]]))
    assert out.flatten().tolist() == pytest.approx([1 + heard[0], 2 + heard[1], 4 + heard[2]])


def test_two_layers_bend_between_them_only() -> None:
    passing = MessagePassing(1, 2, residual=False)
    torch.nn.init.constant_(passing.layers[0].weight, -1.0)  # type: ignore[arg-type]
    torch.nn.init.constant_(passing.layers[1].weight, -1.0)  # type: ignore[arg-type]
    alone = torch.zeros(1, 2, 0, dtype=torch.int64)  # no edges: each node keeps its own
    assert passing(torch.tensor([[[3.0], [-3.0]]]), alone).flatten().tolist() == [0.0, -3.0]
    assert MessagePassing(1, 0)(torch.tensor([[[3.0]]]), alone[:, :1]).item() == 3.0


def test_global_affinity_is_the_cosine() -> None:
    first = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    second = torch.tensor([[[1.0, 1.0], [-3.0, 0.0]]])
    half = math.sqrt(0.5)
    assert torch.allclose(global_affinity(first, second), torch.tensor([[[half, -1.0], [half, 0.0]]]))


def test_edges_agree_where_nodes_differ_in_the_same_direction() -> None:
    first = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    second = torch.tensor([[[5.0, 5.0], [5.0, 7.0]]])
    one = torch.tensor([[[1], [0]]])
    cosines = edge_affinity(first, second, one, one)
    assert cosines.shape == (1, 2, 1, 2, 1)
    assert torch.allclose(cosines, torch.zeros_like(cosines), atol=1e-7)  # (1, 0) or (-1, 0) with (0, 2) or (0, -2)
    same = edge_affinity(first, first * 3, one, one)[0, :, 0, :, 0]
    assert torch.allclose(same, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))


def maps(*cells: list[list[float]]) -> torch.Tensor:
    return torch.tensor([list(cells)])  # one graph


def test_local_affinity_matches_by_place_and_by_feature() -> None:
    # One image of two cells in each view; features differ in length, places are swapped.
    first = maps([[1.0, 0.0], [0.0, 1.0]])
    second = maps([[1.0, 0.0], [0.0, 1.0]])
    places = torch.tensor([[[[0.0], [10.0]]]])
    swapped = torch.tensor([[[[9.0], [2.0]]]])
    # By place cell 0 meets cell 1 (2 mm) and cell 1 meets cell 0 (1 mm): cosine 0. By feature each meets itself: 1.
    assert local_affinity(first, second, places, swapped, 2).item() == pytest.approx(0.5)
    assert local_affinity(first, second, places, places, 2).item() == pytest.approx(1.0)


def test_only_the_best_matches_count() -> None:
    first = maps([[1.0, 0.0], [0.0, 1.0]])
    second = maps([[1.0, 0.0], [0.0, -1.0]])
    places, far = torch.tensor([[[[0.0], [10.0]]]]), torch.tensor([[[[0.0], [13.0]]]])
    # By place: cell 0 at 0 mm (cosine 1), cell 1 at 3 mm (cosine -1). By feature: cell 0 with itself (1), cell 1 with
    # cell 0 (distance 1.41, cosine 0) rather than with its opposite.
    assert local_affinity(first, second, places, far, 1, both_ways=False).item() == pytest.approx(1.0)
    assert local_affinity(first, second, places, far, 2, both_ways=False).item() == pytest.approx(0.5 * (0.0 + 0.5))


def test_both_ways_is_the_same_from_either_side() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    here, there = torch.rand(2, 3, 4, 2), torch.rand(2, 3, 4, 2)
    forth = local_affinity(first, second, here, there, 3)
    back = local_affinity(second, first, there, here, 3)
    assert torch.allclose(forth, back.transpose(1, 2), atol=1e-6)
    one_way = local_affinity(first, second, here, there, 3, both_ways=False)
    other_way = local_affinity(second, first, there, here, 3, both_ways=False).transpose(1, 2)
    assert torch.allclose(forth, 0.5 * (one_way + other_way), atol=1e-6)


def random_affinities(graphs: int = 2, nodes: int = 5, edges: int = 2) -> Affinities:
    first, second = torch.randn(graphs, nodes, 4), torch.randn(graphs, nodes, 4)
    heads = nearest_neighbours(first, edges), nearest_neighbours(second, edges)
    return Affinities(global_affinity(first, second), edge_affinity(first, second, *heads), *heads)


def test_dense_edges_and_kept_edges_tell_the_same_sum() -> None:
    torch.manual_seed(0)
    affinities = random_affinities()
    assert affinities.edge is not None
    dense = affinities.dense_edges(affinities.edge)
    matching = torch.stack([torch.randperm(5), torch.randperm(5)])
    chosen = torch.zeros(2, 5, 5).scatter_(2, matching[:, :, None], 1.0).view(2, 25)
    by_solver = torch.einsum("gp,gpq,gq->g", chosen, dense, chosen)
    by_gradient = (affinities.edge * affinities.edges_kept(matching)).sum((1, 2, 3, 4))
    assert torch.allclose(by_solver, by_gradient, atol=1e-5)
    assert int((dense != 0).sum()) == 2 * (5 * 2) ** 2
