from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from segkit.errors import DataError, RequestError
from segkit.phantoms.layouts import WrittenPhantom, write_inpainting_phantoms
from segkit.phantoms.phantom import make_phantom
from segkit.preparing.holes import ChallengeRules, whole_tumour
from segkit.reading.checks import check_cohort
from segkit.reading.files import read_labels, read_volume
from segkit.reading.geometry import reorientation_to
from segkit.reading.layouts.brats import find_known, find_voided
from segkit.reading.layouts.table import find_cases

SIZE = 40
NUMBERS = (1, 2, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("holes")


@pytest.fixture(scope="module")
def written(folder: Path) -> list[WrittenPhantom]:
    return write_inpainting_phantoms(folder, NUMBERS, size=SIZE, seed=1)


def _in_ras(case: WrittenPhantom, ending: str) -> np.ndarray:
    volume = read_volume(case.images[ending])
    assert volume.grid.orientation == "LPS"
    return reorientation_to(volume.grid, "RAS").apply(volume.array)


def test_files_are_those_of_the_training_folders(written: list[WrittenPhantom], folder: Path) -> None:
    endings = ("mask-healthy", "mask-unhealthy", "mask", "t1n-voided", "t1n")
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.nii.gz")) == [
        f"BraTS-GLI-{number:05d}-000/BraTS-GLI-{number:05d}-000-{ending}.nii.gz"
        for number in NUMBERS
        for ending in endings
    ]
    for case in written:
        for ending in ("mask", "mask-healthy", "mask-unhealthy"):
            labels, _ = read_labels(case.images[ending])
            assert np.unique(labels).tolist() == [0, 1]


def test_patients_are_those_of_the_other_conventions(written: list[WrittenPhantom]) -> None:
    for case in written:
        assert np.array_equal(_in_ras(case, "t1n"), make_phantom(case.number, size=SIZE, seed=1).images["t1n"])


def test_holes_obey_the_procedure(written: list[WrittenPhantom]) -> None:
    rules = ChallengeRules().scaled_to(SIZE)
    assert rules.margin_voxels == 1.0  # 5 x 40 / 240 is less than a voxel
    for case in written:
        phantom = make_phantom(case.number, size=SIZE, seed=1)
        image, voided = _in_ras(case, "t1n"), _in_ras(case, "t1n-voided")
        mask, healthy, unhealthy = (_in_ras(case, f"mask{ending}") == 1 for ending in ("", "-healthy", "-unhealthy"))
        assert np.array_equal(mask, healthy | unhealthy)
        assert np.array_equal(voided, np.where(mask, 0, image))
        # A margin of 1 voxel is what faces touch.
        assert np.array_equal(unhealthy, ndimage.binary_dilation(whole_tumour(phantom.labels > 0, rules)))
        assert ndimage.distance_transform_edt(~unhealthy)[healthy].min() >= 1
        assert healthy.sum() >= 40
        assert (healthy & (image != 0)).sum() >= 0.7 * healthy.sum()  # of the filled brain it is 0.75


def test_a_case_depends_on_seed_and_number_only(written: list[WrittenPhantom], tmp_path: Path) -> None:
    (alone,) = write_inpainting_phantoms(tmp_path / "alone", [7], size=SIZE, seed=1)
    (other,) = write_inpainting_phantoms(tmp_path / "other", [7], size=SIZE, seed=2)
    for ending in alone.images:
        assert np.array_equal(_in_ras(alone, ending), _in_ras(written[-1], ending))
        assert not np.array_equal(_in_ras(other, ending), _in_ras(alone, ending))


def test_folders_are_recognised_and_pass_the_check(written: list[WrittenPhantom], folder: Path) -> None:
    cohort = find_cases(folder)
    assert (cohort.layout, cohort.modalities) == ("brats-inpainting", ("t1n",))
    assert [problem for report in check_cohort(cohort) for problem in report.problems] == []
    for find, image, hole in ((find_voided, "t1n-voided", "mask"), (find_known, "t1n", "mask-unhealthy")):
        cases = find(folder).cases
        assert [case.images["t1n"].path for case in cases] == [case.images[image] for case in written]
        assert [case.label.path for case in cases if case.label] == [case.images[hole] for case in written]


def test_limits_can_be_set_and_what_cannot_be_done_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no tumour of 50000 or more voxels"):
        write_inpainting_phantoms(tmp_path, [1], size=24, rules=ChallengeRules(smallest_voxels=50000))
    (case,) = write_inpainting_phantoms(
        tmp_path, [1], size=32, rules=ChallengeRules(smallest_voxels=60, margin_voxels=2)
    )
    unhealthy, healthy = (_in_ras(case, f"mask-{kind}") == 1 for kind in ("unhealthy", "healthy"))
    assert ndimage.distance_transform_edt(~unhealthy)[healthy].min() >= 2
    with pytest.raises(RequestError, match="this folder is not empty"):
        write_inpainting_phantoms(tmp_path, [1])
