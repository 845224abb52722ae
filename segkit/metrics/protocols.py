"""Scoring protocols: the metrics of a region, and their values where a mask is empty.

| protocol    | source                | a region is scored                                       | rules in            |
|-------------|-----------------------|----------------------------------------------------------|---------------------|
| `legacy`    | BraTS 2017 to 2022    | as a whole                                               | this module         |
| `brats2023` | BraTS 2023 and 2024   | lesion by lesion; misses and false positives are worst   | `metrics.brats2023` |
| `brats2026` | BraTS 2026, panoptica | lesions matched one to one, detection apart from quality | `metrics.brats2026` |

The rules apply to any boolean masks, not only to tumours; only `brats2023` needs the challenge, because its thresholds
differ. *Absent* is a missing prediction that is scored with the worst values, also on regions that the reference lacks.
With a region of interest (the field of view of a retinal picture, the brain) both masks are cut to it, surfaces end at
its edge, and specificity counts only its voxels.

`legacy`: Dice, HD95, sensitivity and specificity are the official four. Precision, the normalised surface Dice (NSD,
tolerance = the smallest voxel spacing, hence 1 mm on BraTS) and, in 3D, both volumes in millilitres are added.

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

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from segkit.errors import RequestError
from segkit.metrics import brats2023, brats2026
from segkit.metrics.lesions import RegionPair, RegionScores, Scores
from segkit.metrics.overlap import Box, box_of, region_mask
from segkit.metrics.registry import METRICS
from segkit.metrics.surface import surface_distances
from segkit.shapes import LabelMap, Mask

BRATS_WORST_DISTANCE_MM = 373.13
"""sqrt(240^2 + 240^2 + 155^2) mm as BraTS rounds it: the HD95 of a region that exactly one of two masks has."""

_BRATS_REGIONS = frozenset({"WT", "TC", "ET"})


@dataclass(frozen=True)
class Rules:
    """How a protocol scores one region of one case, in one challenge.

    A missing prediction gets the `absent` metrics: `worst_mm` for distances, 0 for all others; a short table shows
    those of the `headline`. `worst_mm` is the distance where only one mask is empty, None for `worst_distance_mm`.
    `tissues` are regions of single tissues besides those that networks predict: name -> tissues of the label scheme.
    """

    score: Callable[[RegionPair], RegionScores]
    absent: tuple[str, ...]
    headline: tuple[str, ...]
    worst_mm: float | None = None
    tissues: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    needs_volumes: bool = False


@dataclass(frozen=True)
class Protocol:
    """A protocol and its rules by challenge; None is without a challenge, or for one without rules of its own."""

    name: str
    description: str
    rules: Mapping[str | None, Rules]


def rules_of(protocol: str, challenge: str | None) -> Rules:
    """The rules of a protocol in a challenge (gli, met, ...; None if unknown).

    Raises:
        RequestError: there is no such protocol, or it has no rules for the challenge.
    """
    if protocol not in PROTOCOLS:
        raise RequestError(f"unknown protocol {protocol!r}", expected=f"one of {', '.join(PROTOCOLS)}")
    rules = PROTOCOLS[protocol].rules
    found = rules.get(challenge, rules.get(None))
    if found is None:
        why = "it cannot be inferred from the case IDs" if challenge is None else f"there is none for {challenge!r}"
        raise RequestError(
            f"protocol {protocol!r} has rules by challenge, and {why}",
            expected=f"one of {', '.join(str(name) for name in rules)}",
            remedy="Name one with --challenge, or choose another --protocol",
        )
    return found


def score_case(
    prediction: LabelMap,
    reference: LabelMap,
    spacing_mm: Sequence[float],
    regions: Mapping[str, Collection[int]],
    protocol: str = "legacy",
    challenge: str | None = None,
    *,
    prediction_regions: Mapping[str, Collection[int]] | None = None,
    roi: Mask | None = None,
) -> dict[str, RegionScores]:
    """Scores of each region of one case: region name -> metrics and lesions.

    Args:
        prediction: (D, H, W) or (H, W) label values, as `reference`, on the same grid.
        reference: Label values.
        spacing_mm: Of each axis.
        regions: Region name -> its label values in the reference.
        protocol: A name of `PROTOCOLS`.
        challenge: Where a protocol has rules by challenge: gli, met, ped, men, men-rt, goat or ssa.
        prediction_regions: The same for the prediction, if that has another label scheme.
        roi: Region of interest, which alone is scored; None is the whole volume.

    Raises:
        RequestError: there is no such protocol, it has no rules for the challenge, or none for pictures.
    """
    rules = rules_of(protocol, challenge)
    if rules.needs_volumes and reference.ndim < 3:
        raise RequestError(f"protocol {protocol!r} scores volumes, and these are pictures", remedy="Choose another")
    worst_mm = rules.worst_mm or worst_distance_mm(regions, reference.shape, spacing_mm)
    judged = reference.size if roi is None else int(np.count_nonzero(roi))
    box = _box_of_either(prediction, reference)
    prediction, reference = np.ascontiguousarray(prediction[box]), np.ascontiguousarray(reference[box])
    roi = None if roi is None else roi[box]
    members = prediction_regions or regions
    scores = {}
    for name, values in regions.items():
        masks = region_mask(prediction, members[name]), region_mask(reference, values)
        predicted, present = masks if roi is None else (mask & roi for mask in masks)
        own = _box_of_either(predicted, present)
        cut = np.ascontiguousarray(predicted[own]), np.ascontiguousarray(present[own])
        scores[name] = rules.score(RegionPair(*cut, tuple(map(float, spacing_mm)), judged, worst_mm))
    return scores


def score_absent(
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    regions: Collection[str],
    protocol: str = "legacy",
    challenge: str | None = None,
) -> dict[str, Scores]:
    """Scores of a case without a prediction: the worst value of each metric in each region, 0 for counts."""
    rules = rules_of(protocol, challenge)
    worst_mm = rules.worst_mm or worst_distance_mm(regions, shape, spacing_mm)
    worst = {name: worst_mm if METRICS[name].is_distance else 0.0 for name in rules.absent}
    return {name: dict(worst) for name in regions}


def worst_distance_mm(regions: Collection[str], shape: Sequence[int], spacing_mm: Sequence[float]) -> float:
    """The HD95 of a region that only one mask has: 373.13 where WT, TC or ET is scored, else the diagonal in mm."""
    if not _BRATS_REGIONS.isdisjoint(regions):
        return BRATS_WORST_DISTANCE_MM
    return math.hypot(*(size * spacing for size, spacing in zip(shape, spacing_mm, strict=True)))


def _score_whole(pair: RegionPair) -> RegionScores:
    if pair.has_empty_mask:
        hd95_mm, nsd = pair.if_empty(0.0, pair.worst_mm), pair.if_empty(1.0, 0.0)
    else:
        distances = surface_distances(pair.prediction, pair.reference, pair.spacing_mm)
        hd95_mm, nsd = distances.hausdorff_mm(95.0), distances.surface_dice(min(pair.spacing_mm))
    overlap = pair.overlap_scores()
    return RegionScores({"dice": overlap["dice"], "hd95_mm": hd95_mm, "nsd": nsd, **overlap, **pair.volumes_ml()})


def _box_of_either(prediction: LabelMap | Mask, reference: LabelMap | Mask) -> Box:
    """The smallest box that holds all that is not 0 in either; one voxel if everything is 0."""
    return box_of(prediction | reference) or (slice(0, 1),) * reference.ndim


def _lesion_wise(lesion_rules: brats2023.LesionRules) -> Rules:
    score = partial(brats2023.score, rules=lesion_rules)
    return Rules(score, brats2023.ABSENT, brats2023.HEADLINE, brats2023.PENALTY_MM, needs_volumes=True)


def _panoptic(tissues: Mapping[str, tuple[str, ...]] | None = None) -> Rules:
    return Rules(brats2026.score, brats2026.ABSENT, brats2026.HEADLINE, brats2026.PENALTY_MM, tissues or {})


_WHOLE = ("dice", "hd95_mm", "nsd", "sensitivity", "precision", "specificity")
_WHOLE_ABSENT = ("hd95_mm", "dice", "nsd", "sensitivity", "precision", "specificity")
_GLIOMA_TISSUES = {"NETC": ("NCR", "NET"), "SNFH": ("ED",)}

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "legacy",
            "BraTS 2017 to 2022: Dice, HD95, sensitivity, specificity of whole regions; also precision, NSD, volumes",
            {None: Rules(_score_whole, _WHOLE_ABSENT, _WHOLE)},
        ),
        Protocol(
            "brats2023",
            "BraTS 2023 and 2024: lesion-wise Dice and HD95, in which misses and false positives count as the worst",
            {
                "gli": _lesion_wise(brats2023.GLIOMA),
                "ssa": _lesion_wise(brats2023.GLIOMA),
                "ped": _lesion_wise(brats2023.GLIOMA),
                "men": _lesion_wise(brats2023.MENINGIOMA),
                "met": _lesion_wise(brats2023.METASTASES),
            },
        ),
        Protocol(
            "brats2026",
            "BraTS 2026: lesions matched one to one, their F1, and Dice, HD95 and NSD of those matched and of all",
            {
                None: _panoptic(),
                "gli": _panoptic(_GLIOMA_TISSUES),
                "ssa": _panoptic(_GLIOMA_TISSUES),
                "met": Rules(
                    brats2026.score_metastases,
                    brats2026.METASTASES_ABSENT,
                    brats2026.METASTASES_HEADLINE,
                    brats2026.PENALTY_MM,
                ),
            },
        ),
    )
}
"""Every protocol by name."""
