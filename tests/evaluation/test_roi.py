"""Regions of interest: how they are found and read, and scores inside them by hand."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest

from segkit.errors import DataError, RequestError
from segkit.evaluation.roi import find_rois, read_roi
from segkit.evaluation.score_folder import evaluate_folders
from segkit.reading.volume import Grid
from tests.evaluation.eyes import REFERENCE, ROI, cases, save, save_white_first, write_eyes


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return write_eyes(tmp_path)


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
