"""Resampling without torch gives what torch's interpolation gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional

from segkit.preparing.resampling import nearest_neighbours, neighbours, resample_plane


@pytest.mark.parametrize(("old", "new"), [((5, 6, 7), (9, 4, 7)), ((8, 3, 5), (3, 8, 11)), ((6, 9), (13, 4))])
def test_equals_torch_interpolation_with_faces_aligned(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    plane = np.random.default_rng(0).normal(size=old).astype(np.float32)
    mode = {2: "bilinear", 3: "trilinear"}[len(old)]
    expected = functional.interpolate(torch.from_numpy(plane)[None, None], size=new, mode=mode)[0, 0].numpy()
    np.testing.assert_allclose(resample_plane(plane, new), expected, atol=2e-6)


def test_neighbours_of_a_doubled_axis_lie_a_quarter_from_the_old_centres() -> None:
    near = neighbours(3, 6)
    assert near.lower.tolist() == [0, 0, 0, 1, 1, 2]
    assert near.upper.tolist() == [1, 1, 1, 2, 2, 2]
    assert near.weight.tolist() == [0, 0.25, 0.75, 0.25, 0.75, 0.0]


@pytest.mark.parametrize(("old", "new"), [(2, 49), (4, 41), (2, 107), (6, 123), (7, 3), (3, 9)])
def test_nearest_voxels_are_those_of_torch_and_scipy(old: int, new: int) -> None:
    """Also halfway between two voxels, as at 24.5 * 2 / 49."""
    voxels = np.arange(old)
    of_torch = functional.interpolate(torch.from_numpy(voxels)[None, None].float(), new, mode="nearest-exact")[0, 0]
    place = old / new * (np.arange(new) + 0.5) - 0.5
    of_scipy = ndimage.map_coordinates(voxels.astype(np.float64), place[None], order=0, mode="nearest")
    np.testing.assert_array_equal(nearest_neighbours(old, new, np.float32).lower, of_torch)
    np.testing.assert_array_equal(nearest_neighbours(old, new, np.float64).lower, of_scipy)
