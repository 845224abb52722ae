"""Resampling to another spacing: linear for intensities, linear per label value for label maps.

Both use `torch.nn.functional.interpolate` with `align_corners=False`, which aligns the outer faces of the volume (not
the centres of its corner voxels), so that going there and back covers the same part of the patient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from segkit.shapes import Image, LabelMap

_LINEAR = {2: "bilinear", 3: "trilinear"}
_SAME_SPACING = 0.01
"""Spacings that differ by less than this fraction are taken as equal: headers are rounded."""


def resampled_shape(
    shape: Sequence[int], spacing_mm: Sequence[float], target_mm: Sequence[float] | None
) -> tuple[int, ...]:
    """Voxels per axis after resampling from `spacing_mm` to `target_mm`; axes within 1 % of the target keep theirs."""
    if target_mm is None:
        return tuple(shape)
    return tuple(
        size if abs(old - new) <= _SAME_SPACING * new else max(1, round(size * old / new))
        for size, old, new in zip(shape, spacing_mm, target_mm, strict=True)
    )


def resample_image(image: Image, shape: Sequence[int]) -> Image:
    """Linear resampling of (C, *spatial) to (C, *shape); the image itself where the shape is already right."""
    if image.shape[1:] == tuple(shape):
        return image
    resampled = np.empty((len(image), *shape), np.float32)
    for source, target in zip(image, resampled, strict=True):
        target[...] = _interpolate(torch.from_numpy(source), shape)
    return resampled


def resample_labels(labels: LabelMap, shape: Sequence[int]) -> LabelMap:
    """Resample (*spatial) to `shape`: each value's mask is resampled linearly and the largest wins.

    This gives smooth borders, unlike nearest neighbour, and never invents a value between two others. On a tie the
    smaller value wins.
    """
    if labels.shape == tuple(shape):
        return labels
    best = torch.full(tuple(shape), -1.0)
    resampled = torch.zeros(tuple(shape), dtype=torch.uint8)
    for value in np.flatnonzero(np.bincount(labels.ravel(), minlength=256)):
        share = _interpolate(torch.from_numpy((labels == value).astype(np.float32)), shape)
        is_better = share > best
        best[is_better] = share[is_better]
        resampled[is_better] = int(value)
    return resampled.numpy()


def _interpolate(plane: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    mode = _LINEAR[plane.ndim]
    return functional.interpolate(plane[None, None], size=tuple(shape), mode=mode, align_corners=False)[0, 0]
