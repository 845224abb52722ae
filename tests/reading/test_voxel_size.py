"""Headers whose voxel size is missing, zero, or given twice with different values."""

from __future__ import annotations

import gzip
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from segkit.errors import DataError
from segkit.evaluation.score_folder import evaluate_folders
from segkit.preparing.preprocessing import load_case
from segkit.reading.case import Case, ImageFile
from segkit.reading.checks import check_cohort
from segkit.reading.files import read_grid, read_labels, write_labels
from segkit.reading.layouts.table import find_cases

SIZE = (1.316, 1.316, 10.0)
TURN = np.array([[0.6, -0.8, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, -1.0]])


def with_forms(
    path: Path,
    array: np.ndarray,
    sform: np.ndarray | None,
    qform: np.ndarray | None,
    size: tuple[float, float, float] | None = None,
    units: int = 2,
    kind: Any = nib.Nifti1Image,
) -> Path:
    """A NIfTI file whose header holds exactly these two affines, and the voxel size `size` if it is given."""
    image = kind(array, None)
    if qform is not None:
        image.header.set_qform(qform, code=1)
    if size is not None:
        image.header["pixdim"][1:4] = size
    if sform is not None:
        for letter, row in zip("xyz", sform, strict=False):
            image.header[f"srow_{letter}"] = row
        image.header["sform_code"] = 1
    image.header["xyzt_units"] = units
    path.parent.mkdir(parents=True, exist_ok=True)
    image.to_filename(path)
    return path


def affine(directions: np.ndarray, size: tuple[float, ...], origin: tuple[float, ...] = (5.0, 6.0, 7.0)) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = directions * size, origin
    return matrix


@pytest.mark.parametrize("directions", [np.eye(3), np.diag([-1.0, -1.0, 1.0]), TURN])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(("units", "factor"), [(2, 1.0), (1, 1000.0), (3, 0.001)])
def test_an_sform_without_voxel_sizes_gives_way_to_the_qform(
    tmp_path: Path, directions: np.ndarray, kind: Any, units: int, factor: float
) -> None:
    array, right = np.zeros((4, 5, 6), np.uint8), affine(directions, SIZE)
    path = with_forms(tmp_path / "a.nii", array, affine(directions, (1, 1, 1)), right, units=units, kind=kind)
    grid = read_grid(path)
    np.testing.assert_allclose(grid.affine[:3], right[:3] * factor, rtol=1e-5)
    (note,) = grid.notes
    assert note.startswith("the sform gives voxels of 1 x 1 x 1 and pixdim of 1.316 x 1.316 x 10")
    write_labels(tmp_path / "b.nii", array, grid)
    assert read_grid(tmp_path / "b.nii").notes == ()
    np.testing.assert_allclose(read_grid(tmp_path / "b.nii").affine, grid.affine, rtol=1e-5)


@pytest.mark.parametrize(
    ("sform", "qform", "size"),
    [
        (affine(np.eye(3), (2, 2, 5)), affine(np.eye(3), SIZE), None),  # another scale: as a registration writes it
        (affine(np.eye(3), (1, 1, 1)), None, SIZE),  # no qform to take
        (affine(np.eye(3), (1, 1, 3)), None, None),
    ],
)
def test_other_voxel_sizes_are_a_note_of_the_check(
    tmp_path: Path, sform: np.ndarray, qform: np.ndarray | None, size: tuple[float, float, float] | None
) -> None:
    path = with_forms(tmp_path / "a.nii", np.arange(120, dtype=np.uint8).reshape(4, 5, 6), sform, qform, size)
    np.testing.assert_allclose(read_grid(path).affine, sform, rtol=1e-6)
    (report,) = check_cohort(find_cases(tmp_path))
    (problem,) = report.problems
    assert not problem.is_fatal
    assert problem.where == str(path)
    assert problem.found.endswith("; the sform is taken")


def test_distances_are_those_of_the_qform_and_the_files_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    masks = np.zeros((2, 8, 8, 4), np.uint8)
    masks[0, 2:6, 2:6, 0:2] = 1
    masks[1, 2:6, 2:6, 0:4] = 1  # 2 slices of 10 mm more
    for name, mask in zip(("reference", "prediction"), masks, strict=True):
        with_forms(tmp_path / name / "p1.nii.gz", mask, affine(np.eye(3), (1, 1, 1)), affine(np.eye(3), SIZE))
    scores = evaluate_folders(tmp_path / "prediction", tmp_path / "reference")
    assert scores.cases[0].regions["label_1"]["hd95_mm"] == pytest.approx(20.0)
    assert [str(tmp_path / name / "p1.nii.gz") in caplog.text for name in ("reference", "prediction")] == [True, True]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_a_voxel_size_of_zero_is_named(tmp_path: Path, axis: int, packed: bool) -> None:
    path = tmp_path / ("a.nii.gz" if packed else "a.nii")
    size = [2.0, 3.0, 4.0]
    size[axis] = 0.0
    array = np.zeros((4, 5, 6), np.uint8)
    for qform in (None, affine(np.eye(3), (2, 3, 4))):
        with_forms(path, array, None, qform, (2, 3, 4))
        content = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
        content[80:92] = struct.pack("<3f", *size)
        path.write_bytes(gzip.compress(bytes(content)) if packed else bytes(content))
        with pytest.raises(
            DataError, match=r"a\.nii.*voxels of .*0.*distances are unknown; expected a voxel size in mm"
        ):
            read_grid(path)


def test_the_sform_stands_for_a_voxel_size_of_zero_or_below(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    form = affine(np.eye(3), (2, 3, 4))
    path = with_forms(tmp_path / "p 1.nii", np.arange(1, 121, dtype=np.uint8).reshape(4, 5, 6), form, None)
    case = Case("p 1", "p 1", {"t1n": ImageFile(path)}, ImageFile(path))
    for size in ((2, 0, 4), (2, -3, 4)):
        content = bytearray(path.read_bytes())
        content[80:92] = struct.pack("<3f", *size)
        path.write_bytes(bytes(content))
        np.testing.assert_allclose(read_grid(path).affine, form)
        assert load_case(replace(case, label=None), ("t1n",), None).grid.spacing_mm == pytest.approx((2, 3, 4))
        assert read_labels(path)[0].all()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert "pixdim" not in capfd.readouterr().err  # nibabel's own lines
