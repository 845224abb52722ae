"""Quality of probabilities: calibration errors, the Brier score, and the area under the ROC curve.

The expected calibration error (ECE) sorts voxels into bins by their probability and compares in each the mean
probability with the share of voxels in the region, weighted by their number (Naeini, Cooper & Hauskrecht, AAAI 2015;
for networks Guo et al., arXiv 1706.04599, section 2). The Brier score is the mean squared difference between
probability and truth (Brier, Monthly Weather Review 78, 1950); it also rewards separating the classes. Both are 0 at
best and 1 at worst. Each region is judged by its own probability.

Nearly all voxels of a volume are certain background, which makes both numbers small. Hence each is given twice, for all
voxels and for a box around the reference (`surrounding_box`). The box is our choice: it ignores the prediction, so that
all models are judged by the same voxels, and has twice the length of the region on each axis, so that in 3D at most
about an eighth of it is region. The average calibration error (ACE: Neumann, Zisserman & Vedaldi, 2018; for medical
segmentation Barfoot et al., arXiv 2506.03942) gives every bin the same weight; with few voxels in a bin it is noisy, so
it is better pooled over cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segkit.metrics.overlap import Box, box_of, fraction
from segkit.shapes import Mask

BINS = 15
"""As in Guo et al. (2017)."""

_SLAB_VOXELS = 1 << 20
_ROUNDING = 1e-6
"""Fixed-point numbers that are scaled in float32 may end as 1.0000001."""


@dataclass(frozen=True)
class Reliability:
    """Voxels by the bin of their probability; results of several cases can be added.

    `count` are the voxels of each bin, `present` those in the region and `total` the sum of their probabilities, each
    (bins,); `squared_error` is summed over all voxels.
    """

    count: NDArray[np.int64]
    present: NDArray[np.int64]
    total: NDArray[np.float64]
    squared_error: float

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    @property
    def edges(self) -> NDArray[np.float64]:
        """Where the bins begin and end, (bins + 1,); each holds its lower end, the last both."""
        return np.linspace(0.0, 1.0, len(self.count) + 1)

    @property
    def confidence(self) -> NDArray[np.float64]:
        """Mean probability of each bin, (bins,); NaN where it is empty."""
        return _shares(self.total, self.count)

    @property
    def frequency(self) -> NDArray[np.float64]:
        """Share of each bin's voxels that are in the region, (bins,); NaN where it is empty."""
        return _shares(self.present.astype(np.float64), self.count)

    def calibration_error(self) -> float:
        """The ECE, in [0, 1]; NaN where there are no voxels."""
        return fraction(float(np.abs(self.total - self.present).sum()), int(self.count.sum()))

    def average_calibration_error(self) -> float:
        """The ACE, in [0, 1]: as the ECE, but every bin that is not empty weighs the same; NaN where all are."""
        filled = self.count > 0
        gaps = np.abs(self.confidence[filled] - self.frequency[filled])
        return float(gaps.mean()) if len(gaps) else math.nan

    def brier_score(self) -> float:
        """Mean squared error of the probabilities, in [0, 1]; NaN where there are no voxels."""
        return fraction(self.squared_error, int(self.count.sum()))


def measure_reliability(
    probabilities: NDArray[np.floating[Any]], reference: Mask, where: Mask | None = None, *, bins: int = BINS
) -> Reliability:
    """Sort the voxels of one case by their probability, slab by slab, without a second copy of the volume.

    `probabilities` in [0, 1], (D, H, W) or (H, W); `where` are the voxels that count, all if None; `bins` of equal
    width.

    Raises:
        ValueError: a probability that counts is not in [0, 1].
    """
    result = Reliability(np.zeros(bins, np.int64), np.zeros(bins, np.int64), np.zeros(bins), 0.0)
    length, *others = probabilities.shape
    thickness = max(1, _SLAB_VOXELS // max(1, math.prod(others)))
    for start in range(0, length, thickness):
        slab = slice(start, start + thickness)
        counted = ... if where is None else where[slab]
        values, present = probabilities[slab][counted].ravel(), reference[slab][counted].ravel()
        if values.size and not (values.min() >= -_ROUNDING and values.max() <= 1 + _ROUNDING):
            raise ValueError(f"probabilities from {values.min():g} to {values.max():g} are not in [0, 1]")
        bin_of = np.minimum((values * bins).astype(np.intp), bins - 1)
        error = values - present
        result += Reliability(
            np.bincount(bin_of, minlength=bins),
            np.bincount(bin_of[present], minlength=bins),
            np.bincount(bin_of, values, minlength=bins).astype(np.float64, copy=False),
            float(np.square(error).sum(dtype=np.float64)),
        )
    return result


def surrounding_box(region: Mask) -> Box | None:
    """The box of a region, half as long again at both ends of each axis, cut to the image; None for an empty region."""
    if (box := box_of(region)) is None:
        return None
    margins = [-(-(side.stop - side.start) // 2) for side in box]
    return tuple(slice(max(0, s.start - margin), s.stop + margin) for s, margin in zip(box, margins, strict=True))


def _shares(parts: NDArray[np.float64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each part over its whole, NaN where that is 0."""
    shares = np.full(len(whole), np.nan)
    np.divide(parts, whole, out=shares, where=whole > 0)
    return shares


def area_under_roc(probabilities: NDArray[np.floating[Any]], reference: Mask) -> float:
    """Area under the receiver operating characteristic, exact, in [0, 1]; NaN where the reference is empty or full.

    It is the share of pairs of a voxel inside and a voxel outside the reference of which the one inside has the higher
    probability, pairs of equals counting half (Hanley & McNeil, Radiology 143, 1982, equation 1); 0.5 is chance. Finite
    values of any shape will do, logits too: only their order matters.
    """
    inside = np.sort(probabilities[reference])
    outside = np.sort(probabilities[~reference])
    if not inside.size or not outside.size:
        return math.nan
    # Below, and below or equal: half their sum counts equals by half, without a histogram that would bin them.
    lower = np.searchsorted(outside, inside, side="left").sum(dtype=np.int64)
    not_higher = np.searchsorted(outside, inside, side="right").sum(dtype=np.int64)
    return float(int(lower) + int(not_higher)) / (2 * inside.size * outside.size)
