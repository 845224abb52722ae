"""Masked reconstruction: what is hidden, what it costs, and what the measures say, on images one can count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import segkit
from segkit.errors import RequestError
from segkit.pretraining.masked import (
    MaskedConfig,
    MaskedReconstruction,
    block_grid,
    block_sides,
    hidden_voxels,
    reconstruction_loss,
)


class Known(nn.Module):
    """Answers `answer` whatever it sees, and keeps what it saw."""

    divisor = (4, 4)
    encoder_prefix = ""  # no part of it is an encoder, so only the image is masked

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        self.seen.append(x)
        answer = self.answer.expand_as(x) if self.answer.dim() < x.dim() else self.answer[: len(x)]
        return [answer] if self.training else answer


def batch_of(image: Tensor, first_place: float = 0.0) -> dict[str, Tensor]:
    count = len(image)
    return {"first": image, "stack": torch.arange(count), "place": torch.arange(count) + first_place}


@pytest.mark.parametrize(
    ("patch", "divisor", "expected"),
    [
        ((128, 128, 128), (32, 32, 32), (32, 32, 32)),  # four fit
        ((96, 96), (32, 32), (16, 16)),
        ((16, 64, 64), (4, 16, 16), (4, 16, 16)),
        ((64, 64), (2, 1), (4, 4)),  # no less than 4 where there is room
        ((8, 4, 1), (8, 1, 1), (2, 1, 1)),
    ],
)
def test_blocks_suit_the_patch(patch: tuple[int, ...], divisor: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert block_sides(patch, divisor) == expected


def test_the_blocks_of_the_lowest_numbers_are_hidden() -> None:
    """Half of four blocks of 1 x 2 voxels; the last block of a row reaches over the end."""
    numbers = torch.tensor([[[0.1, 0.9], [0.8, 0.2]]])
    assert block_grid((2, 3), (1, 2)) == (2, 2)
    hidden = hidden_voxels(numbers, (2, 3), (1, 2), 0.5)
    assert hidden.tolist() == [[[[True, True, False], [False, False, True]]]]


@pytest.mark.parametrize(("share", "expected"), [(0.01, 1), (0.5, 4), (0.6, 5), (0.99, 7)])
def test_every_image_has_as_many_hidden_blocks(share: float, expected: int) -> None:
    hidden = hidden_voxels(torch.rand(5, 2, 2, 2), (4, 4, 4), (2, 2, 2), share)
    assert hidden.shape == (5, 1, 4, 4, 4)
    assert hidden.flatten(1).sum(1).tolist() == [8 * expected] * 5


def test_one_block_alone_cannot_be_hidden() -> None:
    with pytest.raises(ValueError, match=r"a block of \(4, 4\) voxels covers the whole patch of \(3, 4\)"):
        hidden_voxels(torch.rand(1, 1, 1), (3, 4), (4, 4), 0.5)


IMAGE = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
TOP = torch.tensor([[[[True, True], [False, False]]]])


def test_only_hidden_voxels_cost() -> None:
    """Zeros in their place: (1 + 4) / 2; what is said about the others does not matter."""
    assert reconstruction_loss(torch.tensor([[[[0.0, 0.0], [99.0, -7.0]]]]), IMAGE, TOP) == 2.5
    assert reconstruction_loss(IMAGE, IMAGE, TOP) == 0


def test_channels_count_alike() -> None:
    """Errors of 1 and 3 in the two channels: (1 + 9) / 2."""
    image = torch.stack([torch.ones(2, 2), 3 * torch.ones(2, 2)])[None]
    assert reconstruction_loss(torch.zeros(1, 2, 2, 2), image, TOP) == 5


def test_coarse_levels_see_the_averaged_image() -> None:
    """Weights 2/3 and 1/3; the coarse voxel holds the mean 2.5, and half of it is hidden, which divides out."""
    loss = reconstruction_loss([torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 1)], IMAGE, TOP)
    assert loss == pytest.approx(2 / 3 * 2.5 + 1 / 3 * 6.25)


def test_other_numbers_of_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images \(1, 1, 2, 2\) are reconstructed as \(1, 3, 2, 2\)"):
        reconstruction_loss(torch.zeros(1, 3, 2, 2), IMAGE, TOP)


def test_the_network_sees_zeros_in_hidden_blocks_and_the_image_elsewhere() -> None:
    image = torch.rand(3, 2, 16, 16) + 1
    network = Known(torch.zeros(2, 1, 1))
    method = MaskedReconstruction(network, MaskedConfig(share=0.25))
    method.loss(batch_of(image))
    (seen,) = network.seen
    hidden = seen == 0
    assert torch.equal(seen[~hidden], image[~hidden])
    assert torch.equal(hidden[:, 0], hidden[:, 1]), "a voxel is hidden in all channels or in none"
    assert hidden[:, 0].flatten(1).sum(1).tolist() == [64] * 3


def test_draws_are_of_the_global_generator_and_do_not_depend_on_the_batch_size() -> None:
    network = Known(torch.zeros(1, 1, 1))
    method = MaskedReconstruction(network)
    image = torch.ones(4, 1, 32, 32)
    torch.manual_seed(5)
    method.loss(batch_of(image))
    torch.manual_seed(5)
    for part in image.split(1):
        method.loss(batch_of(part))
    assert torch.equal(network.seen[0], torch.cat(network.seen[1:]))
    assert not torch.equal(network.seen[1], network.seen[2])


def test_who_knows_the_image_explains_all_of_it() -> None:
    image = torch.randn(4, 1, 16, 16)
    measures = MaskedReconstruction(Known(image)).eval().measures(batch_of(image))
    assert measures == {"explained": 1.0, "error": 0.0}


def test_who_says_the_mean_explains_nothing_and_zeros_less() -> None:
    """Two kinds of rows, 1 and 3, in blocks of two rows each: mean 2, variance 1; zeros have the error (1 + 9) / 2."""
    image = torch.tensor([1.0, 3.0]).repeat(8).view(1, 1, 16, 1).expand(2, 1, 16, 16)
    config = MaskedConfig(block=(2, 4))
    measures = MaskedReconstruction(Known(2 * torch.ones(1, 1, 1)), config).eval().measures(batch_of(image))
    assert measures == {"explained": pytest.approx(0.0), "error": pytest.approx(1.0)}
    measures = MaskedReconstruction(Known(torch.zeros(1, 1, 1)), config).eval().measures(batch_of(image))
    assert measures == {"explained": pytest.approx(-4.0), "error": pytest.approx(5.0)}


def test_a_channel_without_contrast_is_left_out() -> None:
    image = torch.cat([torch.full((2, 1, 16, 16), 0.3), torch.randn(2, 1, 16, 16)], dim=1)
    answer = image.clone()
    answer[:, 0] = 1.3
    measures = MaskedReconstruction(Known(answer)).eval().measures(batch_of(image))
    assert measures == {"explained": pytest.approx(1.0), "error": pytest.approx(0.5)}
    flat = image[:, :1]
    assert MaskedReconstruction(Known(flat)).eval().measures(batch_of(flat))["explained"] == 0


def test_measures_hide_the_same_of_an_image_in_any_batch() -> None:
    """Eleven images, more than go through the network at once; and nothing is drawn from the global generator."""
    network = Known(torch.zeros(1, 1, 1))
    method = MaskedReconstruction(network).eval()
    batch = batch_of(torch.ones(11, 1, 32, 32), first_place=-3.5)
    state = torch.get_rng_state()
    whole = method.measures(batch)
    together = torch.cat(network.seen)
    network.seen.clear()
    assert method.measures(batch) == whole
    assert torch.equal(torch.cat(network.seen), together)
    network.seen.clear()
    method.measures({name: tensor[6:] for name, tensor in batch.items()})
    assert torch.equal(torch.cat(network.seen), together[6:])
    assert len({tuple(image.flatten().tolist()) for image in together}) == 11
    assert torch.equal(torch.get_rng_state(), state)


def test_a_block_of_other_dimensions_is_a_wrong_request() -> None:
    method = MaskedReconstruction(Known(torch.zeros(1, 1, 1)), MaskedConfig(block=(4, 4, 4)))
    with pytest.raises(RequestError, match=r"masked\.block has 3 sides; expected 2, one for each axis"):
        method.loss(batch_of(torch.ones(1, 1, 16, 16)))


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("revmbunet", {"size": "tiny", "widths": (4, 8, 8)}),
        ("stunet", {"width": 2, "strides": ((2, 2, 2), (2, 2, 2), (1, 1, 1), (1, 1, 1), (1, 1, 1))}),
    ],
)
def test_every_head_learns(family: str, arguments: dict[str, object]) -> None:
    network = segkit.build_model(family, in_channels=2, out_channels=2, dims=3, **arguments)
    method = MaskedReconstruction(network).train()
    torch.autograd.backward(method.loss(batch_of(torch.randn(2, 2, 16, 16, 16))))
    heads = {name: p for name, p in network.named_parameters() if name.startswith(network.head_prefixes)}
    assert len(heads) >= 4
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in heads.values())
    assert all(p.grad is not None for p in network.parameters())


def test_stripes_are_learnt() -> None:
    """A hidden block between stripes can be told from what is left of them along their length."""
    torch.manual_seed(1)
    network = segkit.build_model("revmbunet", in_channels=1, out_channels=1, dims=2, size="tiny", widths=(8, 16, 16))
    method = MaskedReconstruction(network, MaskedConfig(share=0.3, block=(4, 4)))
    optimiser = torch.optim.Adam(method.parameters(), lr=0.01)

    def stripes(seed: int) -> Tensor:
        values = torch.randn(8, 1, 1, 16, generator=torch.Generator().manual_seed(seed)).sign()
        return values.expand(8, 1, 16, 16)

    held_out = batch_of(stripes(10_000))
    before = method.eval().measures(held_out)["explained"]
    for step in range(60):
        method.train()
        optimiser.zero_grad()
        torch.autograd.backward(method.loss(batch_of(stripes(step))))
        optimiser.step()
    assert before < 0.1
    assert method.eval().measures(held_out)["explained"] > 0.6
