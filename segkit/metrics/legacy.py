"""Protocol `legacy`, that of BraTS 2017 to 2022: one number per region over the whole volume.

Dice, HD95, sensitivity and specificity are the official four. Precision, the normalised surface Dice (NSD, tolerance =
the smallest voxel spacing, hence 1 mm on BraTS) and, in 3D, both volumes in millilitres are added. Empty masks:

| reference | prediction | dice | hd95_mm | nsd | sensitivity | precision | specificity |
|-----------|------------|------|---------|-----|-------------|-----------|-------------|
| empty     | empty      | 1    | 0       | 1   | 1           | 1         | 1           |
| empty     | present    | 0    | worst   | 0   | 0           | 0         | as computed |
| present   | empty      | 0    | worst   | 0   | 0           | 0         | 1           |
| no file   | or: absent | 0    | worst   | 0   | 0           | 0         | 0           |

*Worst* is 373.13 mm where WT, TC or ET is scored: the diagonal of the BraTS volume of 240 x 240 x 155 mm, which the
organisers used whatever the grid; any other data get the diagonal of their own volume. Specificity is 1 where the
reference fills the whole volume: nothing is left to be spared. On pictures, which have no spacing, a pixel is 1 mm.
"""

from __future__ import annotations

import math

from segkit.metrics.lesions import RegionPair, RegionScores, Scores
from segkit.metrics.overlap import dice, precision, sensitivity, specificity, volume_ml
from segkit.metrics.surface import surface_distances

HEADLINE = ("dice", "hd95_mm", "nsd", "sensitivity", "precision", "specificity")


def score(pair: RegionPair) -> RegionScores:
    """The scores of one region by the table above."""
    if pair.prediction.any() and pair.reference.any():
        distances = surface_distances(pair.prediction, pair.reference, pair.spacing_mm)
        hd95_mm, nsd = distances.hausdorff_mm(95.0), distances.surface_dice(min(pair.spacing_mm))
    else:
        hd95_mm, nsd = one_sided(pair, 0.0, pair.worst_mm), one_sided(pair, 1.0, 0.0)
    overlap = overlap_scores(pair)
    return RegionScores(
        {"dice": overlap["dice"], "hd95_mm": hd95_mm, "nsd": nsd, **overlap, **volumes_ml(pair)},
    )


def absent(worst_mm: float) -> Scores:
    """The scores of a region whose prediction was never handed in."""
    return {"hd95_mm": worst_mm, **dict.fromkeys(("dice", "nsd", "sensitivity", "precision", "specificity"), 0.0)}


def overlap_scores(pair: RegionPair) -> Scores:
    """Dice, sensitivity, precision and specificity by the table above."""
    if pair.prediction.any() and pair.reference.any():
        scores = {
            "dice": dice(pair.prediction, pair.reference),
            "sensitivity": sensitivity(pair.prediction, pair.reference),
            "precision": precision(pair.prediction, pair.reference),
        }
    else:
        scores = dict.fromkeys(("dice", "sensitivity", "precision"), one_sided(pair, 1.0, 0.0))
    spared = specificity(pair.prediction, pair.reference, pair.judged_voxels)
    return scores | {"specificity": 1.0 if math.isnan(spared) else spared}


def volumes_ml(pair: RegionPair) -> Scores:
    """Both volumes; pictures have none."""
    if pair.reference.ndim < 3:
        return {}
    return {
        "prediction_ml": volume_ml(pair.prediction, pair.spacing_mm),
        "reference_ml": volume_ml(pair.reference, pair.spacing_mm),
    }


def one_sided(pair: RegionPair, both_empty: float, one_empty: float) -> float:
    """What a metric is worth where at least one mask is empty."""
    return one_empty if pair.prediction.any() or pair.reference.any() else both_empty
