"""Scoring protocols: which metrics a region gets, and what they are worth where a mask is empty.

Protocol `legacy` is that of BraTS 2017 to 2022: per case and region Dice, HD95, sensitivity and specificity, over the
whole volume. Precision, the normalised surface Dice (NSD, tolerance = the smallest voxel spacing, hence 1 mm on BraTS)
and, in 3D, both volumes in millilitres are added to the official four. Its rules for empty masks:

| reference | prediction | dice | hd95_mm | nsd | sensitivity | precision | specificity |
|-----------|------------|------|---------|-----|-------------|-----------|-------------|
| empty     | empty      | 1    | 0       | 1   | 1           | 1         | 1           |
| empty     | present    | 0    | worst   | 0   | 0           | 0         | as computed |
| present   | empty      | 0    | worst   | 0   | 0           | 0         | 1           |
| no file   | or: absent | 0    | worst   | 0   | 0           | 0         | 0           |

*Absent* is a prediction that was never handed in, where the caller asks for it to be scored (`score_absent`): it earns
nothing, not even on regions that the reference lacks. *Worst* is 373.13 mm where WT, TC or ET is scored: the diagonal
of the BraTS volume of 240 x 240 x 155 mm, which the organisers used whatever the grid; any other data get the diagonal
of their own volume. Specificity is 1 where the reference fills the whole volume: nothing is left to be spared.
On pictures, which have no spacing, a pixel counts as 1 mm.

Inside a region of interest (the field of view of a retinal picture, the brain) both masks are cut to it, surfaces end
at its edge, and specificity counts its voxels alone: those outside are nobody's merit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from segkit.metrics.overlap import Mask, dice, precision, region_mask, sensitivity, specificity, volume_ml
from segkit.metrics.surface import surface_distances
from segkit.shapes import LabelMap

BRATS_WORST_DISTANCE_MM = 373.13
"""sqrt(240^2 + 240^2 + 155^2) mm as BraTS rounds it: the HD95 of a region that exactly one of two masks has."""

_BRATS_REGIONS = frozenset({"WT", "TC", "ET"})

Scores = dict[str, float]
"""Metric name -> value of one region of one case; lengths are in mm, volumes in ml, the others in [0, 1]."""


@dataclass(frozen=True)
class Protocol:
    """How one region of one case is scored.

    `score` takes prediction, reference, spacing in mm, the worst distance in mm, and the region of interest that both
    masks are cut to, None for the whole volume. `absent` gives the scores of a missing prediction from the worst
    distance in mm.
    """

    name: str
    description: str
    score: Callable[[Mask, Mask, Sequence[float], float, Mask | None], Scores]
    absent: Callable[[float], Scores]


def score_case(
    prediction: LabelMap,
    reference: LabelMap,
    spacing_mm: Sequence[float],
    regions: Mapping[str, Collection[int]],
    *,
    protocol: str = "legacy",
    prediction_regions: Mapping[str, Collection[int]] | None = None,
    roi: Mask | None = None,
) -> dict[str, Scores]:
    """Scores of each region of one case: region name -> metric name -> value.

    Args:
        prediction: (D, H, W) or (H, W) label values.
        reference: Label values on the same grid.
        spacing_mm: Voxel spacing of each axis in mm.
        regions: Region name -> label values of the reference that make it up.
        protocol: A name of `PROTOCOLS`.
        prediction_regions: The same where the prediction is written in another label scheme.
        roi: Region of interest on the same grid: only there is anything scored. None is the whole volume.
    """
    score = PROTOCOLS[protocol].score
    worst = worst_distance_mm(regions, reference.shape, spacing_mm)
    members = prediction_regions or regions
    scores = {}
    for name, values in regions.items():
        masks = region_mask(prediction, members[name]), region_mask(reference, values)
        predicted, present = masks if roi is None else (mask & roi for mask in masks)
        scores[name] = score(predicted, present, spacing_mm, worst, roi)
    return scores


def score_absent(
    shape: Sequence[int], spacing_mm: Sequence[float], regions: Collection[str], *, protocol: str = "legacy"
) -> dict[str, Scores]:
    """Scores of a case whose prediction was never handed in: the worst value of each metric in each region."""
    worst = worst_distance_mm(regions, shape, spacing_mm)
    return {name: PROTOCOLS[protocol].absent(worst) for name in regions}


def worst_distance_mm(regions: Collection[str], shape: Sequence[int], spacing_mm: Sequence[float]) -> float:
    """The HD95 of a region that only one mask has: 373.13 where WT, TC or ET is scored, else the diagonal in mm."""
    if not _BRATS_REGIONS.isdisjoint(regions):
        return BRATS_WORST_DISTANCE_MM
    return math.hypot(*(size * spacing for size, spacing in zip(shape, spacing_mm, strict=True)))


def _legacy(
    prediction: Mask, reference: Mask, spacing_mm: Sequence[float], worst_mm: float, roi: Mask | None
) -> Scores:
    is_predicted, is_present = bool(prediction.any()), bool(reference.any())
    if is_predicted and is_present:
        distances = surface_distances(prediction, reference, spacing_mm)
        scores = {
            "dice": dice(prediction, reference),
            "hd95_mm": distances.hausdorff_mm(95.0),
            "nsd": distances.surface_dice(min(spacing_mm)),
            "sensitivity": sensitivity(prediction, reference),
            "precision": precision(prediction, reference),
        }
    elif is_predicted or is_present:
        scores = {"dice": 0.0, "hd95_mm": worst_mm, "nsd": 0.0, "sensitivity": 0.0, "precision": 0.0}
    else:
        scores = {"dice": 1.0, "hd95_mm": 0.0, "nsd": 1.0, "sensitivity": 1.0, "precision": 1.0}
    judged = (prediction, reference) if roi is None else (prediction[roi], reference[roi])
    scores["specificity"] = 1.0 if judged[1].all() else specificity(*judged)
    if reference.ndim == 3:
        scores["prediction_ml"] = volume_ml(prediction, spacing_mm)
        scores["reference_ml"] = volume_ml(reference, spacing_mm)
    return scores


def _legacy_absent(worst_mm: float) -> Scores:
    shares = ("dice", "nsd", "sensitivity", "precision", "specificity")
    return {"hd95_mm": worst_mm, **dict.fromkeys(shares, 0.0)}


PROTOCOLS: dict[str, Protocol] = {
    "legacy": Protocol(
        "legacy",
        "BraTS 2017 to 2022: Dice, HD95, sensitivity and specificity of the whole volume; also precision, NSD, volumes",
        _legacy,
        _legacy_absent,
    ),
}
"""Every protocol by name."""
