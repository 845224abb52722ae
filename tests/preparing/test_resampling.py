"""Resampling without torch gives what torch's interpolation gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from segkit.preparing.resampling import neighbours, resample_plane


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
