"""The method as a whole: what learns, what is compared, what is measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from segkit.models.table import MODELS, build_model
from segkit.pretraining.affinity import (
    Affinities,
    MessagePassing,
    edge_affinity,
    global_affinity,
    nearest_neighbours,
)
from segkit.pretraining.graph_matching import (
    GradientConfig,
    GraphMatching,
    GraphMatchingConfig,
    matching_accuracy,
    matching_loss,
)
from segkit.pretraining.solver import SolverConfig
from tests.smallest import SMALLEST

CONFIG = GraphMatchingConfig(nodes=4, edges=2, width=16)


def batch(dims: int, size: int, *, images: int = 8, is_same: bool = False) -> dict[str, Tensor]:
    """Views of random images; the second ones are the same as the first, or noisy."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(images, 1, *(size,) * dims, generator=generator)
    noise = 0.0 if is_same else 0.5
    frame = torch.cat([torch.eye(dims), torch.zeros(dims, 1)], dim=1).expand(images, -1, -1)
    second = first + noise * torch.randn(first.shape, generator=generator)
    return {"first": first, "second": second, "first_frame": frame, "second_frame": frame}


def method(family: str = "revmbunet", dims: int = 2, config: GraphMatchingConfig = CONFIG) -> GraphMatching:
    network = build_model(family, in_channels=1, out_channels=1, dims=dims, **SMALLEST[family])  # type: ignore[arg-type]
    return GraphMatching(network, config, 1, dims)


@pytest.mark.parametrize("family", [family for family in MODELS if family != "monai"])  # whose encoder has no name
def test_the_encoder_of_every_family_learns_and_nothing_behind_it(family: str) -> None:
    dims = 2 if family in ("smp", "vit", "generator") else 3
    found = method(family, dims)
    size = 32 if family in ("stunet", "smp", "vit") else 8
    found.loss(batch(dims, size)).backward()
    prefix = f"network.{found.network.encoder_prefix}"
    for name, parameter in found.named_parameters():
        is_encoder = name.startswith(prefix)
        assert parameter.requires_grad == (is_encoder or not name.startswith("network.")), name
        if not is_encoder:
            assert (parameter.grad is None) == name.startswith("network."), name
    assert any(bool(p.grad.any()) for n, p in found.named_parameters() if n.startswith(prefix) and p.grad is not None)


@pytest.mark.parametrize("order", [1, 2])
def test_two_equal_views_are_matched_and_leave_nothing_to_learn_without_noise(order: int) -> None:
    gradient = CONFIG.gradient.model_copy(update={"temperature": 0.0})
    changes = {"solver": SolverConfig(order=order), "gradient": gradient}  # type: ignore[arg-type]
    found = method(config=CONFIG.model_copy(update=changes)).eval()
    images = batch(2, 8, is_same=True)
    assert found.loss(images).item() == 0.0
    assert found.measures(images) == {"matching": 1.0, "noisy": 1.0, "retrieval": 1.0}


def test_measures_are_the_same_every_time_and_leave_the_random_numbers_alone() -> None:
    found, images = method().eval(), batch(2, 8)
    state = torch.get_rng_state()
    assert found.measures(images) == found.measures(images)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_local_share_mixes_cells_into_the_affinity_of_nodes() -> None:
    images = batch(2, 8)
    torch.manual_seed(0)
    found = method(config=CONFIG.model_copy(update={"global_share": 1.0})).eval()
    whole, _, _ = found.affinities(images)
    found.config = CONFIG.model_copy(update={"global_share": 0.0})
    local, _, _ = found.affinities(images)
    found.config = CONFIG.model_copy(update={"global_share": 0.8})
    both, _, _ = found.affinities(images)
    assert torch.allclose(both.vertex, 0.8 * whole.vertex + 0.2 * local.vertex, atol=1e-6)
    assert not torch.allclose(whole.vertex, local.vertex, atol=1e-2)


def test_few_cells_are_averages_of_many() -> None:
    images = batch(2, 32)
    torch.manual_seed(0)
    coarse = method(config=CONFIG.model_copy(update={"cells": 1, "global_share": 0.0})).eval()
    affinities, _, _ = coarse.affinities(images)
    maps = coarse.network.encode(torch.cat([images["first"], images["second"]]))[-1]  # type: ignore[operator]
    first, second = maps.mean((2, 3)).view(2, 2, 4, -1)
    expected = torch.cosine_similarity(first[:, :, None], second[:, None], dim=-1)
    # One cell is matched with one cell, by place and by feature, both ways.
    assert torch.allclose(affinities.vertex, expected, atol=1e-5)


def test_learning_finds_images_again() -> None:
    torch.manual_seed(0)
    found = method(config=CONFIG.model_copy(update={"nodes": 8}))
    optimiser = torch.optim.Adam([p for p in found.parameters() if p.requires_grad], lr=3e-3)
    before = found.eval().measures(batch(2, 16, images=64))["matching"]
    found.train()
    for _ in range(40):
        optimiser.zero_grad()
        found.loss(batch_of(32, 16)).backward()
        optimiser.step()
    after = found.eval().measures(batch(2, 16, images=64))["matching"]
    assert after > before + 0.1


def batch_of(images: int, size: int) -> dict[str, Tensor]:
    """A fresh batch of such images, from torch's own random numbers."""
    first = torch.randn(images, 1, size, size)
    frame = torch.cat([torch.eye(2), torch.zeros(2, 1)], dim=1).expand(images, -1, -1)
    second = first + 0.5 * torch.randn_like(first)
    return {"first": first, "second": second, "first_frame": frame, "second_frame": frame}


@pytest.mark.parametrize("residual", [True, False])
def test_nodes_that_only_hear_their_neighbours_do_not_learn_who_they_are(residual: bool) -> None:
    """Synthetic features, 8 informative directions in much noise: matched rightly after 50 steps, or hardly ever."""
    torch.manual_seed(0)
    directions = torch.randn(8, 64)
    encoder = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32))
    passing = MessagePassing(32, 2, residual=residual)
    optimiser = torch.optim.Adam([*encoder.parameters(), *passing.parameters()], lr=1e-2)

    def affinities(graphs: int) -> Affinities:
        truth = torch.randn(graphs, 16, 8) @ directions
        features = [encoder(truth + 3 * torch.randn(graphs, 16, 64)) for _ in range(2)]
        edges = [nearest_neighbours(view, 5) for view in features]
        known = [passing(view, heads) for view, heads in zip(features, edges, strict=True)]
        return Affinities(global_affinity(*known), edge_affinity(*known, *edges), *edges)

    for _ in range(50):
        optimiser.zero_grad()
        matching_loss(affinities(4), GradientConfig(), SolverConfig()).backward()
        optimiser.step()
    with torch.no_grad():
        accuracy = matching_accuracy(affinities(16), SolverConfig())
    assert (accuracy > 0.8) == residual
    assert residual or accuracy < 0.4
