"""How well probabilities rank voxels, whatever threshold is then chosen."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segkit.metrics.overlap import Mask


def area_under_roc(probabilities: NDArray[np.floating[Any]], reference: Mask) -> float:
    """Area under the receiver operating characteristic, exact, in [0, 1]; NaN where the reference is empty or full.

    It is the share of pairs of a voxel inside and a voxel outside the reference of which the one inside has the higher
    probability, pairs of equals counting half (Hanley & McNeil, Radiology 143, 1982, equation 1). Only the order of the
    values matters, so logits give what their probabilities give. 0.5 is chance.

    Args:
        probabilities: Any shape, finite.
        reference: Boolean, of the same shape.
    """
    inside = np.sort(probabilities[reference])
    outside = np.sort(probabilities[~reference])
    if not inside.size or not outside.size:
        return math.nan
    # Below, and below or equal: half their sum counts equals by half, without a histogram that would bin them.
    lower = np.searchsorted(outside, inside, side="left").sum(dtype=np.int64)
    not_higher = np.searchsorted(outside, inside, side="right").sum(dtype=np.int64)
    return float(int(lower) + int(not_higher)) / (2 * inside.size * outside.size)
