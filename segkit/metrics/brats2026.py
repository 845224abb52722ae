"""Protocol `brats2026`, that of the package `brats-evaluation` 0.0.10 on `panoptica` 2.1.7, for BraTS 2026.

The 26-connected components of a region are its lesions, of any size. Those of prediction and reference are matched one
to one so that the sum of their Dice scores is largest; pairs without a common voxel are not matched (Kirillov et al.,
Panoptic Segmentation, CVPR 2019, with Dice for IoU and without its threshold). If two matchings have the same sum, as
when a plane cuts a lesion into equal halves, the package may take the other one.

- `lesion_tp`, `lesion_fp`, `lesion_fn`; precision, recall, and `lesion_f1`, the recognition quality RQ.
- `sq_*`, the segmentation quality: mean over *matched* lesions of Dice, HD95 in mm and NSD at a tolerance of the
  smallest spacing, each with its deviation over lesions. Misses and false positives do not lower it; the official
  table calls it `lesionwise_*` outside the metastases challenge. `pq_dice` = RQ x SQ.
- `dice`, `hd95_voxels`, `nsd_half_voxel`: the whole region. As in the original these ignore spacing: distances are in
  voxels, and the tolerance is half a voxel, so only the surface voxels that both masks have count.

HD95 is the percentile of both directions pooled, NSD the mean of both surfaces' shares; both differ from `legacy`.

The original applies spacings to the axes in reverse: its arrays are (z, y, x) and its spacings x, y, z. This is kept,
so that numbers are comparable. With anisotropic voxels, distances and NSD of lesions are therefore not exact; volumes
are right, and so is everything on a grid of 1 mm, as in most challenges.

Challenge `met` separates large lesions, of at least 20 mm^3, from small ones:

- `lesionwise_*`: mean and deviation over large lesions, with 0, 373 mm, 0 for each that has no match *and for every
  false positive* of the region, of any size.
- `large_lesion_*` and `small_lesion_*`: lesions of each size that were found, that is whose match has Dice of at least
  0.1, and missed; in both every false positive of the region counts. A match below 0.1 counts as missed here, but
  with its own scores in `lesionwise_*`.

All of these are undefined where the reference has no lesion of that size.

| reference | prediction | dice, nsd_half_voxel | hd95_voxels | sq_dice, sq_nsd, pq_dice | sq_hd95_mm | lesion_f1 |
|-----------|------------|----------------------|-------------|--------------------------|------------|-----------|
| empty     | empty      | undefined            | undefined   | undefined                | undefined  | undefined |
| empty     | present    | 0                    | 373         | 0                        | infinite   | 0         |
| present   | empty      | 0                    | 373         | 0                        | infinite   | 0         |
| present   | apart      | 0                    | 373         | 0                        | infinite   | 0         |
| no file   | or: absent | 0                    | 373         | 0                        | 373        | 0         |

| reference (met)       | prediction | lesionwise_dice | lesionwise_hd95_mm | large_lesion_f1 | small_lesion_f1 |
|-----------------------|------------|-----------------|--------------------|-----------------|-----------------|
| empty                 | any        | undefined       | undefined          | undefined       | undefined       |
| large, no small ones  | empty      | 0               | 373                | 0               | undefined       |
| small, no large ones  | empty      | undefined       | undefined          | undefined       | 0               |

Lesion precision is undefined without a predicted lesion, recall without a reference lesion; those of large and small
lesions are 0 instead. Undefined scores are left out of means; infinite ones are not.
"""

import math
from collections.abc import Sequence

import numpy as np

from segkit.metrics.lesions import (
    Lesion,
    RegionPair,
    RegionScores,
    Scores,
    box_around,
    components_of,
    match_one_to_one,
    overlaps,
)
from segkit.metrics.overlap import dice
from segkit.metrics.surface import surface_distances

_MEASURED = {"dice": 0.0, "hd95_mm": math.inf, "nsd": 0.0}
"""Scores of a matched lesion, and their values where none is matched."""

_COUNTED = ("tp", "fp", "fn", "precision", "recall", "f1")
_WHOLE = ("dice", "hd95_voxels", "nsd_half_voxel")

HEADLINE = ("dice", "hd95_voxels", "nsd_half_voxel", "sq_dice", "sq_hd95_mm", "sq_nsd", "lesion_f1")
METASTASES_HEADLINE = ("lesionwise_dice", "lesionwise_hd95_mm", "lesionwise_nsd", "lesion_f1", "small_lesion_f1")


def _lesion_names(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}_{name}{suffix}" for name in _MEASURED for suffix in ("", "_std"))


def _count_names(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}_{name}" for name in _COUNTED)


ABSENT = (*_WHOLE, *_count_names("lesion"), *_lesion_names("sq"), "pq_dice")
"""Metrics that a missing prediction gets, counts included."""

_SIZED_COUNTS = (*_count_names("large_lesion"), *_count_names("small_lesion"))
METASTASES_ABSENT = (*_lesion_names("lesionwise"), *ABSENT, *_SIZED_COUNTS)
PENALTY_MM = 373.0
"""The worst distance: the HD95 of a miss or a false positive."""
LARGE_LESION_MM3 = 20.0
FOUND_DICE = 0.1
"""Least Dice of a large or small lesion that counts as found."""
_LEAST_DICE = 1e-6
"""Least Dice of a match, and the value of one match more against a larger sum."""


