"""The midline of a head and mirroring at it."""

from __future__ import annotations

import numpy as np
import pytest

from segkit.inpainting.inputs import Midline, find_midline


def test_mirrored_by_hand() -> None:
    row = np.array([1, 2, 3, 4, 5])[:, None, None]
    assert Midline(4).mirrored(row).ravel().tolist() == [5, 4, 3, 2, 1]
    assert Midline(5).mirrored(row).ravel().tolist() == [0, 5, 4, 3, 2]  # voxel 0 lies opposite voxel 5, which is none
    assert Midline(2).mirrored(row).ravel().tolist() == [3, 2, 1, 0, 0]


def test_mirrored_takes_leading_axes() -> None:
    image = np.random.default_rng(0).normal(size=(2, 5, 3, 4))
    np.testing.assert_array_equal(Midline(4).mirrored(image), image[:, ::-1])


@pytest.mark.parametrize("offset", [0, 3, -4])
@pytest.mark.parametrize("has_lesion", [False, True])
def test_the_midline_of_a_head_that_lies_aside(offset: int, has_lesion: bool) -> None:
    generator = np.random.default_rng(1)
    half = generator.normal(5, 1, size=(12, 16, 14)).astype(np.float32)
    head = np.concatenate((half, half[::-1]))
    volume = np.zeros((1, 40, 16, 14), np.float32)
    volume[0, 8 + offset : 32 + offset] = head
    if has_lesion:
        volume[0, 10 + offset : 15 + offset, 4:9, 4:9] = 0
    assert find_midline(volume).total == 39 + 2 * offset


def test_an_empty_volume_is_cut_in_half() -> None:
    assert find_midline(np.zeros((1, 10, 4, 4), np.float32)).total == 9
