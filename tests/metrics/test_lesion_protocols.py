"""The two lesion-wise protocols on lesions that can be counted on one hand: bars of voxels along the last axis."""

from __future__ import annotations

import math

import numpy as np
import pytest

from segkit.metrics import brats2023, brats2026
from segkit.metrics.lesions import RegionPair

SHAPE = (12, 12, 40)


def bars(*spans: tuple[int, int], row: int = 5) -> np.ndarray:
    """A mask with voxels [row, 5, start:stop] for every span."""
    mask = np.zeros(SHAPE, bool)
    for start, stop in spans:
        mask[row, 5, start:stop] = True
    return mask


def block(*corner: int, size: tuple[int, int, int]) -> np.ndarray:
    """A mask with one box of voxels."""
    mask = np.zeros(SHAPE, bool)
    mask[tuple(slice(start, start + length) for start, length in zip(corner, size, strict=True))] = True
    return mask


def pair(
    prediction: np.ndarray,
    reference: np.ndarray,
    *,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    worst_mm: float = brats2026.PENALTY_MM,
) -> RegionPair:
    """Both masks as a protocol is given them."""
    return RegionPair(prediction, reference, spacing_mm, math.prod(SHAPE), worst_mm)


def scores_2023(prediction, reference, rules=brats2023.METASTASES, **options):
    return brats2023.score(pair(prediction, reference, worst_mm=brats2023.PENALTY_MM, **options), rules).scores


def scores_2026(prediction, reference, **options):
    return brats2026.score_metastases(pair(prediction, reference, **options)).scores


def test_2023_all_parts_of_a_split_lesion_count_together():
    found = scores_2023(bars((2, 4), (6, 8)), bars((2, 8)))
    assert found["lesionwise_dice"] == 2 * 4 / (4 + 6)
    # Only the corners in the middle of the gap are not on the prediction, 1 mm off: 18 % of the lesion's surface.
    assert found["lesionwise_hd95_mm"] == 1
    assert (found["lesion_tp"], found["lesion_fp"], found["lesion_fn"]) == (1, 0, 0)


def test_2023_one_prediction_may_find_several_lesions():
    found = scores_2023(bars((2, 11)), bars((2, 5), (8, 11)))
    assert found["lesionwise_dice"] == 2 * 3 / (3 + 9)
    assert (found["lesion_tp"], found["lesion_fp"], found["lesion_fn"]) == (2, 0, 0)


def test_2023_lesions_close_together_are_one():
    reference = bars((2, 5), (8, 11))  # three voxels between them: they meet when dilated twice, not once
    apart, together = (
        scores_2023(bars((2, 11)), reference, brats2023.LesionRules(dilations, ignored_mm3=0)) for dilations in (1, 2)
    )
    assert (apart["lesion_tp"], together["lesion_tp"]) == (2, 1)
    assert together["lesionwise_dice"] == 2 * 6 / (6 + 9)


def test_2023_a_lesion_is_found_by_what_touches_it_dilated():
    touching, too_far = (scores_2023(bars((2, 6)), bars((start, start + 4))) for start in (6, 7))
    assert (touching["lesion_tp"], touching["lesion_fp"], touching["lesionwise_dice"]) == (1, 0, 0)
    assert (too_far["lesion_fn"], too_far["lesion_fp"], too_far["lesionwise_hd95_mm"]) == (1, 1, 374)


def test_2023_a_missed_lesion_counts_as_the_worst():
    found = scores_2023(bars((2, 6)), bars((2, 6), (20, 24)))
    assert (found["lesionwise_dice"], found["lesionwise_hd95_mm"]) == (1 / 2, 374 / 2)
    assert (found["lesion_tp"], found["lesion_fn"]) == (1, 1)


def test_2023_a_lesion_made_up_counts_as_the_worst_however_small():
    found = scores_2023(bars((2, 6), (20, 21)), bars((2, 6)))
    assert (found["lesionwise_dice"], found["lesionwise_hd95_mm"]) == (1 / 2, 374 / 2)
    assert (found["lesion_tp"], found["lesion_fp"]) == (1, 1)


