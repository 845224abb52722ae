"""Comparisons of models on a handful of cases by hand."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from segkit.errors import RequestError
from segkit.evaluation.comparison import compare_scores
from segkit.evaluation.score_files import ScoreSet


def score_set(name, cases, **others):
    """`cases` maps an id to (dice, hd95_mm) of the region WT, or to regions."""
    regions = {
        case: own if isinstance(own, dict) else {"WT": {"dice": own[0], "hd95_mm": own[1]}}
        for case, own in cases.items()
    }
    failed = frozenset(others.pop("failed", ()))
    patients = others.pop("patients", {case: case for case in (*cases, *failed)})
    values = {"protocol": "legacy", "challenge": None, "label_scheme": "brats2023", "roi": None} | others
    return ScoreSet(
        name=name, path=Path(name) / "scores.json", cases=regions, failed=failed, patients=patients, **values
    )


BASE = {"a": (0.8, 4.0), "b": (0.7, 3.0), "c": (0.6, 9.0)}
BETTER = {"a": (0.9, 3.0), "b": (0.5, 3.0), "c": (0.9, 5.0)}


def test_two_models_on_three_cases_by_hand():
    comparison = compare_scores([score_set("base", BASE), score_set("better", BETTER)])
    dice, hd95 = comparison.pairs
    assert (dice.model, dice.baseline, dice.region, dice.metric, dice.cases) == ("better", "base", "WT", "dice", 3)
    # +0.1, -0.2, +0.3: the three cases of test_paired.
    assert dice.difference == pytest.approx(0.2 / 3)
    assert (dice.model_mean, dice.baseline_mean) == (pytest.approx(2.3 / 3), pytest.approx(0.7))
    assert (dice.better, dice.equal, dice.worse) == (2, 0, 1)
    assert dice.test.p == 6 / 8
    assert dice.test.effect == pytest.approx(2 / 6)
    # -1, 0, -4 mm: of distances less is better.
    assert hd95.difference == pytest.approx(-5 / 3)
    assert (hd95.better, hd95.equal, hd95.worse) == (2, 1, 0)
    assert (hd95.test.p, hd95.test.effect, hd95.test.zeros) == (2 / 4, 1.0, 1)
    # One resample of 27 is three times a case, so the intervals reach from the least to the greatest difference.
    assert dice.interval == pytest.approx((-0.2, 0.3))
    assert hd95.interval == pytest.approx((-4.0, 0.0))
    # Holm: 2 x 0.5 and then 0.75, which may not be less.
    assert (hd95.p_holm, dice.p_holm) == (1.0, 1.0)


def test_ranking_by_hand():
    comparison = compare_scores([score_set("base", BASE), score_set("better", BETTER)])
    # Cumulative ranks of `better`: 1; Dice 2 and HD95 tied 1.5, so 1.75; 1.
    first, second = comparison.ranking
    assert (first.model, first.place, second.model, second.place) == ("better", 1, "base", 2)
    assert first.score == pytest.approx(3.75 / 3)
    assert second.score == pytest.approx(5.25 / 3)
    # Differences -1, 0.5, -1 sum to -1.5, which 2 of 8 patterns of signs reach: -1.5 and -2.5.
    (exchange,) = comparison.exchanges
    assert (exchange.model, exchange.baseline) == ("better", "base")
    assert exchange.p == 2 / 8
    assert exchange.difference == pytest.approx(-0.5)


def test_equal_models_share_a_place():
    comparison = compare_scores([score_set("one", BASE), score_set("two", BASE)])
    assert [(ranked.place, ranked.score) for ranked in comparison.ranking] == [(1, 1.5), (1, 1.5)]
    assert comparison.exchanges[0].p == 1.0
    assert [(pair.test.p, pair.p_holm, pair.test.effect, pair.equal) for pair in comparison.pairs] == [
        (1.0, 1.0, 0.0, 3)
    ] * 2


def test_failed_case_is_worst_in_the_ranking_and_not_tested():
    failing = score_set("failing", {"a": (0.9, 1.0), "b": (0.9, 1.0)}, failed=["c"])
    comparison = compare_scores([score_set("base", BASE), failing])
    assert comparison.cases == ("a", "b", "c")
    assert comparison.pairs[0].cases == 2
    ranks = {ranked.model: ranked.score for ranked in comparison.ranking}
    assert ranks == {"failing": pytest.approx(4 / 3), "base": pytest.approx(5 / 3)}
    assert any("failing has no scores of 1 case (c)" in note for note in comparison.notes)


def test_undefined_scores_tie_and_are_told():
    undefined = score_set("undefined", {"a": (0.9, math.nan), "b": (0.7, 3.0), "c": (0.6, 9.0)})
    comparison = compare_scores([score_set("base", BASE), undefined])
    assert [pair.cases for pair in comparison.pairs] == [3, 2]
    # Dice of case a is better, rank 1 against 2; all else ties.
    assert [ranked.score for ranked in comparison.ranking] == pytest.approx([(1.25 + 1.5 + 1.5) / 3, 4.75 / 3])
    assert any("undefined has undefined or infinite scores in 1 case:" in note for note in comparison.notes)


def test_only_common_cases_and_regions_are_compared():
    more = score_set("more", {**BETTER, "d": (0.1, 90.0)})
    comparison = compare_scores([score_set("base", BASE), more])
    assert comparison.cases == ("a", "b", "c")
    assert "left out: 1 case that not all models were given; compared: 3" in comparison.notes
    regions = {case: {"ET": {"dice": 1.0}, "WT": {"dice": 0.5, "hd95_mm": 1.0}} for case in "abc"}
    comparison = compare_scores([score_set("base", BASE), score_set("nested", regions)])
    assert comparison.regions == ("WT",)
    assert "regions that not all models have are left out: ET" in comparison.notes


def test_patients_are_the_unit():
    cases = {f"p{patient}-{visit}": (0.5 + 0.1 * patient, 2.0) for patient in range(3) for visit in range(2)}
    patients = {case: case[:2] for case in cases}
    better = {case: (dice + 0.1 + 0.05 * (case == "p2-1"), hd95) for case, (dice, hd95) in cases.items()}
    models = [score_set(name, own, patients=patients) for name, own in (("base", cases), ("better", better))]
    comparison = compare_scores(models)
    # Three patients, all better: 2 of 8 patterns of signs, and one exchange of 8; six cases would give 2/64 and 1/64.
    assert comparison.pairs[0].test.p == 2 / 8
    assert comparison.exchanges[0].p == 1 / 8
    assert comparison.patients == 3
    assert any("6 cases are of 3 patients" in note for note in comparison.notes)
    assert "of 3 patients no two-sided test can give p below 0.25" in comparison.notes


def test_a_failed_case_is_of_the_patient_that_other_models_know():
    patients = {"eye-L": "one", "eye-R": "one", "other": "two"}
    cases = dict.fromkeys(patients, (0.5, 2.0))
    failing = score_set("failing", {"eye-L": (0.5, 2.0), "other": (0.5, 2.0)}, failed=["eye-R"])
    assert compare_scores([failing, score_set("base", cases, patients=patients)]).patients == 3
    known = dict(patients, **{"eye-R": "eye-R"})
    failing = score_set("failing", failing.cases, failed=["eye-R"], patients=known)
    assert compare_scores([failing, score_set("base", cases, patients=patients)]).patients == 2


def test_lesion_wise_scores_come_first_and_others_on_request():
    regions = {
        case: {"WT": {"dice": 0.5, "hd95_mm": 1.0, "nsd": 0.4, "lesionwise_dice": 0.3, "lesionwise_hd95_mm": 5.0}}
        for case in "abc"
    }
    models = [score_set("one", regions), score_set("two", regions)]
    assert compare_scores(models).metrics == ("lesionwise_dice", "lesionwise_hd95_mm")
    assert compare_scores(models, ["nsd", "dice", "nsd"]).metrics == ("nsd", "dice")


def test_what_does_not_compare_is_refused():
    base = score_set("base", BASE)
    for others, complaint in (
        ({"protocol": "brats2023"}, r"different protocols cannot be compared \(base: legacy, other: brats2023\)"),
        ({"challenge": "met"}, r"different challenges cannot be compared \(base: none, other: met\)"),
        ({"label_scheme": "brats2018"}, "different label schemes"),
        ({"roi": ".gif"}, r"base: whole images, other: regions of interest"),
    ):
        with pytest.raises(RequestError, match=complaint):
            compare_scores([base, score_set("other", BETTER, **others)])
    with pytest.raises(RequestError, match="one model cannot be compared"):
        compare_scores([base])
    with pytest.raises(RequestError, match=r"no case in common \(base: a, other: x\)"):
        compare_scores([base, score_set("other", {"x": (0.5, 1.0)})])
    with pytest.raises(RequestError, match=r"no region in common \(base: WT; other: liver\)"):
        compare_scores([base, score_set("other", {"a": {"liver": {"dice": 0.5}}})])


def test_metrics_that_cannot_be_compared_are_refused():
    regions = {case: {"WT": {"dice": 0.5, "prediction_ml": 3.0}} for case in "abc"}
    models = [score_set("one", regions), score_set("two", regions)]
    with pytest.raises(RequestError, match="no Dice and HD95 in common"):
        compare_scores(models)
    with pytest.raises(RequestError, match="metric 'prediction_ml' has no better and worse; expected any of dice"):
        compare_scores(models, ["prediction_ml"])
    with pytest.raises(RequestError, match="metric 'nsd' is not in the scores of all models"):
        compare_scores(models, ["nsd"])


def test_different_references_are_noticed():
    one = {"a": {"WT": {"dice": 0.5, "hd95_mm": 1.0, "reference_ml": 3.0}}}
    two = {"a": {"WT": {"dice": 0.5, "hd95_mm": 1.0, "reference_ml": 4.0}}}
    with pytest.raises(RequestError, match=r"a: the references of WT have different volumes \(3.000, 4.000 ml\)"):
        compare_scores([score_set("one", one), score_set("two", two)])


def test_written_files_agree(tmp_path):
    comparison = compare_scores([score_set("base", BASE), score_set("better", BETTER)])
    comparison.write(tmp_path)
    document = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert document == comparison.to_json()
    assert document["ranking"][0]["model"] == "better"
    with (tmp_path / "comparison.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["metric"] for row in rows] == ["dice", "hd95_mm"]
    assert float(rows[1]["difference"]) == pytest.approx(-5 / 3)
    assert float(rows[1]["low"]) == -4.0
    page = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "| better | 1 | 1.250 | 1.000 to 1.750 | 0.250 |" in page
    assert "| better - base | WT | HD95 (mm) | -1.6667 | -4.0000 to +0.0000 | 2/1/0 | 0.500 | 1.000 | +1.00 |" in page
    assert "equal scores are left out" in page


def test_one_patient_gives_no_interval_and_says_so():
    models = [score_set("one", {"a": (0.5, 1.0)}), score_set("two", {"a": (0.6, 1.0)})]
    comparison = compare_scores(models)
    assert comparison.to_json()["pairs"][0]["ci95"] is None
    assert comparison.ranking_rows()[1][0][3] == "-"
    assert comparison.pair_rows()[1][0][4] == "-"
    assert comparison.pairs[0].test.p == 1.0
