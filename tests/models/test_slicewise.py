"""Two-dimensional networks on volumes: slices go in, and come out where they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from segkit.models.blocks import Slicewise, SlicewiseConfig


class _Planar(nn.Module):
    """A two-dimensional network that notes the images it was given."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.divisor = (4, 8)
        self.input_weights = ("encoder.weight",)
        self.head_prefixes = ("heads.",)
        self.encoder_prefix = "encoder."
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        self.seen.append(x)
        logits: Tensor = self.encoder(x)
        return [logits] if self.training else logits


def _numbered(slices: int) -> Tensor:
    """A volume (1, 2, slices, 1, 1): channel 0 holds 1, 2, 3 ... along axis 0, channel 1 ten times as much."""
    numbers = torch.arange(1.0, slices + 1).view(1, 1, slices, 1, 1)
    return torch.cat([numbers, 10 * numbers], dim=1)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("is_training", [True, False])
def test_each_slice_by_itself(axis: int, is_training: bool) -> None:
    convolution = nn.Conv2d(2, 3, 3, padding=1)
    model = Slicewise(_Planar(convolution), axis, slices_at_once=2).train(is_training)
    x = torch.randn(2, 2, 5, 6, 7)
    logits = model(x)[0] if is_training else model(x)
    assert logits.shape == (2, 3, 5, 6, 7)
    for index in range(x.shape[2 + axis]):
        torch.testing.assert_close(logits.select(2 + axis, index), convolution(x.select(2 + axis, index)))


def test_neighbours_are_channels_and_the_border_is_repeated() -> None:
    planar = _Planar(nn.Identity())
    Slicewise(planar, neighbours=1).train()(_numbered(3))
    assert planar.seen[0].shape == (3, 6, 1, 1)
    assert planar.seen[0].flatten(1).tolist() == [
        # slice before, slice itself, slice after: two channels of each
        [1, 10, 1, 10, 2, 20],
        [1, 10, 2, 20, 3, 30],
        [2, 20, 3, 30, 3, 30],
    ]


def test_two_neighbours_of_a_single_slice_are_that_slice() -> None:
    planar = _Planar(nn.Identity())
    Slicewise(planar, neighbours=2).train()(_numbered(1))
    assert planar.seen[0].flatten(1).tolist() == [[1, 10] * 5]


def test_neighbours_cross_the_borders_of_chunks_but_not_of_cases() -> None:
    planar = _Planar(nn.Conv2d(6, 1, 1))
    x = torch.cat([_numbered(5), 100 * _numbered(5)])
    one_by_one = Slicewise(planar, neighbours=1, slices_at_once=1).eval()(x)
    at_once = Slicewise(planar, neighbours=1, slices_at_once=100).eval()(x)
    torch.testing.assert_close(one_by_one, at_once)
    assert [len(images) for images in planar.seen] == [2, 2, 2, 2, 2, 10]
    assert planar.seen[5][4].flatten().tolist() == [4, 40, 5, 50, 5, 50]
    assert planar.seen[5][5].flatten().tolist() == [100, 1000, 100, 1000, 200, 2000]


def test_evaluation_takes_few_slices_at_once_and_training_all() -> None:
    planar = _Planar(nn.Conv2d(1, 1, 1))
    model = Slicewise(planar, slices_at_once=4)
    x = torch.randn(1, 1, 10, 2, 2)
    model.train()(x)
    model.eval()(x)
    assert [len(images) for images in planar.seen] == [10, 4, 4, 2]


def test_the_mode_reaches_the_network_and_its_parts() -> None:
    planar = _Planar(nn.Dropout())
    model = Slicewise(planar)
    for mode in (False, True):
        model.train(mode)
        assert (planar.training, planar.encoder.training) == (mode, mode)


@pytest.mark.parametrize(("axis", "divisor"), [(0, (1, 4, 8)), (1, (4, 1, 8)), (2, (4, 8, 1))])
def test_the_divisor_leaves_the_slice_axis_free(axis: int, divisor: tuple[int, ...]) -> None:
    assert Slicewise(_Planar(nn.Identity()), axis).divisor == divisor


def test_weights_have_the_same_names_in_both_forms() -> None:
    planar = _Planar(nn.Conv2d(1, 1, 1))
    model = Slicewise(planar)
    assert list(model.state_dict()) == list(planar.state_dict()) == ["encoder.weight", "encoder.bias"]
    assert (model.input_weights, model.head_prefixes, model.encoder_prefix) == (
        planar.input_weights,
        planar.head_prefixes,
        planar.encoder_prefix,
    )


def test_a_copy_has_weights_of_its_own() -> None:
    model = Slicewise(_Planar(nn.Conv2d(1, 1, 1, bias=False)))
    nn.init.ones_(model.encoder.weight)  # type: ignore[arg-type, union-attr]
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.encoder.weight)  # type: ignore[arg-type, union-attr]
    x = torch.ones(1, 1, 2, 1, 1)
    assert model.eval()(x).sum() == 2
    assert twin.eval()(x).sum() == 0


def test_images_take_no_slices() -> None:
    planar = _Planar(nn.Identity())
    assert SlicewiseConfig().applied_to(planar, 2) is planar
    assert SlicewiseConfig().image_channels(4, 2) == 4
    assert SlicewiseConfig(neighbours=1).image_channels(1, 3) == 3
    assert SlicewiseConfig(neighbours=2).image_channels(4, 3) == 20
    for config in (SlicewiseConfig(neighbours=1), SlicewiseConfig(slice_axis=0)):
        with pytest.raises(ValueError, match="slice_axis and neighbours need data of three axes"):
            config.image_channels(1, 2)


def test_the_axis_is_the_first_unless_chosen() -> None:
    for chosen, axis in ((None, 0), (0, 0), (2, 2)):
        model = SlicewiseConfig(slice_axis=chosen).applied_to(_Planar(nn.Identity()), 3)
        assert isinstance(model, Slicewise)
        assert model.axis == axis
