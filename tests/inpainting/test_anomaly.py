"""Anomaly maps whose numbers can be worked out by hand."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from segkit.inpainting.inpaint import anomaly_map

SHAPE = (12, 12, 12)


def brain(low: float = 1.0, high: float = 3.0) -> np.ndarray:
    """A block of 10 voxels a side, half of it `low` and half `high`, 0 around it; (1, *SHAPE)."""
    image = np.zeros((1, *SHAPE), np.float32)
    image[0, 1:11, 1:11, 1:6] = low
    image[0, 1:11, 1:11, 6:11] = high
    return image


def test_difference_in_deviations_of_the_brain() -> None:
    image = brain()  # mean 2, deviation 1
    healthy, hole = image.copy(), np.zeros(SHAPE, bool)
    hole[4, 4, 5:7] = True  # one voxel of each half, so that the rest is in balance
    healthy[0, 4, 4, 5:7] = (1.5, 1.0)
    found = anomaly_map(image, healthy, hole, (1.0, 1.0, 1.0), smoothing_mm=0)
    assert found.dtype == np.float32
    assert found[4, 4, 5:7].tolist() == [0.5, 2.0]
    assert np.count_nonzero(found) == 2
    wide = anomaly_map(brain(2, 6), 2 * healthy, hole, (1.0, 1.0, 1.0), smoothing_mm=0)
    assert np.array_equal(wide, found)


def test_several_modalities_count_alike() -> None:
    one, other = brain(), brain(10, 30)
    image = np.concatenate((one, other))
    hole = np.zeros(SHAPE, bool)
    hole[4, 4, 5:7] = True
    healthy = image.copy()
    healthy[0, 4, 4, 5] += 1  # 1 deviation
    healthy[1, 4, 4, 5] -= 30  # 3 deviations
    assert anomaly_map(image, healthy, hole, (1.0, 1.0, 1.0), smoothing_mm=0)[4, 4, 5] == 2.0


def test_smoothing_is_in_millimetres_and_stays_in_the_brain() -> None:
    image = brain()
    healthy, hole = image.copy(), np.zeros(SHAPE, bool)
    hole[1, 5, 5:7] = True  # at the surface
    healthy[0, 1, 5, 5:7] += 8.0
    spacing = (1.0, 2.0, 4.0)
    found = anomaly_map(image, healthy, hole, spacing)
    difference = np.zeros(SHAPE)
    difference[1, 5, 5:7] = 8.0
    expected = ndimage.gaussian_filter(difference, [1.0, 0.5, 0.25], mode="constant")
    np.testing.assert_allclose(found, np.where(image[0] != 0, expected, 0), atol=1e-6)
    assert found[0].max() == 0
    assert found[2, 5, 5] > found[1, 6, 5] > found[1, 5, 4]


def test_nothing_missing_is_no_anomaly() -> None:
    found = anomaly_map(brain(), brain(), np.zeros(SHAPE, bool), (1.0, 1.0, 1.0))
    assert found.shape == SHAPE
    assert not found.any()
