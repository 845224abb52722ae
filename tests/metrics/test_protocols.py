"""The rules of each protocol, one test per row of their table, and the numbers of the BraTS tools."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from segkit.errors import RequestError
from segkit.metrics.protocols import PROTOCOLS, rules_of, score_absent, score_case, worst_distance_mm
from segkit.metrics.registry import METRICS
from segkit.reading.files import read_labels

MILLIMETRE = (1.0, 1.0, 1.0)
BRATS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
NOTHING = np.zeros((4, 4, 4), np.uint8)
PRESENT = NOTHING.copy()
PRESENT[1, 1, 1:3] = 3
SHARES = ("dice", "nsd", "sensitivity", "precision")


def scores_of(*case, **options):
    """Region -> metric -> value, without the lesions."""
    return {region: scored.scores for region, scored in score_case(*case, **options).items()}


def score(prediction, reference, regions=BRATS):
    return scores_of(prediction, reference, MILLIMETRE, regions)


def test_legacy_both_empty():
    scores = score(NOTHING, NOTHING)["ET"]
    assert [scores[name] for name in SHARES] == [1, 1, 1, 1]
    assert (scores["hd95_mm"], scores["specificity"]) == (0, 1)


def test_legacy_reference_empty():
    scores = score(PRESENT, NOTHING)["ET"]
    assert [scores[name] for name in SHARES] == [0, 0, 0, 0]
    assert scores["hd95_mm"] == 373.13
    assert scores["specificity"] == pytest.approx(62 / 64)


def test_legacy_prediction_empty():
    scores = score(NOTHING, PRESENT)["ET"]
    assert [scores[name] for name in SHARES] == [0, 0, 0, 0]
    assert (scores["hd95_mm"], scores["specificity"]) == (373.13, 1)


def test_legacy_prediction_absent():
    scores = score_absent((4, 4, 4), MILLIMETRE, BRATS)
    assert set(scores) == set(BRATS)
    assert [scores["WT"][name] for name in (*SHARES, "specificity")] == [0, 0, 0, 0, 0]
    assert scores["WT"]["hd95_mm"] == 373.13


def test_legacy_both_present():
    shifted = np.roll(PRESENT, 1, axis=2)  # voxels (1, 1, 1..2) against (1, 1, 2..3)
    scores = score(shifted, PRESENT)["WT"]
    assert [scores[name] for name in SHARES] == [0.5, 1.0, 0.5, 0.5]
    assert scores["hd95_mm"] == pytest.approx(0.95)  # distances 0 and 1 each way, 95 % of the way
    assert scores["specificity"] == pytest.approx(61 / 62)


def test_legacy_reference_everywhere():
    assert score(NOTHING, np.full_like(NOTHING, 3))["ET"]["specificity"] == 1


def test_volumes_are_in_millilitres_and_only_of_volumes():
    scores = scores_of(NOTHING, PRESENT, (10.0, 10.0, 10.0), BRATS)["ET"]
    assert (scores["prediction_ml"], scores["reference_ml"]) == (0, 2)
    assert "reference_ml" not in scores_of(NOTHING[0], PRESENT[1], (1.0, 1.0), BRATS)["ET"]


def test_tolerance_of_surface_dice_is_the_smallest_spacing():
    shifted = np.roll(PRESENT, 1, axis=0)
    assert scores_of(shifted, PRESENT, (2.0, 1.0, 1.0), BRATS)["ET"]["nsd"] == 0
    assert scores_of(shifted, PRESENT, (1.0, 2.0, 2.0), BRATS)["ET"]["nsd"] == 1


def test_worst_distance_of_other_data_is_their_diagonal():
    assert worst_distance_mm({"liver"}, (3, 2, 6), (1.0, 2.0, 2.0)) == pytest.approx(13)
    scores = score(PRESENT, NOTHING, {"lesion": (3,)})
    assert scores["lesion"]["hd95_mm"] == pytest.approx(math.sqrt(48))


def test_brats_diagonal_is_the_one_of_its_volume():
    assert worst_distance_mm({"ET"}, (9, 9, 9), MILLIMETRE) == 373.13
    assert worst_distance_mm({"liver"}, (240, 240, 155), MILLIMETRE) == pytest.approx(373.13, abs=0.002)


def test_prediction_in_another_scheme_is_read_by_its_own_values():
    earlier = np.where(PRESENT == 3, 4, PRESENT).astype(np.uint8)
    members = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
    scores = scores_of(earlier, PRESENT, MILLIMETRE, BRATS, prediction_regions=members)
    assert [scores[region]["dice"] for region in BRATS] == [1, 1, 1]


EVERY_RULE = [(protocol, challenge) for protocol in PROTOCOLS for challenge in PROTOCOLS[protocol].rules]


@pytest.mark.parametrize(("protocol", "challenge"), EVERY_RULE)
def test_every_protocol_gives_the_same_metrics_for_every_outcome_and_all_are_known(protocol, challenge):
    outcomes = [
        scores_of(prediction, reference, MILLIMETRE, BRATS, protocol=protocol, challenge=challenge)["WT"]
        for prediction, reference in ((NOTHING, NOTHING), (PRESENT, NOTHING), (NOTHING, PRESENT), (PRESENT, PRESENT))
    ]
    assert all(list(outcome) == list(outcomes[0]) for outcome in outcomes)
    absent = score_absent(NOTHING.shape, MILLIMETRE, BRATS, protocol=protocol, challenge=challenge)["WT"]
    rules = rules_of(protocol, challenge)
    assert set(absent) | set(rules.headline) <= set(outcomes[0]) <= set(METRICS)


@pytest.mark.parametrize(("protocol", "challenge"), EVERY_RULE)
def test_what_was_never_handed_in_is_worse_than_any_prediction(protocol, challenge):
    options = {"protocol": protocol, "challenge": challenge}
    absent = score_absent(NOTHING.shape, MILLIMETRE, BRATS, **options)["ET"]
    found = scores_of(PRESENT, PRESENT, MILLIMETRE, BRATS, **options)["ET"]
    ranked = [name for name in absent if METRICS[name].is_ranked and not math.isnan(found[name])]
    assert ranked
    for name in ranked:
        assert (absent[name] < found[name]) == METRICS[name].higher_is_better, name


APART = np.roll(PRESENT, 2, axis=0)
"""Two voxels, as in PRESENT, two planes away: they share none, and dilated once they do not meet PRESENT."""

OUTCOMES = {
    "empty, empty": (NOTHING, NOTHING),
    "empty, present": (NOTHING, PRESENT),  # reference, prediction
    "present, empty": (PRESENT, NOTHING),
    "present, apart": (PRESENT, APART),
    "present, present": (PRESENT, PRESENT),
}

UNDEFINED, INFINITE = math.nan, math.inf

RULES_FOR_EMPTY = [
    # protocol, challenge, outcome, metric -> value; PRESENT has two voxels and is ignored by gli, men and met of 2023
    ("legacy", None, "empty, empty", {"dice": 1, "hd95_mm": 0, "nsd": 1}),
    ("legacy", None, "empty, present", {"dice": 0, "hd95_mm": 373.13, "nsd": 0}),
    ("legacy", None, "present, empty", {"dice": 0, "hd95_mm": 373.13, "nsd": 0}),
    ("legacy", None, "present, apart", {"dice": 0, "hd95_mm": 2, "nsd": 0}),
    ("brats2023", "met", "empty, empty", {"lesionwise_dice": 1, "lesionwise_hd95_mm": 0, "dice": 1, "hd95_mm": 0}),
    (
        "brats2023",
        "met",
        "empty, present",
        {"lesionwise_dice": 0, "lesionwise_hd95_mm": 374, "dice": 0, "lesion_fp": 1},
    ),
    ("brats2023", "met", "present, empty", {"lesionwise_dice": 1, "lesionwise_hd95_mm": 0, "dice": 0, "hd95_mm": 374}),
    ("brats2023", "met", "present, apart", {"lesionwise_dice": 0, "lesionwise_hd95_mm": 374, "dice": 0, "hd95_mm": 2}),
    ("brats2023", "gli", "present, empty", {"lesionwise_dice": 1, "lesionwise_hd95_mm": 0, "lesion_fn": 0}),
    ("brats2023", "gli", "present, apart", {"lesionwise_dice": 1, "lesionwise_hd95_mm": 0, "lesion_fp": 0}),
    ("brats2023", "men", "present, present", {"lesionwise_dice": 1, "lesionwise_hd95_mm": 0, "lesion_tp": 0}),
    (
        "brats2026",
        "gli",
        "empty, empty",
        {"dice": UNDEFINED, "hd95_voxels": UNDEFINED, "sq_hd95_mm": UNDEFINED, "lesion_f1": UNDEFINED},
    ),
    ("brats2026", "gli", "empty, present", {"dice": 0, "hd95_voxels": 373, "sq_hd95_mm": INFINITE, "lesion_f1": 0}),
    ("brats2026", "gli", "present, empty", {"dice": 0, "hd95_voxels": 373, "sq_hd95_mm": INFINITE, "lesion_f1": 0}),
    ("brats2026", "gli", "present, apart", {"dice": 0, "hd95_voxels": 373, "sq_hd95_mm": INFINITE, "lesion_f1": 0}),
    ("brats2026", "gli", "present, empty", {"sq_dice": 0, "pq_dice": 0, "lesion_precision": UNDEFINED}),
    ("brats2026", "gli", "empty, present", {"sq_nsd": 0, "sq_dice_std": UNDEFINED, "lesion_recall": UNDEFINED}),
    ("brats2026", "met", "empty, present", {"lesionwise_dice": UNDEFINED, "small_lesion_f1": UNDEFINED}),
    ("brats2026", "met", "present, empty", {"lesionwise_dice": UNDEFINED, "small_lesion_f1": 0, "small_lesion_fn": 1}),
    ("brats2026", "met", "present, empty", {"small_lesion_precision": 0, "large_lesion_f1": UNDEFINED}),
]


@pytest.mark.parametrize(("protocol", "challenge", "outcome", "expected"), RULES_FOR_EMPTY)
def test_rules_for_empty_masks(protocol, challenge, outcome, expected):
    reference, prediction = OUTCOMES[outcome]
    scores = scores_of(prediction, reference, MILLIMETRE, BRATS, protocol=protocol, challenge=challenge)["ET"]
    assert {name: scores[name] for name in expected} == pytest.approx(expected, nan_ok=True)


def test_a_protocol_with_rules_by_challenge_says_which():
    with pytest.raises(RequestError, match="it cannot be inferred from the case IDs; expected one of gli, ssa, ped"):
        rules_of("brats2023", None)
    with pytest.raises(RequestError, match="there is none for 'goat'"):
        rules_of("brats2023", "goat")
    with pytest.raises(RequestError, match="unknown protocol 'brats1999'; expected one of legacy, brats2023"):
        rules_of("brats1999", "gli")


def test_pictures_have_lesions_but_no_surface_elements():
    mask = np.zeros((6, 6), np.uint8)
    mask[1, 1] = mask[2, 2] = mask[5, 5] = 1
    scores = scores_of(mask, mask, (1.0, 1.0), {"drusen": (1,)}, protocol="brats2026")["drusen"]
    assert (scores["lesion_tp"], scores["sq_dice"]) == (2, 1)  # corners connect
    with pytest.raises(RequestError, match="scores volumes, and these are pictures"):
        score_case(mask, mask, (1.0, 1.0), {"drusen": (1,)}, protocol="brats2023", challenge="met")


def test_where_masks_lie_in_the_volume_changes_nothing():
    moved = [np.pad(labels, 3) for labels in (np.roll(PRESENT, 1, axis=2), PRESENT)]
    for protocol, challenge in EVERY_RULE:
        options = {"protocol": protocol, "challenge": challenge}
        here = scores_of(np.roll(PRESENT, 1, axis=2), PRESENT, MILLIMETRE, BRATS, **options)["ET"]
        there = scores_of(*moved, MILLIMETRE, BRATS, **options)["ET"]
        assert {**there, "specificity": 0} == pytest.approx({**here, "specificity": 0}, nan_ok=True)


def official(folder, key):
    document = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    return {row["Labels"]: row for row in document["brats2023"][key]}


def test_numbers_of_the_brats_tool_on_a_glioma(shared_data):
    folder = shared_data / "brats2023_inpainting" / "BraTS-GLI-00001-000"
    prediction, _ = read_labels(folder / "seg-bratstoolkit_isen.nii.gz")
    reference, grid = read_labels(folder / "seg-BraTS23_1.nii.gz")
    spacing, members = grid.spacing_mm, {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
    scores = scores_of(prediction, reference, spacing, BRATS, prediction_regions=members)
    for region, expected in official(
        shared_data / "brats_metrics", "GLI GLI-00001-000_isen-vs-BraTS23_1.nii.gz"
    ).items():
        assert scores[region]["dice"] == pytest.approx(expected["Legacy_Dice"], abs=1e-9)
        assert scores[region]["hd95_mm"] == pytest.approx(expected["Legacy_HD95"], abs=1e-9)
        assert scores[region]["sensitivity"] == pytest.approx(expected["Sensitivity"], abs=1e-8)
        assert scores[region]["reference_ml"] == pytest.approx(expected["GT_Complete_Volume"] / 1000)
        assert scores[region]["specificity"] == pytest.approx(expected["Specificity"], abs=1e-9)


def test_numbers_of_the_brats_tool_on_metastases(shared_data):
    folder = shared_data / "brats_metrics"
    prediction, _ = read_labels(folder / "pred" / "BraTS-MET-00132-000.nii.gz")
    reference, grid = read_labels(folder / "ref" / "BraTS-MET-00132-000-seg.nii.gz")
    scores = scores_of(prediction, reference, grid.spacing_mm, BRATS)
    for region, expected in official(folder, "MET 00132-000").items():
        assert scores[region]["dice"] == pytest.approx(expected["Legacy_Dice"], abs=1e-9)
        assert scores[region]["sensitivity"] == pytest.approx(expected["Sensitivity"], abs=1e-8)
        assert scores[region]["specificity"] == pytest.approx(expected["Specificity"], abs=1e-9)
        # That tool weighs surface elements by area and lays them between voxels; far-away lesions show the difference.
        assert scores[region]["hd95_mm"] == pytest.approx(expected["Legacy_HD95"], rel=0.02)


def test_inside_a_region_of_interest_by_hand():
    reference, prediction = np.zeros((2, 4), np.uint8), np.zeros((2, 4), np.uint8)
    reference[0] = (1, 1, 0, 1)
    prediction[0] = (1, 0, 1, 0)
    roi = np.array([[True, True, True, False], [True, False, False, False]])
    scores = scores_of(prediction, reference, (1.0, 1.0), {"vessel": (1,)}, roi=roi)["vessel"]
    assert scores["dice"] == 2 * 1 / (2 + 2)  # the column left out holds a vessel that was missed
    assert (scores["sensitivity"], scores["precision"]) == (1 / 2, 1 / 2)
    assert scores["specificity"] == 1 / 2  # of two voxels inside that hold no vessel
    everywhere = scores_of(prediction, reference, (1.0, 1.0), {"vessel": (1,)})["vessel"]
    assert (everywhere["dice"], everywhere["specificity"]) == (2 * 1 / (2 + 3), 4 / 5)


def test_a_region_of_interest_decides_what_is_empty():
    roi = np.zeros(NOTHING.shape, bool)
    roi[3] = True
    assert scores_of(NOTHING, PRESENT, MILLIMETRE, BRATS, roi=roi)["ET"]["dice"] == 1
    everywhere = np.ones(NOTHING.shape, bool)
    assert scores_of(PRESENT, NOTHING, MILLIMETRE, BRATS, roi=everywhere) == score(PRESENT, NOTHING)
