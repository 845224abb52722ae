"""Contrast of views: the loss by hand, and what learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import segkit
from segkit.pretraining.contrastive import Contrast, ContrastiveConfig, nt_xent


def test_views_alike_among_others_at_right_angles() -> None:
    """Each view has a partner at cosine 1 and two others at 0."""
    views = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    assert nt_xent(views, views, 0.5) == pytest.approx(math.log(1 + 2 * math.exp(-2)))
    assert nt_xent(views, views.flip(0), 0.5) == pytest.approx(math.log(2 + math.exp(2)))


def test_the_equation_of_the_paper_view_by_view() -> None:
    first, second = torch.randn(3, 4), torch.randn(3, 4)
    views = torch.cat([first, second]).double()
    losses = []
    for i in range(6):
        j = (i + 3) % 6
        of = {k: float(torch.cosine_similarity(views[i], views[k], dim=0)) / 0.2 for k in range(6) if k != i}
        losses.append(-math.log(math.exp(of[j]) / sum(math.exp(value) for value in of.values())))
    assert float(nt_xent(first, second, 0.2)) == pytest.approx(sum(losses) / 6, abs=1e-5)


def test_one_image_has_nothing_to_be_told_from() -> None:
    assert nt_xent(torch.randn(1, 4), torch.randn(1, 4), 0.1) == 0


def test_autocast_costs_no_digits() -> None:
    first, second = torch.randn(4, 8), torch.randn(4, 8)
    expected = nt_xent(first, second, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        found = nt_xent(first, second, 0.05)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


class Looker(nn.Module):
    """Its deepest features are the image itself, channel by channel, at half the resolution."""

    divisor = (2, 2)
    encoder_prefix = "encoder."

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.AvgPool2d(2)

    def encode(self, x: Tensor) -> list[Tensor]:
        return [x, self.encoder(x)]


def test_the_projector_sees_the_mean_of_the_deepest_map() -> None:
    method = Contrast(Looker(), ContrastiveConfig(width=2, hidden=5), in_channels=3, dims=2)
    assert [tuple(p.shape) for p in method.projector.parameters()] == [(5, 3), (5,), (2, 5), (2,)]
    batch = {"first": torch.randn(4, 3, 6, 6), "second": torch.randn(4, 3, 6, 6)}
    first, second = method.project(batch)
    torch.testing.assert_close(first, method.projector(batch["first"].mean((2, 3))))
    torch.testing.assert_close(second, method.projector(batch["second"].mean((2, 3))))
    assert method.loss(batch) == nt_xent(first, second, 0.1)


def test_equal_views_are_all_retrieved_and_mixed_ones_are_not() -> None:
    method = Contrast(Looker(), ContrastiveConfig(), in_channels=3, dims=2).eval()
    image = torch.randn(4, 3, 2, 2)
    found = method.measures({"first": image, "second": image})
    assert found["retrieval"] == 1
    mixed = method.measures({"first": image, "second": image.roll(1, 0)})
    assert mixed["retrieval"] == 0
    assert mixed["loss"] > found["loss"] > 0


def test_the_encoder_learns_and_what_lies_behind_it_does_not() -> None:
    torch.manual_seed(2)
    network = segkit.build_model("revmbunet", in_channels=1, out_channels=1, dims=2, size="tiny", widths=(4, 8))
    method = Contrast(network, ContrastiveConfig(width=8), in_channels=1, dims=2).train()
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(8, 1, 8, 8, generator=generator)
    batch = {"first": image, "second": image + 0.5 * torch.randn(image.shape, generator=generator)}
    optimiser = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = method.loss(batch)
        torch.autograd.backward(loss)
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    learning = {name.split(".")[1] for name, p in method.named_parameters() if p.grad is not None}
    assert learning == {"encoder", "0", "2"}