def score(pair: RegionPair) -> RegionScores:
    """The scores of one region by the first table above, and each lesion of the reference."""
    lesions, predicted = _matched_lesions(pair)
    matched = [lesion for lesion in lesions if lesion.is_matched]
    counts = _detection("lesion", len(matched), predicted - len(matched), len(lesions) - len(matched))
    if matched:
        values = {name: [getattr(lesion, name) for lesion in matched] for name in _MEASURED}
    else:
        values = {name: [worst if lesions or predicted else math.nan] for name, worst in _MEASURED.items()}
    scores = {**_whole_scores(pair), **counts, **_means("sq", values, has_spread=bool(matched))}
    scores["pq_dice"] = scores["sq_dice"] * scores["lesion_f1"]
    return RegionScores(scores | pair.volumes_ml(), lesions)


def score_metastases(pair: RegionPair) -> RegionScores:
    """The scores of `score`, and those of large and of small lesions by the second table above."""
    scored = score(pair)
    false_positives = int(scored.scores["lesion_fp"])
    large = [lesion for lesion in scored.lesions if lesion.volume_mm3 >= LARGE_LESION_MM3]
    small = [lesion for lesion in scored.lesions if lesion.volume_mm3 < LARGE_LESION_MM3]
    scores = _lesionwise_scores(large, false_positives, pair.worst_mm) | scored.scores
    for prefix, lesions in (("large_lesion", large), ("small_lesion", small)):
        scores |= _sized_detection(prefix, lesions, false_positives)
    return RegionScores(scores, scored.lesions)


def _matched_lesions(pair: RegionPair) -> tuple[tuple[Lesion, ...], int]:
    """Each lesion of the reference, and the number of predicted ones."""
    predicted, lesions = components_of(pair.prediction), components_of(pair.reference)
    shared = overlaps(predicted, lesions)
    dices = {
        (lesion, prediction): 2 * voxels / int(lesions.voxels[lesion - 1] + predicted.voxels[prediction - 1])
        for (lesion, prediction), voxels in shared.items()
    }
    partners = match_one_to_one({ids: value for ids, value in dices.items() if value >= _LEAST_DICE}, bonus=_LEAST_DICE)
    voxel_mm3 = math.prod(pair.spacing_mm)
    entries = []
    for lesion, voxels in enumerate(lesions.voxels.tolist(), start=1):
        partner = partners.get(lesion)
        if partner is None:
            entries.append(Lesion(voxels, voxels * voxel_mm3, is_matched=False))
            continue
        box = box_around([lesions.boxes[lesion - 1], predicted.boxes[partner - 1]], pair.reference.shape)
        masks = predicted.mask(partner, box), lesions.mask(lesion, box)
        distances = surface_distances(*masks, pair.spacing_mm[::-1])  # in reverse, see above
        hd95_mm, nsd = distances.pooled_hausdorff_mm(95.0), distances.mean_surface_share(min(pair.spacing_mm))
        entries.append(Lesion(voxels, voxels * voxel_mm3, True, dices[lesion, partner], hd95_mm, nsd))
    return tuple(entries), predicted.count


def _whole_scores(pair: RegionPair) -> Scores:
    values: tuple[float, ...]
    if (pair.prediction & pair.reference).any():
        distances = surface_distances(pair.prediction, pair.reference, (1.0,) * pair.reference.ndim)
        overlap = dice(pair.prediction, pair.reference)
        values = (overlap, distances.pooled_hausdorff_mm(95.0), distances.mean_surface_share(0.5))
    else:
        values = tuple(pair.if_empty(math.nan, worst) for worst in (0.0, pair.worst_mm, 0.0))
    return dict(zip(_WHOLE, values, strict=True))


def _lesionwise_scores(large: Sequence[Lesion], false_positives: int, worst_mm: float) -> Scores:
    """Mean and deviation over large lesions, with the worst values for misses and false positives."""
    values = {name: [math.nan] for name in _MEASURED}
    if large:
        worst = dict(_MEASURED, hd95_mm=worst_mm)
        values = {
            name: [getattr(lesion, name) if lesion.is_matched else worst[name] for lesion in large]
            + [worst[name]] * false_positives
            for name in _MEASURED
        }
    return _means("lesionwise", values, has_spread=bool(large))


def _means(prefix: str, values: dict[str, list[float]], *, has_spread: bool) -> Scores:
    scores = {}
    for name, measured in values.items():
        scores[f"{prefix}_{name}"] = float(np.mean(measured))
        scores[f"{prefix}_{name}_std"] = float(np.std(measured)) if has_spread else math.nan
    return scores


def _detection(prefix: str, found: int, false_positives: int, missed: int) -> Scores:
    totals = ((1, found + false_positives), (1, found + missed), (2, 2 * found + false_positives + missed))
    precision, recall, f1 = (share * found / total if total else math.nan for share, total in totals)
    values = (float(found), float(false_positives), float(missed), precision, recall, f1)
    return dict(zip(_count_names(prefix), values, strict=True))


def _sized_detection(prefix: str, lesions: Sequence[Lesion], false_positives: int) -> Scores:
    """`_detection` of lesions of one size: all undefined where there are none, else 0 / 0 is 0."""
    found = sum((lesion.dice or 0.0) >= FOUND_DICE for lesion in lesions)
    scores = _detection(prefix, found, false_positives, len(lesions) - found)
    if not lesions:
        return dict.fromkeys(scores, math.nan)
    return {name: 0.0 if math.isnan(value) else value for name, value in scores.items()}