def test_2023_a_lesion_of_just_the_ignored_volume_is_ignored():
    missed = [scores_2023(bars(), bars((2, 2 + voxels))) for voxels in (2, 3)]
    assert [found["lesionwise_dice"] for found in missed] == [1, 0]
    assert [found["lesion_fn"] for found in missed] == [0, 1]


def test_2023_what_found_an_ignored_lesion_is_no_false_positive():
    found = scores_2023(bars((2, 4), (20, 24)), bars((3, 5), (20, 24)))
    assert (found["lesion_tp"], found["lesion_fp"], found["lesionwise_dice"]) == (1, 0, 1)


def test_2023_volumes_and_distances_are_in_millimetres():
    halves = (1.0, 1.0, 0.5)
    missed = [scores_2023(bars(), bars((2, 2 + voxels)), spacing_mm=halves)["lesion_fn"] for voxels in (4, 5)]
    assert missed == [0, 1]  # 2 and 2.5 mm^3
    reference, shifted = (block(start, 2, 2, size=(3, 3, 3)) for start in (4, 5))
    assert scores_2023(shifted, reference, spacing_mm=(3.0, 1.0, 1.0))["lesionwise_hd95_mm"] == 3
    assert scores_2023(shifted, reference, spacing_mm=(1.0, 3.0, 1.0))["lesionwise_hd95_mm"] == 1


def test_2023_lesions_are_listed():
    first, second, third = brats2023.score(
        pair(bars((2, 6)), bars((2, 6), (12, 14), (20, 24))), brats2023.METASTASES
    ).lesions
    assert (first.voxels, first.is_matched, first.dice, first.hd95_mm) == (4, True, 1, 0)
    assert (second.voxels, second.is_matched, second.dice) == (2, False, None)
    assert (third.voxels, third.is_matched, third.dice, third.hd95_mm) == (4, False, None, None)


def test_2026_only_the_best_part_of_a_split_lesion_is_its_match():
    found = scores_2026(bars((2, 4), (5, 8)), bars((2, 8)))
    assert (found["lesion_tp"], found["lesion_fp"], found["lesion_fn"]) == (1, 1, 0)
    assert (found["lesion_precision"], found["lesion_recall"], found["lesion_f1"]) == (1 / 2, 1, 2 / 3)
    assert found["sq_dice"] == 2 * 3 / (3 + 6)
    assert found["pq_dice"] == pytest.approx(2 / 3 * 2 / 3)


def test_2026_one_prediction_over_two_lesions_finds_one():
    found = scores_2026(bars((2, 11)), bars((2, 5), (8, 11)))
    assert (found["lesion_tp"], found["lesion_fp"], found["lesion_fn"]) == (1, 0, 1)
    assert found["sq_dice"] == 2 * 3 / (3 + 9)  # the miss lowers F1 alone
    assert found["lesion_f1"] == 2 / 3


def test_2026_a_touch_is_no_match():
    found = scores_2026(bars((6, 9)), bars((2, 6)))
    assert (found["lesion_tp"], found["lesion_fp"], found["lesion_fn"]) == (0, 1, 1)
    assert (found["dice"], found["hd95_voxels"], found["sq_hd95_mm"]) == (0, 373, math.inf)


def test_2026_surfaces_of_a_lesion_and_of_the_whole():
    found = scores_2026(bars((3, 7)), bars((2, 6)))  # of 4 voxels on either side, 3 are on the other
    assert found["sq_dice"] == found["dice"] == 3 / 4
    assert found["sq_hd95_mm"] == found["hd95_voxels"] == 1  # of 8 distances, the two of 1 are the largest
    assert (found["sq_nsd"], found["nsd_half_voxel"]) == (1, 3 / 4)


