"""Label maps of a part of a scan, and in another orientation, on the voxels of the scan."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest

from segkit.errors import DataError
from segkit.evaluation.probabilities import score_probabilities
from segkit.evaluation.roi import read_roi
from segkit.evaluation.score_folder import evaluate_folders
from segkit.preparing.preprocessing import load_case
from segkit.reading.checks import check_cohort
from segkit.reading.files import write_labels
from segkit.reading.geometry import Reorientation, onto_grid, reoriented_grid
from segkit.reading.layouts.table import find_cases
from segkit.reading.volume import Grid
from tests.helpers import save_nifti

ANGLES = (0.0, 0.3, np.pi / 4)
SHAPE = (5, 6, 7)


def oblique(angle: float, spacing: Sequence[float] = (1.0, 1.5, 4.0)) -> np.ndarray:
    affine = np.eye(4)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, -1]])
    affine[:3, :3], affine[:3, 3] = turn * spacing, (-31.5, 12.25, 40)
    return affine


def orientations() -> list[Reorientation]:
    return [
        Reorientation(axes, flips, SHAPE)
        for axes in permutations(range(3))
        for flips in product((False, True), repeat=3)
    ]


@pytest.mark.parametrize("angle", ANGLES)
def test_all_48_orientations_come_back(angle: float) -> None:
    grid = Grid(SHAPE, oblique(angle))
    array = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    for turn in orientations():
        other, stored = reoriented_grid(grid, turn), turn.apply(array)
        found = onto_grid(stored, other, grid, turns=True)
        assert found is not None
        assert np.array_equal(found, array)
        is_same = turn.axes == (0, 1, 2) and not any(turn.flips)
        assert (onto_grid(stored, other, grid) is not None) == is_same


def part_of(grid: Grid, start: Sequence[float], shape: tuple[int, ...], source: str = "p1.seg.nrrd") -> Grid:
    affine = grid.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ np.array(start)
    return Grid(shape, affine, source=Path(source))


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("name", ["p1.seg.nrrd", "p1_seg.nii.gz", "p1_seg.mha"])
def test_a_part_is_padded_by_whole_voxels(angle: float, name: str) -> None:
    grid, box = Grid(SHAPE, oblique(angle)), np.arange(1, 25).reshape(2, 3, 4)
    whole = onto_grid(box, part_of(grid, (1, 2, 3), box.shape, name), grid)
    assert whole is not None
    assert whole.shape == SHAPE
    assert np.array_equal(whole[1:3, 2:5, 3:7], box)
    assert int(np.count_nonzero(whole)) == box.size


@pytest.mark.parametrize("start", [(1.5, 2, 3), (-1, 0, 0), (4, 0, 0), (0, 0, 4)])
def test_what_lies_beside_the_voxels_or_outside_does_not_fit(start: tuple[float, float, float]) -> None:
    grid, box = Grid(SHAPE, oblique(0.3)), np.ones((2, 3, 4))
    assert onto_grid(box, part_of(grid, start, box.shape), grid, turns=True) is None


def test_other_spacings_and_lost_headers_do_not_fit() -> None:
    grid, box = Grid(SHAPE, oblique(0)), np.ones((2, 3, 4))
    assert onto_grid(box, Grid(box.shape, oblique(0, (1, 1.5, 2))), grid, turns=True) is None
    atlas = Grid(
        (20, 20, 20), np.diag([1.0, 1.0, 1.0, 1.0]) + np.array([[0, 0, 0, -9], [0, 0, 0, -9], [0, 0, 0, -9], [0] * 4])
    )
    assert onto_grid(box, Grid(box.shape, np.eye(4)), atlas) is None
    assert onto_grid(box, part_of(grid, (1, 1, 1), box.shape, "p1.nii.gz"), grid, turns=True) is None
    lost = Grid(box.shape, np.eye(4), source=Path("p1.nii.gz"))
    assert onto_grid(box, lost, Grid(SHAPE, np.eye(4))) is None
    assert onto_grid(np.ones((3, 3)), Grid((3, 3), np.eye(4)), Grid((4, 4), np.eye(4))) is None


def test_predictions_are_turned_and_scored(tmp_path: Path) -> None:
    grid = Grid(SHAPE, oblique(0.3))
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:3, 2:5, 1] = 1
    for number, turn in enumerate(orientations()):
        save_nifti(tmp_path / "reference" / f"p{number:02d}.nii.gz", labels, grid.affine)
        save_nifti(
            tmp_path / "prediction" / f"p{number:02d}.nii.gz", turn.apply(labels), reoriented_grid(grid, turn).affine
        )
    part = part_of(grid, (1, 1, 1), (4, 4, 4))
    save_nifti(tmp_path / "reference" / "small.nii.gz", labels, grid.affine)
    write_labels(tmp_path / "prediction" / "small.nrrd", labels[1:5, 1:5, 1:5], part)
    write_labels(tmp_path / "reference" / "part.nrrd", labels[1:5, 1:5, 1:5], part)
    save_nifti(tmp_path / "prediction" / "part.nii.gz", labels, grid.affine)
    scores = evaluate_folders(tmp_path / "prediction", tmp_path / "reference")
    assert scores.errors == {}
    assert [case.regions["label_1"]["dice"] for case in scores.cases] == [1.0] * 50
    save_nifti(tmp_path / "prediction" / "p00.nii.gz", labels, part_of(grid, (0, 0, 1), SHAPE).affine)
    assert list(evaluate_folders(tmp_path / "prediction", tmp_path / "reference").errors) == ["p00"]


def test_probabilities_and_regions_of_interest_are_turned(tmp_path: Path) -> None:
    grid, turn = Grid(SHAPE, oblique(0.3)), orientations()[17]
    present = np.zeros(SHAPE, np.bool_)
    present[1:3, 2:5, 1] = True
    other = reoriented_grid(grid, turn).affine
    path = save_nifti(tmp_path / "p.nii.gz", turn.apply(np.where(present, 0.9, 0.1).astype(np.float32)), other)
    assert score_probabilities(path, present, grid, None)[0]["auc"] == 1.0
    roi = save_nifti(tmp_path / "roi.nii.gz", turn.apply(present.astype(np.uint8)), other)
    assert np.array_equal(read_roi(roi, grid, present), present)


def test_a_reference_of_a_part_of_the_scan_is_used_and_noted(tmp_path: Path) -> None:
    grid = Grid(SHAPE, oblique(0.0))
    image = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    save_nifti(tmp_path / "p1.nii.gz", image, grid.affine)
    part = part_of(grid, (1, 2, 3), (2, 3, 4))
    write_labels(tmp_path / "p1.seg.nrrd", np.ones(part.shape, np.uint8), part)
    cohort = find_cases(tmp_path)
    for read_voxels in (True, False):
        (report,) = check_cohort(cohort, read_voxels=read_voxels)
        assert report.is_usable
        assert [problem.found for problem in report.problems] == [
            "the mask covers 2 x 3 x 4 of the 5 x 6 x 7 voxels; others are 0"
        ]
    labels = load_case(cohort.cases[0], cohort.modalities, cohort.scheme).labels
    assert labels is not None
    assert labels[1:3, 2:5, 3:7].all()
    assert int(labels.sum()) == 24
    turned = reoriented_grid(grid, Reorientation((0, 1, 2), (True, False, False), SHAPE))
    write_labels(tmp_path / "p1.seg.nrrd", np.ones(SHAPE, np.uint8), turned)  # more likely a wrong header
    with pytest.raises(DataError, match="is oriented"):
        load_case(cohort.cases[0], cohort.modalities, cohort.scheme)
