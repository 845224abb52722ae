"""What protocols score and what they give back: one region of one case."""

from __future__ import annotations

from dataclasses import dataclass

from segkit.metrics.lesions import Lesion
from segkit.metrics.overlap import Mask

Scores = dict[str, float]
"""Metric name -> value of one region of one case; `segkit.metrics.facts` has the units. NaN is undefined."""


@dataclass(frozen=True)
class RegionPair:
    """Prediction and reference of one region, cut to the box that holds both: nothing but False was cut away.

    Attributes:
        prediction: (D, H, W) or (H, W).
        reference: The same shape.
        spacing_mm: Voxel spacing of each axis.
        judged_voxels: How many voxels were judged before the cut: those of the volume or of the region of interest.
        worst_mm: What a distance to nothing counts for in this protocol.
    """

    prediction: Mask
    reference: Mask
    spacing_mm: tuple[float, ...]
    judged_voxels: int
    worst_mm: float


@dataclass(frozen=True)
class RegionScores:
    """Scores of one region, and its lesions where the protocol looks at single ones."""

    scores: Scores
    lesions: tuple[Lesion, ...] = ()
