"""The gradient through a matching: the two forms of it agree, and it points where it should."""

from __future__ import annotations

import pytest
import torch

from segkit.pretraining.affinity import Affinities, edge_affinity, global_affinity, nearest_neighbours
from segkit.pretraining.graph_matching import GradientConfig, matching_accuracy, matching_loss, matching_of
from segkit.pretraining.solver import SolverConfig

SECOND, FIRST = SolverConfig(), SolverConfig(order=1)


def leaves(spread: float, graphs: int = 4, nodes: int = 16) -> Affinities:
    """Affinities of two noisy views of the same nodes, as leaves of the graph of gradients."""
    torch.manual_seed(1)
    truth = torch.randn(graphs, nodes, 8)
    views = [truth + spread * torch.randn(graphs, nodes, 8) for _ in range(2)]
    heads = nearest_neighbours(views[0], 5), nearest_neighbours(views[1], 5)
    vertex = (0.8 * global_affinity(*views)).requires_grad_()
    edge = edge_affinity(views[0], views[1], *heads).requires_grad_()
    return Affinities(vertex, edge, *heads)


def gradients(affinities: Affinities, gradient: GradientConfig, solver: SolverConfig = SECOND) -> list[torch.Tensor]:
    torch.manual_seed(2)
    wanted = [tensor for tensor in (affinities.vertex, affinities.edge) if tensor is not None]
    found = torch.autograd.grad(matching_loss(affinities, gradient, solver), wanted, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(wanted, found, strict=True)]


@pytest.mark.parametrize("spread", [1.0, 2.0])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_one_solution_stands_for_two_at_the_papers_lambda(spread: float, temperature: float) -> None:
    affinities = leaves(spread)
    one = gradients(affinities, GradientConfig(temperature=temperature, solves=1))
    two = gradients(affinities, GradientConfig(temperature=temperature, solves=2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert any(bool(grad.any()) for grad in one)


def test_a_small_lambda_needs_both_solutions() -> None:
    affinities = leaves(2.0)
    one = gradients(affinities, GradientConfig(strength=0.01, solves=1))
    two = gradients(affinities, GradientConfig(strength=0.01, solves=2))
    assert not torch.equal(one[0], two[0])
    # So small a step changes hardly any matching, and there is no gradient then.
    assert two[0].abs().sum() < one[0].abs().sum()


def test_the_gradient_takes_from_wrong_pairs_and_gives_to_right_ones() -> None:
    vertex = torch.tensor([[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]], requires_grad=True)
    nowhere = torch.zeros(1, 3, 0, dtype=torch.int64)
    affinities = Affinities(vertex, None, nowhere, nowhere)
    config = GradientConfig(noise="none")
    loss = matching_loss(affinities, config, FIRST)
    assert loss.item() == 4.0  # 0 and 1 are exchanged: two right pairs missed, two wrong ones made
    (grad,) = torch.autograd.grad(loss, vertex)
    expected = torch.tensor([[[-1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]]) / 80
    assert torch.allclose(grad, expected)


def test_a_wrong_pair_of_views_that_overlap_counts_less() -> None:
    """0 and 1 are exchanged; their views overlap by 3/4 and 1/2: 2 (1 - 3/4) + 2 (1 - 1/2) = 1.5."""
    vertex = torch.tensor([[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]], requires_grad=True)
    nowhere = torch.zeros(1, 3, 0, dtype=torch.int64)
    overlaps = torch.tensor([[[0.9, 0.75, 0.0], [0.5, 0.9, 0.0], [0.0, 0.0, 0.9]]])
    affinities = Affinities(vertex, None, nowhere, nowhere)
    loss = matching_loss(affinities, GradientConfig(noise="none"), FIRST, overlaps)
    assert loss.item() == 1.5
    (grad,) = torch.autograd.grad(loss, vertex)
    expected = torch.tensor([[[-0.25, 0.25, 0.0], [0.5, -0.5, 0.0], [0.0, 0.0, 0.0]]]) / 80
    assert torch.allclose(grad, expected)


@pytest.mark.parametrize("solver", [FIRST, SECOND])
def test_perfect_embeddings_have_no_loss_without_noise(solver: SolverConfig) -> None:
    affinities = leaves(0.0)
    assert matching_loss(affinities, GradientConfig(temperature=0.0), solver).item() == 0.0
    assert matching_accuracy(affinities, solver) == 1.0
    assert not any(bool(grad.any()) for grad in gradients(affinities, GradientConfig(temperature=0.0), solver))


def test_a_margin_makes_a_right_matching_learn() -> None:
    affinities = leaves(0.0)
    margin = GradientConfig(noise="margin", margin=2.0)
    assert matching_loss(affinities, margin, FIRST).item() > 0
    vertex = gradients(affinities, margin, FIRST)[0]
    assert vertex.diagonal(dim1=1, dim2=2).sum() < 0  # going down the gradient raises the right pairs
    assert matching_loss(affinities, GradientConfig(noise="margin", margin=0.0), FIRST).item() == 0.0


def test_renaming_nodes_renames_the_matching_and_its_gradient() -> None:
    affinities = leaves(1.0)
    nodes, graphs = 16, 4
    order = torch.randperm(nodes, generator=torch.Generator().manual_seed(3))
    place = torch.empty_like(order)
    place[order] = torch.arange(nodes)
    assert affinities.edge is not None
    renamed = Affinities(
        affinities.vertex.detach()[:, order][:, :, order].requires_grad_(),
        affinities.edge.detach()[:, order][:, :, :, order].requires_grad_(),
        place[affinities.first[:, order]],
        place[affinities.second[:, order]],
    )
    assert torch.equal(matching_of(renamed, SECOND), place[matching_of(affinities, SECOND)[:, order]])
    config = GradientConfig(noise="none")
    for before, after in zip(gradients(affinities, config), gradients(renamed, config), strict=True):
        turned = before[:, order][:, :, order] if before.dim() == 3 else before[:, order][:, :, :, order]
        assert torch.allclose(turned, after)
    assert graphs == len(renamed.vertex)


def test_noise_is_drawn_from_torch_and_makes_matching_harder() -> None:
    affinities = leaves(0.3)
    torch.manual_seed(5)
    first = matching_loss(affinities, GradientConfig(temperature=1.0), FIRST)
    torch.manual_seed(5)
    assert torch.equal(first, matching_loss(affinities, GradientConfig(temperature=1.0), FIRST))
    assert matching_accuracy(affinities, FIRST, 1.0) < matching_accuracy(affinities, FIRST)


def test_the_usual_temperature_depends_on_the_order() -> None:
    assert GradientConfig().temperature_for(2) == 1.0
    assert GradientConfig().temperature_for(1) == 0.3
    assert GradientConfig(temperature=0.5).temperature_for(1) == 0.5
    assert GradientConfig(noise="margin").temperature_for(2) == 0.0
