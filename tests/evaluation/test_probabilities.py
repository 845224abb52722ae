"""Probabilities beside masks: how they are found, and their ranking and calibration by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from segkit.errors import RequestError
from segkit.evaluation.probabilities import find_probabilities
from segkit.evaluation.score_folder import evaluate_folders
from segkit.report.figures import reliability_figure
from tests.evaluation.eyes import PROBABILITIES, REFERENCE, cases, save, write_eyes


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return write_eyes(tmp_path)


def test_without_a_region_of_interest_everything_counts(folders):
    masks, data = folders
    document = evaluate_folders(masks, data, probabilities=masks).to_json()
    scores = document["cases"][0]["regions"]["foreground"]
    assert document["roi"] is None
    assert (scores["dice"], scores["specificity"]) == (2 / 5, 4 / 5)
    # Of the 3 x 5 pairs 0.9 wins 5, 0.4 wins against 0.2 alone, 0.1 wins none.
    assert scores["auc"] == pytest.approx(6 / 15)
    assert "auc" not in evaluate_folders(masks, data).cases[0].regions["foreground"]


def test_missing_prediction_has_the_worst_area_too(folders):
    masks, data = folders
    (masks / "Image_01R.png").unlink()
    evaluation = evaluate_folders(masks, data, roi=".gif", probabilities=masks, missing="zero")
    assert [case.regions["foreground"]["auc"] for case in evaluation.cases] == [0.75, 0.0]
    assert evaluation.cases[1].regions["foreground"]["ece"] == 1.0


def test_area_is_undefined_where_the_region_is_empty(folders):
    masks, data = folders
    save(data / "Image_01L_1stHO.png", np.zeros((2, 4), bool))
    case = evaluate_folders(masks, data, probabilities=masks).to_json()["cases"][0]
    assert case["regions"]["foreground"]["auc"] is None


def test_calibration_inside_a_field_of_view_by_hand(folders):
    masks, data = folders
    evaluation = evaluate_folders(masks, data, roi=".gif", probabilities=masks / "probabilities")
    scores = evaluation.cases[0].regions["foreground"]
    # Inside: 0.9 and 0.4 in the vessel, 0.6 and 0.2 outside, each in a bin of its own.
    assert scores["ece"] == pytest.approx((0.1 + 0.6 + 0.6 + 0.2) / 4)
    assert scores["brier"] == pytest.approx((0.01 + 0.36 + 0.36 + 0.04) / 4)
    # The vessel there is two pixels long and one wide; its box, grown by one, leaves out nothing of the field of view.
    assert scores["ece_box"] == pytest.approx(scores["ece"])


def test_box_leaves_out_what_lies_far_from_the_reference(folders):
    masks, data = folders
    far = np.zeros((2, 4), np.float32)
    far[:, 0] = 1
    for side in "LR":
        save(data / f"Image_01{side}_1stHO.png", np.array([[0, 0, 0, 1], [0, 0, 0, 0]], bool))
        save(masks / "probabilities" / f"Image_01{side}_foreground.tif", far)
    scores = evaluate_folders(masks, data, probabilities=masks).cases[0].regions["foreground"]
    # All: two false certainties and one missed pixel of 8. Columns 2 and 3: the missed pixel of 4.
    assert (scores["ece"], scores["brier"]) == (pytest.approx(1 / 8 + 2 / 8), pytest.approx(3 / 8))
    assert (scores["ece_box"], scores["brier_box"]) == (pytest.approx(1 / 4), pytest.approx(1 / 4))


def test_reliability_is_pooled_over_cases_and_drawn(tmp_path, folders):
    masks, data = folders
    evaluation = evaluate_folders(masks, data, roi=".gif", probabilities=masks)
    table = evaluation.to_json()["reliability"]["foreground"]["whole"]
    assert (table["edges"][0], table["edges"][-1], len(table["edges"])) == (0.0, 1.0, 16)
    # Two eyes with 0.2, 0.4, 0.6 and 0.9, in bins 3, 6 (0.4 is a little more in float32), 9 and 13.
    assert {index: count for index, count in enumerate(table["count"]) if count} == {3: 2, 6: 2, 9: 2, 13: 2}
    assert [table["frequency"][index] for index in (3, 6, 9, 13)] == [0, 1, 0, 1]
    assert table["confidence"][13] == pytest.approx(0.9)
    assert table["confidence"][0] is None
    assert table["ece"] == pytest.approx(0.375)
    reliability_figure(tmp_path / "out" / "figures" / "reliability.png", evaluation.reliability)
    with PIL.Image.open(tmp_path / "out" / "figures" / "reliability.png") as picture:
        assert min(picture.size) > 300
    assert evaluate_folders(masks, data).to_json()["reliability"] == {}


def test_numbers_that_are_no_probabilities_are_ranked_only(folders, caplog):
    masks, data = folders
    for side in "LR":
        save(masks / "probabilities" / f"Image_01{side}_foreground.tif", 10 * PROBABILITIES)
    evaluation = evaluate_folders(masks, data, probabilities=masks)
    scores = evaluation.cases[0].regions["foreground"]
    assert scores["auc"] == pytest.approx(6 / 15)
    assert math.isnan(scores["ece"])
    assert evaluation.to_json()["reliability"] == {}
    assert "no calibration, as the probabilities from 1 to 9 are not in [0, 1]" in caplog.text


def test_probabilities_are_found_by_case_and_region(tmp_path):
    for name in ("a_ET.tif", "b_ET.tif", "b_WT.tif", "b.png", "c_ET.tif"):
        save(tmp_path / name, PROBABILITIES if name.endswith("tif") else REFERENCE)
    found = find_probabilities(cases("a", "b"), ("WT", "TC", "ET"), tmp_path)
    assert {case: sorted(own) for case, own in found.items()} == {"a": ["ET"], "b": ["ET", "WT"]}
    with pytest.raises(
        RequestError, match=r"holds no probabilities of these cases: found a_ET\.tif.* such as z_WT\.tif"
    ):
        find_probabilities(cases("z"), ("WT",), tmp_path)
    with pytest.raises(RequestError, match="no such folder of probabilities"):
        find_probabilities(cases("a"), ("WT",), tmp_path / "none")
    save(tmp_path / "again" / "a_ET.tif", PROBABILITIES)
    with pytest.raises(RequestError, match=r"a_ET\.tif, a_ET\.tif have one name"):
        find_probabilities(cases("a"), ("ET",), tmp_path)


def test_unusable_probabilities_are_named(folders):
    masks, data = folders
    save(masks / "probabilities" / "Image_01L_foreground.tif", np.full((2, 4), math.nan, np.float32))
    save(masks / "probabilities" / "Image_01R_foreground.tif", np.zeros((2, 5), np.float32))
    errors = evaluate_folders(masks, data, probabilities=masks).errors
    assert "holds NaN or infinity" in errors["Image_01L"]
    assert "probabilities on the grid of the reference" in errors["Image_01R"]
