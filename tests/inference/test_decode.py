"""Logits back to masks on the grid of the input, with values worked out by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from torch.nn import functional

from segkit.errors import CheckpointError
from segkit.inference import decode as module
from segkit.inference.decode import (
    Activation,
    Maps,
    decode_prepared,
    merged,
    outside_probabilities,
    probabilities,
    uncertainty,
)
from segkit.inference.sliding_window import Slab
from segkit.preparing.preprocessing import Preparation
from segkit.reading.geometry import Reorientation, reorientation_to
from segkit.reading.volume import Grid
from segkit.shapes import LabelMap


def slabs(logits: ArrayLike, axis: int = -1, depth: int = 1) -> Iterator[Slab]:
    """Logits (K, *spatial) in slabs of `depth` voxels along an axis of *spatial."""
    array = np.asarray(logits, np.float32)
    axis %= array.ndim - 1
    whole = Slab(axis, 0, array.shape[axis + 1], array)
    for start in range(0, whole.stop, depth):
        yield whole.part(start, min(start + depth, whole.stop))


def decode(logits: ArrayLike, way: Preparation, activation: Activation, values: Sequence[int]) -> LabelMap:
    """The mask, which does not depend on how the logits are cut into slabs."""
    masks = [
        module.decode(slabs(logits, axis, depth), way, activation, values)
        for axis in range(np.ndim(logits) - 1)
        for depth in (1, 3, 100)
    ]
    for mask in masks[1:]:
        assert np.array_equal(mask, masks[0])
    return masks[0]


def probability_planes(logits: ArrayLike, way: Preparation, activation: Activation) -> list[NDArray[np.float32]]:
    maps = Maps(way, outside_probabilities(np.shape(logits)[0], activation))
    for slab in slabs(logits):
        maps.add(probabilities(slab.logits, activation), slab)
    return list(maps.arrays())


def preparation(
    shape: tuple[int, ...], crop: tuple[tuple[int, ...], tuple[int, ...]], resampled: tuple[int, ...] | None = None
) -> Preparation:
    """A volume that is already RAS, with 1 mm voxels."""
    turn = Reorientation(tuple(range(len(shape))), (False,) * len(shape), shape)
    box = tuple(last - first for first, last in zip(*crop, strict=True))
    return Preparation(Grid(shape, np.eye(4)), turn, crop, resampled or box, (1.0,) * len(shape))


ROW = preparation((1, 6), ((0, 1), (1, 5)))
"""A picture of one row and six columns, cropped to columns 1 to 4."""


def test_regions_are_painted_later_over_earlier() -> None:
    logits = torch.tensor([[[1.0, 1, 1, -1]], [[-1.0, 1, 1, -1]], [[-1.0, -1, 1, 1]]])
    assert decode(logits, ROW, "sigmoid", (2, 1, 4)).tolist() == [[0, 2, 1, 4, 4, 0]]


def test_a_logit_of_zero_paints_nothing() -> None:
    logits = torch.tensor([[[0.0, 1e-6, -1e-6, torch.inf]]])
    assert decode(logits, ROW, "sigmoid", (7,)).tolist() == [[0, 0, 7, 0, 7, 0]]


def test_classes_are_painted_by_the_largest_logit_and_the_first_of_equals() -> None:
    logits = torch.tensor([[[3.0, 0, 0, 1]], [[1.0, 2, 0, 1]], [[2.0, 1, 5, 1]]])
    labels = decode(logits, ROW, "softmax", (0, 10, 20))
    assert labels.tolist() == [[0, 0, 10, 20, 0, 0]]
    assert labels.dtype == np.uint8


def test_on_the_prepared_grid_there_is_no_way_back() -> None:
    logits = torch.tensor([[[1.0, 1, 1, -1]], [[-1.0, 1, 1, -1]], [[-1.0, -1, 1, 1]]])
    assert decode_prepared(slabs(logits), (1, 4), "sigmoid", (2, 1, 4)).tolist() == [[2, 1, 4, 4]]


def test_logits_are_left_as_they_were() -> None:
    logits = torch.tensor([[[3.0, 0, 0, 1]], [[1.0, 2, 0, 1]]])
    before = logits.clone()
    decode(logits, ROW, "softmax", (0, 1))
    probability_planes(logits, ROW, "softmax")
    assert torch.equal(logits, before)


def test_not_a_number_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"gave NaN.*metrics\.jsonl"):
        decode(torch.full((1, 1, 4), torch.nan), ROW, "sigmoid", (1,))


def test_outputs_and_values_must_be_as_many() -> None:
    with pytest.raises(CheckpointError, match="gave 2 outputs; expected the 3"):
        decode(torch.zeros(2, 1, 4), ROW, "sigmoid", (1, 2, 3))


def test_logits_are_resampled_linearly_with_faces_aligned() -> None:
    # Two voxels of 2 mm with logits 3 and -1 lie at 1 and 3 mm; voxels of 1 mm at 0.5, 1.5, 2.5 and 3.5 mm
    # get 3, 2, 0 and -1, of which the first two are above 0.
    row = preparation((1, 6), ((0, 1), (1, 5)), resampled=(1, 2))
    logits = torch.tensor([[[3.0, -1.0]]])
    assert decode(logits, row, "sigmoid", (1,)).tolist() == [[0, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
def test_every_orientation_comes_back_to_its_own_voxels(axes: tuple[int, ...], signs: tuple[int, ...]) -> None:
    shape = (3, 4, 5)
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for voxel_axis, (world_axis, sign) in enumerate(zip(axes, signs, strict=True)):
        affine[world_axis, voxel_axis] = sign
    grid = Grid(shape, affine)
    turn = reorientation_to(grid, "RAS")
    source = np.zeros(shape, np.uint8)
    source[0, 1, 2] = source[2, 3, 1] = 1
    turned = turn.apply(source)
    inside = np.argwhere(turned)
    start, stop = tuple(inside.min(0).tolist()), tuple((inside.max(0) + 1).tolist())
    box = tuple(slice(first, last) for first, last in zip(start, stop, strict=True))
    way = Preparation(grid, turn, (start, stop), turned[box].shape, (1.0, 1.0, 1.0))
    logits = torch.from_numpy(turned[box].astype(np.float32))[None] - 0.5
    assert np.array_equal(decode(logits, way, "sigmoid", (1,)), source)
    assert nib.aff2axcodes(affine) == tuple(grid.orientation)


def test_probabilities_lie_on_the_grid_of_the_input() -> None:
    logits = torch.log(torch.tensor([[[1.0, 3, 1, 1]]]))
    (plane,) = probability_planes(logits, ROW, "sigmoid")
    np.testing.assert_allclose(plane, [[0, 0.5, 0.75, 0.5, 0.5, 0]], atol=1e-5)


def test_probabilities_of_resampled_logits_are_not_resampled_probabilities() -> None:
    """Two columns to four: the logits 0, 4 become 0, 1, 3, 4, and nearest 0, 0, 4, 4."""
    way = preparation((1, 4), ((0, 0), (1, 4)), resampled=(1, 2))
    for nearest, expected in ((None, [0, 1, 3, 4]), (1, [0, 0, 4, 4])):
        maps = Maps(replace(way, nearest_axis=nearest, rounds_to_half=True), (0.0,), "sigmoid")
        for slab in slabs([[[0.0, 4.0]]]):
            maps.add(slab.logits, slab)
        (plane,) = maps.arrays()
        np.testing.assert_allclose(plane, [1 / (1 + np.exp(-np.array(expected)))], atol=1e-5)


def test_outside_the_crop_the_background_of_a_softmax_is_certain() -> None:
    logits = torch.log(torch.tensor([[[1.0, 3, 1, 1]], [[1.0, 1, 3, 1]]]))
    background, tissue = probability_planes(logits, ROW, "softmax")
    np.testing.assert_allclose(background, [[1, 0.5, 0.75, 0.25, 0.5, 1]], atol=1e-5)
    np.testing.assert_allclose(background + tissue, 1, atol=2e-5)


def test_mean_of_sigmoids_is_taken_of_probabilities_not_of_logits() -> None:
    # 0.99 and 0.3 average to 0.645; their logits 4.6 and -0.85 would as well, but those of 0.6 and 0.001 would not.
    first, second = torch.tensor([[0.99, 0.6]]).logit(), torch.tensor([[0.3, 0.001]]).logit()
    mean = np.concatenate([slab.logits for slab in merged([slabs(first), slabs(second, depth=2)], "sigmoid")], 1)
    np.testing.assert_allclose(probabilities(mean, "sigmoid"), [[0.645, 0.3005]], atol=1e-6)


def test_mean_of_softmaxes_has_the_probabilities_of_the_mean() -> None:
    first, second = torch.tensor([[0.9], [0.1], [0.0]]).log(), torch.tensor([[0.2], [0.6], [0.2]]).log()
    (mean,) = merged([slabs(first), slabs(second)], "softmax")
    np.testing.assert_allclose(probabilities(mean.logits, "softmax"), [[0.55], [0.35], [0.1]], atol=1e-6)


def test_members_that_disagree_are_told_apart_from_members_in_doubt() -> None:
    sure, opposite, doubt = ([[20.0]], [[-20.0]], [[0.0]])
    (disagreeing,) = merged([slabs(sure), slabs(opposite)], "sigmoid")
    (doubting,) = merged([slabs(doubt), slabs(doubt)], "sigmoid")
    # Both means are one half, of the largest entropy; only the first pair disagrees.
    np.testing.assert_allclose(uncertainty(disagreeing, "sigmoid"), [[1.0], [1.0]], atol=1e-6)
    np.testing.assert_allclose(uncertainty(doubting, "sigmoid"), [[1.0], [0.0]], atol=1e-6)


def test_entropy_of_classes_is_relative_to_that_of_equal_shares() -> None:
    (equal,) = slabs([[2.0], [2.0], [2.0]])
    (certain,) = slabs([[90.0], [0.0], [0.0]])
    assert uncertainty(equal, "softmax")[0] == pytest.approx(1.0, abs=1e-6)
    assert uncertainty(certain, "softmax")[0] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("cropped", [(9, 7, 11), (4, 9, 5)])
def test_resampled_masks_are_those_of_resampling_every_logit(activation: Activation, cropped: tuple[int, ...]) -> None:
    prepared, values = (6, 5, 8), (0, 3, 7)
    smooth = torch.randn(1, 3, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    logits = functional.interpolate(smooth, size=prepared, mode="trilinear")[0]
    whole = functional.interpolate(logits[None], size=cropped, mode="trilinear")[0]
    expected = np.zeros(cropped, np.uint8)
    if activation == "softmax":
        expected = np.asarray(values, np.uint8)[whole.argmax(0).numpy()]
    else:
        for plane, value in zip(whole, values, strict=True):
            expected[(plane > 0).numpy()] = value
    way = preparation(cropped, ((0, 0, 0), cropped), resampled=prepared)
    found = decode(logits, way, activation, values)
    assert np.count_nonzero(found != expected) <= 1  # a logit may be 1e-8 from another
    assert len(np.unique(expected)) == 3 or activation == "sigmoid"
