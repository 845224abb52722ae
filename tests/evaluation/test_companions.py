"""Regions of interest and probabilities beside masks: how they are found, and scores inside them by hand."""

from __future__ import annotations

import math
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest

from segkit.errors import DataError, RequestError
from segkit.evaluation.companions import find_probabilities, find_rois, read_roi
from segkit.evaluation.score_folder import evaluate_folders
from segkit.reading.case import Case, ImageFile
from segkit.reading.volume import Grid

REFERENCE = np.array([[1, 1, 0, 1], [0, 0, 0, 0]], np.uint8)
PREDICTION = np.array([[1, 0, 1, 0], [0, 0, 0, 0]], np.uint8)
ROI = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], np.uint8)
PROBABILITIES = np.array([[0.9, 0.4, 0.6, 0.1], [0.2, 0.7, 0.7, 0.7]], np.float32)


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(array).save(path)
    return path


def save_white_first(path: Path, array: np.ndarray) -> Path:
    """0 is white and 1 black in this palette, as in the fields of view of CHASE_DB1; 1 of `array` becomes white."""
    picture = PIL.Image.fromarray(1 - array)
    picture.putpalette([255, 255, 255, 0, 0, 0])
    picture.save(path)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Both eyes of a person as in CHASE_DB1: the left is predicted as above, the right exactly."""
    data, masks = tmp_path / "data", tmp_path / "masks"
    colour = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for case, prediction in (("Image_01L", PREDICTION), ("Image_01R", REFERENCE)):
        save(data / f"{case}.jpg", colour)
        save(data / f"{case}_1stHO.png", REFERENCE > 0)
        save(data / f"{case}_2ndHO.png", PREDICTION > 0)
        save_white_first(data / f"{case}.gif", ROI)
        save(masks / f"{case}.png", prediction)
        save(masks / "probabilities" / f"{case}_foreground.tif", PROBABILITIES)
        save(masks / "probabilities" / f"{case}_background.tif", 1 - PROBABILITIES)
    return masks, data


def test_scores_inside_a_field_of_view_by_hand(folders):
    masks, data = folders
    document = evaluate_folders(masks, data, roi=".gif", probabilities=masks / "probabilities").to_json()
    assert document["roi"] == ".gif"
    assert (document["errors"], document["surplus"]) == ([], [])
    left, right = (case["regions"]["foreground"] for case in document["cases"])
    assert (left["dice"], left["sensitivity"], left["precision"], left["specificity"]) == (0.5, 0.5, 0.5, 0.5)
    # Inside: 0.9 and 0.4 of the vessel against 0.6 and 0.2 of the rest; only 0.4 against 0.6 is wrong.
    assert left["auc"] == right["auc"] == 3 / 4
    assert right["dice"] == 1.0
    # Both eyes are of one person, so nothing can be resampled.
    alone = {"mean": 0.75, "median": 0.75, "n": 2, "ci95": None, "median_ci95": None}
    assert document["summary"]["foreground"]["auc"] == alone
    assert {case["patient"] for case in document["cases"]} == {"Image_01"}


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


def test_case_without_companion_is_an_error_of_its_own(folders):
    masks, data = folders
    (data / "Image_01L.gif").unlink()
    evaluation = evaluate_folders(masks, data, roi=".gif")
    assert [case.case for case in evaluation.cases] == ["Image_01R"]
    assert evaluation.errors == {
        "Image_01L": "Image_01L: has no region of interest. "
        "Add one whose name begins with the case id, or leave the case out with --cases"
    }
    (masks / "probabilities" / "Image_01R_foreground.tif").unlink()
    evaluation = evaluate_folders(masks, data, probabilities=masks / "probabilities", case_ids=["Image_01L"])
    assert not evaluation.errors
    evaluation = evaluate_folders(masks, data, probabilities=masks / "probabilities")
    assert "has no probabilities of foreground" in evaluation.errors["Image_01R"]


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
    evaluation.write(tmp_path / "out")
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


def test_written_table_says_where(tmp_path, folders):
    masks, data = folders
    evaluate_folders(masks, data, roi=".gif", probabilities=masks).write(tmp_path / "out")
    summary = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith(
        "Protocol legacy, inside the regions of interest .gif; mean (median) over cases. "
        "95 % CI of the mean: bootstrap by patient (1)."
    )
    assert "| 0.750 (0.750) | 0.375 (0.375) |" in summary
    assert "auc" in (tmp_path / "out" / "scores.csv").read_text(encoding="utf-8").splitlines()[0]


def cases(*names: str) -> list[Case]:
    return [Case(name, name, {"grey": ImageFile(Path(f"{name}_training.tif"))}) for name in names]


def test_regions_of_interest_by_folder_ending_and_file(tmp_path):
    for name in ("21_training_mask.gif", "1_mask.gif", "21_1_mask.gif", "x.gif"):
        save(tmp_path / "mask" / name, ROI)
    found = find_rois(cases("1", "21", "21_1"), str(tmp_path / "mask"), tmp_path)
    assert {case_id: path.name for case_id, path in found.items()} == {
        "1": "1_mask.gif",
        "21": "21_training_mask.gif",
        "21_1": "21_1_mask.gif",
    }
    assert find_rois(cases("21"), "_MASK.gif", tmp_path / "mask") == {"21": tmp_path / "mask" / "21_training_mask.gif"}
    one = tmp_path / "mask" / "x.gif"
    assert find_rois(cases("1", "2"), str(one), tmp_path) == {"1": one, "2": one}


def test_regions_of_interest_that_cannot_be_told(tmp_path):
    save(tmp_path / "21_a.png", ROI)
    save(tmp_path / "21_b.png", ROI)
    with pytest.raises(RequestError, match=r"2 files could be the region of interest of 21: 21_a\.png, 21_b\.png"):
        find_rois(cases("21"), str(tmp_path), tmp_path)
    with pytest.raises(RequestError, match=r"--roi _fov\.png: no mask of a region of interest belongs to any of the 1"):
        find_rois(cases("21"), "_fov.png", tmp_path)


@pytest.mark.parametrize("white", [1, 255])
def test_a_region_of_interest_is_what_is_not_black(tmp_path, white):
    grid = Grid((2, 4), np.eye(4))
    for path in (
        save(tmp_path / "a.png", ROI * white),
        save(tmp_path / "c.png", np.stack([0 * ROI, ROI * white, 0 * ROI], axis=-1)),
        save_white_first(tmp_path / "p.gif", ROI),
        save(tmp_path / "b.png", ROI > 0),
    ):
        np.testing.assert_array_equal(read_roi(path, grid, REFERENCE > 0), ROI > 0)


def test_black_is_not_exactly_black_in_jpeg(tmp_path):
    inside = np.zeros((16, 32), bool)
    inside[:, 5:19] = True
    path = save(tmp_path / "roi.jpg", np.where(inside, 255, 0).astype(np.uint8))
    assert np.asarray(PIL.Image.open(path))[~inside].max() > 0
    np.testing.assert_array_equal(read_roi(path, Grid((16, 32), np.eye(4)), inside), inside)


def test_unusable_regions_of_interest(tmp_path):
    grid = Grid((2, 4), np.eye(4))
    inverted = save(tmp_path / "inverted.png", 1 - ROI)
    with pytest.raises(DataError, match="only 33% of the reference lies in this region of interest"):
        read_roi(inverted, grid, REFERENCE > 0)
    empty = save(tmp_path / "empty.png", 0 * ROI)
    with pytest.raises(DataError, match="the region of interest is empty"):
        read_roi(empty, grid, REFERENCE > 0)
    with pytest.raises(DataError, match="expected a region of interest on the grid of the reference"):
        read_roi(empty, Grid((4, 4), np.eye(4)), np.zeros((4, 4), bool))


def test_brain_masks_of_volumes(tmp_path):
    labels, brain = np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    labels[1, 1, 1:3], brain[1] = 1, 1
    for name, array in (("ref/p1_seg", labels), ("pred/p1", np.maximum(labels, 1 - brain)), ("brain/p1_brain", brain)):
        path = tmp_path / f"{name}.nii.gz"
        path.parent.mkdir()
        nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    evaluation = evaluate_folders(tmp_path / "pred", tmp_path / "ref", roi=str(tmp_path / "brain"))
    scores = evaluation.cases[0].regions["label_1"]
    assert (scores["dice"], scores["specificity"], scores["hd95_mm"]) == (1, 1, 0)
    assert scores["prediction_ml"] == pytest.approx(0.002)


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
