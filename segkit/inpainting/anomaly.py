"""Anomaly maps: how far a scan is from the healthy one that a network made up in its place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segkit.preparing.holes import brain_mask
from segkit.preparing.preprocessing import deviation_of_tissue
from segkit.shapes import Image

SMOOTHING_MM = 1.0
"""Standard deviation of the Gaussian: single voxels of noise are no finding."""

_TRUNCATED = 4.0
"""Standard deviations at which the Gaussian ends."""


def anomaly_map(
    image: Image,
    healthy: Image,
    hole: NDArray[np.bool_],
    spacing_mm: Sequence[float],
    smoothing_mm: float = SMOOTHING_MM,
) -> NDArray[np.float32]:
    """The difference of two images, |image - healthy|, smoothed, inside the brain.

    Each modality counts in units of its standard deviation over the brain outside the hole, so that sequences and
    scanners compare; of several modalities it is the mean.

    Args:
        image: The scan (C, *spatial), 0 outside the brain.
        healthy: The same with the hole made up, (C, *spatial).
        hole: Where it was made up, (*spatial).
        spacing_mm: Of the voxels.
        smoothing_mm: Standard deviation of the Gaussian; 0 leaves the difference as it is.

    Returns:
        (*spatial), 0 and above; 0 outside the brain and away from the hole.
    """
    result = np.zeros(hole.shape, np.float32)
    if not hole.any():
        return result
    sigma = [smoothing_mm / spacing for spacing in spacing_mm]
    (box,) = ndimage.find_objects(hole.astype(np.uint8))
    reach = [int(_TRUNCATED * one + 0.5) for one in sigma]
    near = tuple(slice(max(0, one.start - more), one.stop + more) for one, more in zip(box, reach, strict=True))
    part = np.zeros(result[near].shape, np.float32)
    for scan, made_up in zip(image, healthy, strict=True):
        difference = np.where(hole[near], np.abs(scan[near] - made_up[near]), np.float32(0))
        smooth = ndimage.gaussian_filter(difference, sigma, mode="constant", truncate=_TRUNCATED)
        part += smooth / deviation_of_tissue(np.where(hole, np.float32(0), scan))
    result[near] = part / len(image)
    result[~brain_mask((image != 0).any(0))] = 0
    return result
