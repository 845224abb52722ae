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
organisers used on every grid; other data get the diagonal of their own volume. Specificity is 1 where the reference
fills the whole volume. On pictures, which have no spacing, a pixel is 1 mm.
"""

from __future__ import annotations

from segkit.metrics.lesions import RegionPair, RegionScores
from segkit.metrics.surface import surface_distances

HEADLINE = ("dice", "hd95_mm", "nsd", "sensitivity", "precision", "specificity")

ABSENT = ("hd95_mm", "dice", "nsd", "sensitivity", "precision", "specificity")
"""Metrics that a missing prediction gets."""


def score(pair: RegionPair) -> RegionScores:
    """The scores of one region by the table above."""
    if pair.has_empty_mask:
        hd95_mm, nsd = pair.if_empty(0.0, pair.worst_mm), pair.if_empty(1.0, 0.0)
    else:
        distances = surface_distances(pair.prediction, pair.reference, pair.spacing_mm)
        hd95_mm, nsd = distances.hausdorff_mm(95.0), distances.surface_dice(min(pair.spacing_mm))
    overlap = pair.overlap_scores()
    return RegionScores({"dice": overlap["dice"], "hd95_mm": hd95_mm, "nsd": nsd, **overlap, **pair.volumes_ml()})