def test_2026_spacing_counts_for_lesions_alone_and_in_reverse():
    along_last = scores_2026(bars((3, 7)), bars((2, 6)), spacing_mm=(5.0, 1.0, 2.0))
    assert (along_last["sq_hd95_mm"], along_last["hd95_voxels"]) == (5, 1)
    assert along_last["sq_nsd"] == 3 / 4  # 5 mm are more than the smallest spacing
    along_first = scores_2026(bars((2, 6), row=6), bars((2, 6)), spacing_mm=(5.0, 1.0, 2.0))
    assert math.isinf(along_first["sq_hd95_mm"])  # moved by its own thickness: nothing is shared
    reference, moved = (block(start, 2, 2, size=(3, 3, 3)) for start in (4, 5))
    assert scores_2026(moved, reference, spacing_mm=(5.0, 1.0, 2.0))["sq_hd95_mm"] == 2


def test_2026_large_lesions_pay_for_misses_and_for_everything_made_up():
    first, second = block(1, 1, 1, size=(5, 2, 2)), block(1, 6, 20, size=(5, 2, 2))
    found = scores_2026(first | bars((35, 36)), first | second)  # one exact, one missed, one voxel made up
    assert found["lesionwise_dice"] == found["lesionwise_nsd"] == 1 / 3
    assert found["lesionwise_hd95_mm"] == pytest.approx((0 + 373 + 373) / 3)
    assert found["lesionwise_dice_std"] == pytest.approx(math.sqrt(1 / 3 - 1 / 9))
    assert [found[f"large_lesion_{count}"] for count in ("tp", "fp", "fn", "f1")] == [1, 1, 1, 1 / 2]
    assert found["sq_dice"] == 1
    assert all(math.isnan(found[f"small_lesion_{count}"]) for count in ("tp", "fp", "fn", "precision", "recall", "f1"))


def test_2026_small_lesions_are_detected_or_not():
    found = scores_2026(bars((3, 7), (35, 36)), bars((2, 6), (20, 24)))
    assert [found[f"small_lesion_{count}"] for count in ("tp", "fp", "fn", "f1")] == [1, 1, 1, 1 / 2]
    assert all(math.isnan(found[f"lesionwise_{name}"]) for name in ("dice", "hd95_mm", "nsd"))
    assert math.isnan(found["large_lesion_f1"])


@pytest.mark.parametrize(
    ("lesion", "size", "prediction"),
    [
        ((5, 5, 5), (1, 1, 1), (3, 3, 3)),  # 2 * 1 / (1 + 27) = 0.07
        ((2, 2, 2), (5, 2, 2), (10, 10, 10)),  # 2 * 20 / (20 + 1000) = 0.04
    ],
)
def test_2026_a_match_below_a_tenth_of_dice_is_a_match_but_not_found(lesion, size, prediction):
    kind = "small" if size == (1, 1, 1) else "large"
    found = scores_2026(block(*(max(at - 1, 0) for at in lesion), size=prediction), block(*lesion, size=size))
    assert found["lesion_tp"] == 1
    assert (found[f"{kind}_lesion_tp"], found[f"{kind}_lesion_fn"], found[f"{kind}_lesion_f1"]) == (0, 1, 0)
    assert 0 < found["sq_dice"] < 0.1
    assert kind == "small" or found["lesionwise_dice"] == found["sq_dice"]


def test_2026_size_is_volume_and_not_voxels():
    lesion = block(2, 2, 2, size=(5, 2, 2))  # 20 voxels
    by_spacing = [scores_2026(lesion, lesion, spacing_mm=(1.0, 1.0, depth)) for depth in (1.0, 0.9)]
    assert [math.isnan(found["lesionwise_dice"]) for found in by_spacing] == [False, True]
    assert [found["small_lesion_tp"] for found in by_spacing] == pytest.approx([math.nan, 1], nan_ok=True)


def test_2026_lesions_are_listed():
    first, second = brats2026.score(pair(bars((3, 7)), bars((2, 6), (20, 24)), spacing_mm=(1.0, 1.0, 2.0))).lesions
    assert first.to_json() == {
        "voxels": 4,
        "volume_mm3": 8.0,
        "matched": True,
        "dice": 3 / 4,
        "hd95_mm": 1.0,
        "nsd": 1.0,
    }
    assert (second.voxels, second.is_matched, second.dice, second.hd95_mm, second.nsd) == (4, False, None, None, None)
