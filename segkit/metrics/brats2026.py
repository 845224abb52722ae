"""Protocol `brats2026`, that of the package `brats-evaluation` 0.0.10 on `panoptica` 2.1.7, for BraTS 2026.

The 26-connected components of a region are its lesions, of whatever size. Those of prediction and reference are matched
one to one so that the sum of their Dice scores is largest; a pair that shares no voxel is no match (Kirillov et al.,
Panoptic Segmentation, CVPR 2019, with Dice for IoU and without its threshold). Where two matchings have the same sum,
as when a plane cuts a lesion into equal halves, the package may take the other one. From there:

- `lesion_tp`, `lesion_fp`, `lesion_fn`; precision, recall, and `lesion_f1`, the recognition quality RQ.
- `sq_*`, the segmentation quality: mean over *matched* lesions of Dice, HD95 in mm and NSD at a tolerance of the
  smallest spacing, each with its deviation over lesions. Neither misses nor false positives lower it; the official
  table calls it `lesionwise_*` outside the metastases challenge. `pq_dice` = RQ x SQ.
- `dice`, `hd95_voxels`, `nsd_half_voxel`: the whole region. As in the original these know no spacing: distances are in
  voxels, and the tolerance is half a voxel, which leaves the surface voxels that both masks have.

HD95 is the percentile of both directions pooled, NSD the mean of both surfaces' shares; both differ from `legacy`.

The original gives spacings to the axes in reverse: its arrays are (z, y, x) and its spacings x, y, z. So is it done
here, for else nobody's numbers could be compared. Where voxels are no cubes, the distances of lesions are thus not what
they are called, nor is NSD; volumes are right, and so is everything on a grid of 1 mm, as most challenges have it.

Challenge `met` parts large lesions, of at least 20 mm^3, from small ones:

- `lesionwise_*`: mean and deviation over large lesions, with 0, 373 mm, 0 for each that has no match *and for every
  false positive* of the region, of whatever size.
- `large_lesion_*` and `small_lesion_*`: lesions of each size that were found, that is whose match has Dice of at least
  0.1, and missed; in both every false positive of the region counts. A match below 0.1 counts as missed here, yet
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

Lesion precision is undefined where nothing is predicted, recall where nothing is there; those of large and small
lesions are 0 instead. Undefined scores are left out of means. Whatever is infinite is told apart from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from segkit.metrics.legacy import volumes_ml
from segkit.metrics.lesions import (
    Components,
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
"""What is measured on a matched lesion, and its worth where none is matched."""

HEADLINE = ("dice", "hd95_voxels", "nsd_half_voxel", "sq_dice", "sq_hd95_mm", "sq_nsd", "lesion_f1")

METASTASES_HEADLINE = ("lesionwise_dice", "lesionwise_hd95_mm", "lesionwise_nsd", "lesion_f1", "small_lesion_f1")

PENALTY_MM = 373.0
"""The worst distance: what HD95 counts for where something was missed or made up."""

LARGE_LESION_MM3 = 20.0
FOUND_DICE = 0.1
"""What the match of a large or small lesion has at least, to be counted as found."""

_LEAST_DICE = 1e-6
"""What a match has at least, and what a match more is worth against a larger sum."""

_COUNTED = ("tp", "fp", "fn", "precision", "recall", "f1")


def score(pair: RegionPair) -> RegionScores:
    """The scores of one region by the first table above, and each lesion of the reference."""
    predicted = components_of(pair.prediction)
    lesions = _matched_lesions(pair, predicted, components_of(pair.reference))
    matched = [lesion for lesion in lesions if lesion.is_matched]
    found, made_up, missed = len(matched), predicted.count - len(matched), len(lesions) - len(matched)
    counts = _detection("lesion", found, made_up, missed)
    scores = {**_whole_scores(pair), **counts, **_matched_scores(matched, is_empty=not lesions and not predicted.count)}
    scores["pq_dice"] = scores["sq_dice"] * scores["lesion_f1"]
    return RegionScores(scores | volumes_ml(pair), lesions)


def score_metastases(pair: RegionPair) -> RegionScores:
    """The scores of `score`, and those of large and of small lesions by the second table above."""
    scored = score(pair)
    made_up = int(scored.scores["lesion_fp"])
    large = [lesion for lesion in scored.lesions if lesion.volume_mm3 >= LARGE_LESION_MM3]
    small = [lesion for lesion in scored.lesions if lesion.volume_mm3 < LARGE_LESION_MM3]
    return RegionScores(
        {
            **_lesionwise_scores(large, made_up, pair.worst_mm),
            **scored.scores,
            **_sized_detection("large_lesion", large, made_up),
            **_sized_detection("small_lesion", small, made_up),
        },
        scored.lesions,
    )


def absent(worst_mm: float) -> Scores:
    """The scores of a region whose prediction was never handed in: zeros, also for counts, and 373 for distances."""
    whole = {"dice": 0.0, "hd95_voxels": worst_mm, "nsd_half_voxel": 0.0}
    return whole | _absent_detection("lesion") | _absent_lesions("sq", worst_mm) | {"pq_dice": 0.0}


def absent_metastases(worst_mm: float) -> Scores:
    """The same, with large and small lesions."""
    sized = _absent_detection("large_lesion") | _absent_detection("small_lesion")
    return _absent_lesions("lesionwise", worst_mm) | absent(worst_mm) | sized


def _absent_lesions(prefix: str, worst_mm: float) -> Scores:
    return _means(prefix, {name: [worst_mm if name == "hd95_mm" else 0.0] for name in _MEASURED}, has_spread=True)


def _absent_detection(prefix: str) -> Scores:
    return {f"{prefix}_{name}": 0.0 for name in _COUNTED}


def _matched_lesions(pair: RegionPair, predicted: Components, lesions: Components) -> tuple[Lesion, ...]:
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
        entries.append(
            Lesion(
                voxels,
                voxels * voxel_mm3,
                is_matched=True,
                dice=dices[lesion, partner],
                hd95_mm=distances.pooled_hausdorff_mm(95.0),
                nsd=distances.mean_surface_share(min(pair.spacing_mm)),
            )
        )
    return tuple(entries)


def _whole_scores(pair: RegionPair) -> Scores:
    if (pair.prediction & pair.reference).any():
        distances = surface_distances(pair.prediction, pair.reference, (1.0,) * pair.reference.ndim)
        values = (
            dice(pair.prediction, pair.reference),
            distances.pooled_hausdorff_mm(95.0),
            distances.mean_surface_share(0.5),
        )
    elif pair.prediction.any() or pair.reference.any():
        values = (0.0, pair.worst_mm, 0.0)
    else:
        values = (math.nan, math.nan, math.nan)
    return dict(zip(("dice", "hd95_voxels", "nsd_half_voxel"), values, strict=True))


def _matched_scores(matched: Sequence[Lesion], *, is_empty: bool) -> Scores:
    """Mean and deviation over matched lesions of what was measured on each."""
    if matched:
        values = {name: [getattr(lesion, name) for lesion in matched] for name in _MEASURED}
    elif is_empty:
        values = {name: [math.nan] for name in _MEASURED}
    else:
        values = {name: [worst] for name, worst in _MEASURED.items()}
    return _means("sq", values, has_spread=bool(matched))


def _lesionwise_scores(large: Sequence[Lesion], made_up: int, worst_mm: float) -> Scores:
    """Mean and deviation over large lesions, with the worst values for what was missed or made up."""
    values = {name: [math.nan] for name in _MEASURED}
    if large:
        worst = dict(_MEASURED, hd95_mm=worst_mm)
        values = {
            name: [getattr(lesion, name) if lesion.is_matched else worst[name] for lesion in large]
            + [worst[name]] * made_up
            for name in _MEASURED
        }
    return _means("lesionwise", values, has_spread=bool(large))


def _means(prefix: str, values: dict[str, list[float]], *, has_spread: bool) -> Scores:
    scores = {}
    for name, measured in values.items():
        scores[f"{prefix}_{name}"] = float(np.mean(measured))
        scores[f"{prefix}_{name}_std"] = float(np.std(measured)) if has_spread else math.nan
    return scores


def _detection(prefix: str, found: int, made_up: int, missed: int) -> Scores:
    return {
        f"{prefix}_tp": float(found),
        f"{prefix}_fp": float(made_up),
        f"{prefix}_fn": float(missed),
        f"{prefix}_precision": found / (found + made_up) if found + made_up else math.nan,
        f"{prefix}_recall": found / (found + missed) if found + missed else math.nan,
        f"{prefix}_f1": 2 * found / (2 * found + made_up + missed) if found + made_up + missed else math.nan,
    }


def _sized_detection(prefix: str, lesions: Sequence[Lesion], made_up: int) -> Scores:
    """`_detection` of lesions of one size: all undefined where there are none, else a quotient of nothing is 0."""
    found = sum((lesion.dice or 0.0) >= FOUND_DICE for lesion in lesions)
    scores = _detection(prefix, found, made_up, len(lesions) - found)
    if not lesions:
        return dict.fromkeys(scores, math.nan)
    return {name: 0.0 if math.isnan(value) else value for name, value in scores.items()}
