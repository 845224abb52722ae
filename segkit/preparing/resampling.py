"""Resampling to another spacing: linear for intensities, linear per label value for label maps.

The outer faces of the volume are aligned (not the centres of its corner voxels), so that resampling in both directions
covers the same part of the patient; beyond the centres of the outermost voxels their values are repeated. This equals
`torch.nn.functional.interpolate` with `align_corners=False`, computed axis by axis and without torch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from segkit.shapes import Image, LabelMap

SAME_SPACING = 0.01  # spacings that differ by less than this fraction are taken as equal, since headers are rounded

TIE_DIGITS = 4
"""Decimals of a number of voxels before it is rounded: 13.4999996 and 13.5 (15 voxels of 0.9 mm in float32 and
float64) give the same shape."""


def resampled_shape(
    shape: Sequence[int], spacing_mm: Sequence[float], target_mm: Sequence[float] | None
) -> tuple[int, ...]:
    """Voxels per axis after resampling from `spacing_mm` to `target_mm`; axes within 1 % of the target keep theirs."""
    if target_mm is None:
        return tuple(shape)
    return tuple(
        size if abs(old - new) <= SAME_SPACING * new else max(1, round(round(size * old / new, TIE_DIGITS)))
        for size, old, new in zip(shape, spacing_mm, target_mm, strict=True)
    )


class Neighbours(NamedTuple):
    """Positions of the voxels of a resampled axis between the voxels `lower` and `upper` of the old axis.

    All are (new,); upper is at most one higher; weight is the weight of upper, in 0..1.
    """

    lower: NDArray[np.intp]
    upper: NDArray[np.intp]
    weight: NDArray[np.floating[Any]]


def nearest_neighbours(old: int, new: int, dtype: DTypeLike = np.float32) -> Neighbours:
    """The nearest of `old` voxels for each of `new` that cover the same length, as both neighbours.

    Halfway between two voxels rounding decides: that of scipy in float64, that of torch (nearest-exact) in float32.
    """
    scale = np.asarray(old, dtype) / np.asarray(new, dtype)
    place = np.asarray(np.float64(scale) * (np.arange(new) + 0.5) - 0.5, dtype)
    nearest = np.clip(np.floor(place + 0.5), 0, old - 1).astype(np.intp)
    return Neighbours(nearest, nearest, np.zeros(new, dtype))


def neighbours(old: int, new: int, dtype: DTypeLike = np.float32) -> Neighbours:
    """The neighbours of `new` voxels among `old` voxels that cover the same length in mm."""
    place = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    lower = place.astype(np.intp)
    return Neighbours(lower, np.minimum(lower + 1, old - 1), (place - lower).astype(dtype))


def resample_plane(plane: NDArray[np.float32], shape: Sequence[int]) -> NDArray[np.float32]:
    """Linear resampling of (*spatial) float32 to `shape`, one axis after the other, those that shrink most first."""
    factors = [new / old for old, new in zip(plane.shape, shape, strict=True)]
    for axis in sorted(range(plane.ndim), key=factors.__getitem__):
        if plane.shape[axis] != shape[axis]:
            plane = _resample_axis(plane, axis, shape[axis])
    return plane


def resample_image(image: Image, shape: Sequence[int]) -> Image:
    """Linear resampling of (C, *spatial) to (C, *shape); the image itself if it has this shape already."""
    if image.shape[1:] == tuple(shape):
        return image
    resampled = np.empty((len(image), *shape), np.float32)
    for source, target in zip(image, resampled, strict=True):
        target[...] = resample_plane(source, shape)
    return resampled


def resample_labels(labels: LabelMap, shape: Sequence[int]) -> LabelMap:
    """Resample (*spatial) to `shape`: the mask of each value is resampled linearly, and the largest wins.

    This gives smooth borders, unlike nearest neighbour, and no values between two others. On a tie the smaller wins.
    """
    if labels.shape == tuple(shape):
        return labels
    best = np.full(tuple(shape), -1, np.float32)
    resampled = np.zeros(tuple(shape), np.uint8)
    for value in np.flatnonzero(np.bincount(labels.ravel(), minlength=256)):
        share = resample_plane((labels == value).astype(np.float32), shape)
        is_better = share > best
        best[is_better] = share[is_better]
        resampled[is_better] = value
    return resampled


def _resample_axis(plane: NDArray[np.float32], axis: int, size: int) -> NDArray[np.float32]:
    """(*spatial) with `axis` resampled, slab by slab to keep temporary arrays small."""
    near = neighbours(plane.shape[axis], size)
    result = np.empty((*plane.shape[:axis], size, *plane.shape[axis + 1 :]), np.float32)
    weight = near.weight.reshape(-1, *(1,) * (plane.ndim - axis - 1))
    if axis == 0:
        for index in range(size):
            lower, upper = plane[near.lower[index]], plane[near.upper[index]]
            result[index] = lower + (upper - lower) * near.weight[index]
        return result
    for source, target in zip(plane, result, strict=True):
        lower = source.take(near.lower, axis - 1)
        step = source.take(near.upper, axis - 1)
        step -= lower
        step *= weight
        np.add(lower, step, out=target)
    return result
