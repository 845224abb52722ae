"""Lesions moved into another brain, on arrays that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from segkit.preparing.lesion_bank import Lesion, Transplant, cut_lesion
from segkit.preparing.preprocessing import Preparation, PreparedCase
from segkit.reading.geometry import Reorientation
from segkit.reading.volume import Grid
from segkit.shapes import Image, LabelMap

CUBE = (slice(4, 7),) * 3


def case_of(image: Image, labels: LabelMap | None, spacing_mm: tuple[float, ...] | None = None) -> PreparedCase:
    shape = image.shape[1:]
    turn = Reorientation(tuple(range(len(shape))), (False,) * len(shape), shape)
    spacing_mm = spacing_mm or (1.0,) * len(shape)
    return PreparedCase(
        "1", image, labels, Preparation(Grid(shape, np.eye(4)), turn, ((0,) * len(shape), shape), shape, spacing_mm)
    )


@pytest.fixture
def cube() -> PreparedCase:
    """A brain of 2 with a lesion of 5, labelled 1 and in the middle 3."""
    image, labels = np.full((1, 12, 12, 12), 2, np.float32), np.zeros((12, 12, 12), np.uint8)
    image[0][CUBE], labels[CUBE], labels[5, 5, 5] = 5, 1, 3
    return case_of(image, labels)


def result_of(transplant: Transplant, volume: Image) -> tuple[Image, LabelMap]:
    sample = {"image": volume, "label": np.zeros((1, *volume.shape[1:]), np.uint8)}
    patch = transplant.paste_into(sample, (0,) * (volume.ndim - 1))
    return patch["image"], patch["label"][0]


def test_a_cube_in_a_constant_brain(cube: PreparedCase) -> None:
    """Around the lesion are 2 here and 10 there, so it is 5 + 8 there; the box begins 3 voxels before the lesion."""
    volume = np.full((1, 20, 20, 20), 10, np.float32)

    image, labels = result_of(cut_lesion(cube, (5, 5, 5)).matched(volume, (7, 8, 9)), volume)

    expected = np.zeros((20, 20, 20), np.uint8)
    expected[10:13, 11:14, 12:15], expected[11, 12, 13] = 1, 3
    assert np.array_equal(labels, expected)
    assert np.array_equal(image[0], np.where(expected > 0, 13, 10).astype(np.float32))
    assert (volume == 10).all()


def test_the_border_is_blended_by_weight() -> None:
    """Around the lesion the mean is (4 + 6 + 6 + 4) / 4 = 5, there 10: 9 11 14 11 9 mixed with 10."""
    lesion = Lesion(
        np.array([[[4, 6, 9, 6, 4]]], np.float32),
        np.array([[0, 0, 2, 0, 0]], np.uint8),
        np.array([[0.25, 0.75, 1, 0.75, 0.25]], np.float32),
        middle=(0.5, 0.5),
    )
    volume = np.full((1, 1, 8), 10, np.float32)

    image, labels = result_of(lesion.matched(volume, (0, 2)), volume)

    assert image.tolist() == [[[10, 10, 9.75, 10.75, 14, 10.75, 9.75, 10]]]
    assert labels.tolist() == [[0, 0, 0, 0, 2, 0, 0, 0]]


def test_weights_fall_with_the_distance_and_faster_over_thick_slices() -> None:
    labels = np.zeros((9, 9), np.uint8)
    labels[4, 4] = 1
    lesion = cut_lesion(case_of(np.ones((1, 9, 9), np.float32), labels, spacing_mm=(3.0, 1.0)), (4, 4))

    assert lesion.weight[3].tolist() == [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]
    assert lesion.weight[:, 3].tolist() == [0, 0, 0.25, 1, 0.25, 0, 0]
    assert lesion.middle == (0.5, 0.5)


def test_only_the_lesion_of_the_voxel_moves() -> None:
    """A second lesion two voxels away stays, with its image; corners that touch connect."""
    labels = np.array([[1, 0, 0, 0, 0], [0, 2, 0, 1, 0]], np.uint8)
    lesion = cut_lesion(case_of(np.ones((1, 2, 5), np.float32), labels), (1, 1))

    assert lesion.labels.tolist() == [[1, 0, 0, 0, 0], [0, 2, 0, 0, 0]]
    assert lesion.weight[1, 3] == 0
    assert lesion.weight[1, 2] == 0.75


@pytest.mark.parametrize(("corner", "kept"), [((-3, -4), 2), ((0, 5), 1)])
def test_what_leaves_the_volume_or_the_tissue_is_cut_off(corner: tuple[int, int], kept: int) -> None:
    """A row of three labelled voxels in a box of 7 x 9, over a picture whose last column is background."""
    image, labels = np.full((1, 20, 20), 2, np.float32), np.zeros((20, 20), np.uint8)
    labels[10, 9:12] = 1
    volume = np.full((1, 8, 10), 4, np.float32)
    volume[..., 9] = 0

    changed, pasted = result_of(cut_lesion(case_of(image, labels), (10, 10)).matched(volume, corner), volume)

    assert np.count_nonzero(pasted) == kept
    assert np.array_equal(changed, volume)


def test_a_place_has_most_of_the_lesion_in_tissue(cube: PreparedCase) -> None:
    """Tissue is a ball off the middle, smaller than the range of places."""
    volume = np.zeros((1, 30, 30, 30), np.float32)
    distance = np.linalg.norm(np.indices((30, 30, 30)) - 12, axis=0)
    volume[0, distance < 9] = 1.0
    lesion = cut_lesion(cube, (5, 5, 5))

    places = [lesion.moved_into(volume, np.random.default_rng(seed)) for seed in range(30)]

    assert all(place is not None and np.count_nonzero(place.labels) >= 0.9 * 27 for place in places)
    assert len({place.corner for place in places if place is not None}) > 20


def test_no_place_in_an_empty_volume(cube: PreparedCase) -> None:
    volume = np.zeros((1, 12, 12, 12), np.float32)
    assert cut_lesion(cube, (5, 5, 5)).moved_into(volume, np.random.default_rng(0)) is None


def test_a_patch_shows_the_part_that_lies_in_it(cube: PreparedCase) -> None:
    volume = np.full((1, 20, 20, 20), 10, np.float32)
    transplant = cut_lesion(cube, (5, 5, 5)).matched(volume, (7, 8, 9))
    whole_image, whole_labels = result_of(transplant, volume)
    region = slice(11, 20), slice(2, 12), slice(13, 14)

    sample = {"image": volume[(slice(None), *region)], "label": np.zeros((1, 9, 10, 1), np.uint8)}
    patch = transplant.paste_into(sample, (11, 2, 13))

    assert np.array_equal(patch["image"], whole_image[(slice(None), *region)])
    assert np.array_equal(patch["label"][0], whole_labels[region])
    assert patch["label"].any()


def test_foreground_is_where_the_labels_are(cube: PreparedCase) -> None:
    volume = np.full((1, 20, 20, 20), 10, np.float32)
    transplant = cut_lesion(cube, (5, 5, 5)).matched(volume, (7, 8, 9))
    _, labels = result_of(transplant, volume)

    foreground = transplant.foreground((20, 20, 20))

    assert {value: voxels.tolist() for value, voxels in foreground.items()} == {
        value: np.flatnonzero(labels == value).tolist() for value in (1, 3)
    }


def test_a_voxel_without_label_is_refused(cube: PreparedCase) -> None:
    with pytest.raises(ValueError, match=r"voxel \(0, 0, 0\) of case 1 has no label"):
        cut_lesion(cube, (0, 0, 0))
