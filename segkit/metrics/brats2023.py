"""Protocol `brats2023`, the lesion-wise scores of BraTS 2023 and 2024.

Written from the description of the challenge (Synapse syn51156910) and of its reference code:

1. The reference is dilated `dilations` times with 18 neighbours; the 26-connected components of the result, cut to the
   reference, are the lesions: parts that are closer to each other are one.
2. A lesion, dilated as often again, is found by every 26-connected component of the prediction that it touches, of any
   size. Dice and HD95 compare the undilated lesion with all of these components; one component may find several
   lesions. A lesion that none touches gets Dice 0 and HD95 374 mm.
3. Lesions of at most `ignored_mm3` are left out, found or not; a component that found one is not a false positive.
4. Lesion-wise Dice = sum of Dice / (lesions kept + false positives); HD95 likewise, with 374 mm for a false positive.

| reference               | prediction | lesionwise_dice | lesionwise_hd95_mm | dice | hd95_mm |
|-------------------------|------------|-----------------|--------------------|------|---------|
| empty                   | empty      | 1               | 0                  | 1    | 0       |
| empty                   | present    | 0               | 374                | 0    | 374     |
| present                 | empty      | 0               | 374                | 0    | 374     |
| ignored lesions only    | empty      | 1               | 0                  | 0    | 374     |
| ignored lesions only    | touching   | 1               | 0                  | by voxels | by surfaces |
| ignored lesions only    | elsewhere  | 0               | 374                | 0    | by surfaces |
| no file                 | or: absent | 0               | 374                | 0    | 374     |

The fourth and fifth line keep a peculiarity of the original: 0 / 0 counts as perfect, even if all was missed.

As in the original, dilations are in voxels, so on a grid other than 1 mm lesions merge at other distances. Volumes are
in mm^3 and distances in mm by the spacing of the grid, which agrees with the original at 1 mm. HD95 is measured between
surface elements (`element_hausdorff_mm`) and differs a little from that of `legacy`. `dice`, `hd95_mm`, `sensitivity`
and `specificity` are of the whole volume.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from segkit.metrics.lesions import Components, Lesion, RegionPair, RegionScores, box_around, components_of, indexed
from segkit.metrics.overlap import dice
from segkit.metrics.surface import element_hausdorff_mm
from segkit.shapes import Mask

HEADLINE = ("lesionwise_dice", "lesionwise_hd95_mm", "lesion_tp", "lesion_fp", "lesion_fn", "dice", "hd95_mm")
ABSENT = ("lesionwise_dice", "dice", "sensitivity", "specificity", "lesionwise_hd95_mm", "hd95_mm")
"""Metrics that a missing prediction gets."""
PENALTY_MM = 374.0
"""The worst distance: the HD95 of a missed lesion or a false positive, 1 mm more than the diagonal of BraTS."""


@dataclass(frozen=True)
class LesionRules:
    """How often the reference is dilated (voxels), and up to which volume its lesions are ignored."""

    dilations: int
    ignored_mm3: float


GLIOMA = LesionRules(dilations=3, ignored_mm3=50)
MENINGIOMA = LesionRules(dilations=1, ignored_mm3=50)
METASTASES = LesionRules(dilations=1, ignored_mm3=2)


def score(pair: RegionPair, rules: LesionRules) -> RegionScores:
    """The scores of one region of a volume by the table above, and its lesions with their own scores."""
    predicted = components_of(pair.prediction)
    lesions, found_by = _found_lesions(pair, predicted, rules)
    counted = [lesion for lesion in lesions if lesion.volume_mm3 > rules.ignored_mm3]
    matched = sum(lesion.is_matched for lesion in counted)
    false_positives = predicted.count - len(found_by)
    scored = len(counted) + false_positives
    dices = math.fsum(lesion.dice or 0.0 for lesion in counted)
    distances = math.fsum(pair.worst_mm if lesion.hd95_mm is None else lesion.hd95_mm for lesion in counted)
    if pair.has_empty_mask:
        hd95_mm = pair.if_empty(0.0, pair.worst_mm)
    else:
        hd95_mm = element_hausdorff_mm(pair.prediction, pair.reference, pair.spacing_mm)
    overlap = pair.overlap_scores()
    scores = {
        "lesionwise_dice": dices / scored if scored else 1.0,
        "lesionwise_hd95_mm": (distances + pair.worst_mm * false_positives) / scored if scored else 0.0,
        "lesion_tp": float(matched),
        "lesion_fp": float(false_positives),
        "lesion_fn": float(len(counted) - matched),
        "dice": overlap["dice"],
        "hd95_mm": hd95_mm,
        "sensitivity": overlap["sensitivity"],
        "specificity": overlap["specificity"],
        **pair.volumes_ml(),
    }
    return RegionScores(scores, tuple(lesions))


def _found_lesions(pair: RegionPair, predicted: Components, rules: LesionRules) -> tuple[list[Lesion], set[int]]:
    """Every lesion of the reference (without scores if ignored), and the predicted components that touch any."""
    # Within the box of both masks: two dilated parts that meet outside of it also meet inside.
    lesions = indexed(components_of(_dilated(pair.reference, rules.dilations)).ids * pair.reference)
    voxel_mm3 = math.prod(pair.spacing_mm)
    entries: list[Lesion] = []
    found_by: set[int] = set()
    for number, (voxels, own_box) in enumerate(zip(lesions.voxels.tolist(), lesions.boxes, strict=True), start=1):
        near = box_around([own_box], pair.reference.shape, margin=rules.dilations)
        around = _dilated(lesions.mask(number, near), rules.dilations)
        touching = np.setdiff1d(predicted.ids[near][around], 0).tolist()
        found_by.update(touching)
        volume_mm3 = voxels * voxel_mm3
        if not touching or volume_mm3 <= rules.ignored_mm3:
            entries.append(Lesion(voxels, volume_mm3, is_matched=bool(touching)))
            continue
        box = box_around([own_box, *(predicted.boxes[component - 1] for component in touching)], pair.reference.shape)
        lesion, prediction = lesions.mask(number, box), np.isin(predicted.ids[box], touching)
        distance = element_hausdorff_mm(prediction, lesion, pair.spacing_mm)
        entries.append(Lesion(voxels, volume_mm3, is_matched=True, dice=dice(prediction, lesion), hd95_mm=distance))
    return entries, found_by


def _dilated(mask: Mask, times: int) -> Mask:
    neighbours = ndimage.generate_binary_structure(mask.ndim, 2)
    return np.asarray(ndimage.binary_dilation(mask, neighbours, iterations=times))
