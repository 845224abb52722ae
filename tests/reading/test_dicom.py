"""DICOM series: real headers against their known geometry, and generated series with one fault each."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segkit.errors import DataError
from segkit.reading.dicom import is_dicom_file
from segkit.reading.files import count_channels, read_grid, read_volume, write_labels
from segkit.reading.geometry import reorientation_to, reoriented_grid, same_grid

PATIENT = "Mustermann^Erika"


def write_slice(path: Path, position: Sequence[float], series_uid: str = "1.2.3.4") -> None:
    """One slice of 4 columns and 3 rows of 0.5 x 2 mm voxels, all of the value of its z."""
    import SimpleITK

    image = SimpleITK.GetImageFromArray(np.full((1, 3, 4), int(position[2]) + 100, np.uint16))
    image.SetSpacing((0.5, 2.0, 1.0))
    tags = {
        "0008|0060": "MR",
        "0010|0010": PATIENT,
        "0020|000d": "1.2.3",
        "0020|000e": series_uid,
        "0020|0032": "\\".join(map(str, position)),
        "0020|0037": "1\\0\\0\\0\\1\\0",
    }
    for key, value in tags.items():
        image.SetMetaData(key, value)
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(path))
    writer.Execute(image)


def series(folder: Path, heights: Sequence[float]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, height in enumerate(heights):
        write_slice(folder / f"{number}.dcm", (-10.0, 20.0, height))
    return folder


def enhanced_file(real_data: Path) -> Path:
    """A Philips file of eight frames, which needs the `dicom` extra."""
    pytest.importorskip("pydicom")
    return next((real_data / "dicom_headers" / "philips_enhanced" / "anatomical" / "001").iterdir())


@pytest.mark.parametrize("name", ["siemens/anatomical", "generic/compressed_j2k", "philips_enhanced/anatomical"])
def test_real_series_lie_where_they_should(real_data: Path, name: str) -> None:
    if "enhanced" in name:
        pytest.importorskip("pydicom")
    volume = read_volume(real_data / "dicom_headers" / name / "001")
    for truth_name in ("001_ground_truth.nii.gz", "001_ground_truth_reoriented.nii.gz"):
        truth = read_volume(real_data / "dicom_headers" / name / truth_name)
        ours, theirs = reorientation_to(volume.grid), reorientation_to(truth.grid)
        assert same_grid(reoriented_grid(volume.grid, ours), reoriented_grid(truth.grid, theirs)) is None
        np.testing.assert_allclose(ours.apply(volume.array), theirs.apply(truth.array), atol=2e-4)


def test_hidden_files_beside_the_slices_are_left_out(tmp_path: Path) -> None:
    folder = series(tmp_path / "series", [0, 1, 2, 3])
    (folder / ".2.dcm").write_bytes((folder / "2.dcm").read_bytes())
    assert read_volume(folder).array[0, 0].tolist() == [100, 101, 102, 103]


@pytest.mark.parametrize(
    ("name", "match"),
    [("slicecount", "slices are missing: the series has only 2"), ("sliceorientation", "the slices are not parallel")],
)
def test_real_series_that_make_no_volume(real_data: Path, name: str, match: str) -> None:
    folder = real_data / "dicom_headers" / "failing" / name / "001"
    for reader in (read_grid, read_volume):
        with pytest.raises(DataError, match=match):
            reader(folder)


def test_slices_are_sorted_by_position_and_not_by_name(tmp_path: Path) -> None:
    volume = read_volume(series(tmp_path / "s", [9.0, 0.0, 6.0, 3.0]))
    assert volume.grid.shape == volume.array.shape == (4, 3, 4)
    assert volume.array[0, 0].tolist() == [100, 103, 106, 109]
    # Left and Posterior of DICOM are Right and Anterior of the affine with the signs changed.
    expected = np.array([[-0.5, 0, 0, 10.0], [0, -2.0, 0, -20.0], [0, 0, 3.0, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(volume.grid.affine, expected)
    assert count_channels(tmp_path / "s") == 1


def test_a_tilted_gantry_gives_a_sheared_affine(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    for number in range(4):
        write_slice(tmp_path / "s" / f"{number}.dcm", (0.0, 1.0 * number, 3.0 * number))
    assert read_grid(tmp_path / "s").affine[:, 2].tolist() == pytest.approx([0.0, -1.0, 3.0, 0.0])


@pytest.mark.parametrize(
    ("heights", "match"),
    [
        ([0.0, 3.0, 9.0, 12.0, 15.0], r"about 1 missing\): they lie 3\.00 mm apart, and up to 6\.00 mm in places"),
        ([0.0, 3.0, 6.0, 9.0, 11.0], "unevenly spaced"),
        ([0.0, 3.0, 3.0, 6.0, 9.0], "several slices lie at one and the same position"),
        ([0.0, 3.0, 6.0], "the series has only 3"),
    ],
)
def test_gaps_and_repeats_are_refused(tmp_path: Path, heights: list[float], match: str) -> None:
    with pytest.raises(DataError, match=match):
        read_grid(series(tmp_path / "s", heights))


def test_two_series_in_one_folder_are_refused(tmp_path: Path) -> None:
    series(tmp_path / "s", [0.0, 1.0, 2.0, 3.0])
    write_slice(tmp_path / "s" / "x.dcm", (0.0, 0.0, 0.0), series_uid="1.2.3.5")
    with pytest.raises(DataError, match=r"holds 2 DICOM series \((4, 1|1, 4) files\); expected one series"):
        read_grid(tmp_path / "s")


def test_folders_without_dicom_and_single_slices(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no DICOM images"):
        read_volume(tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match="holds no DICOM images"):
        read_volume(tmp_path / "empty")
    write_slice(tmp_path / "one.dcm", (0.0, 0.0, 0.0))
    with pytest.raises(DataError, match=r"the series has only 1.*give its folder, not one of its slices"):
        read_volume(tmp_path / "one.dcm")


def test_dicom_is_recognised_by_content(tmp_path: Path, real_data: Path) -> None:
    write_slice(tmp_path / "one.dcm", (0.0, 0.0, 0.0))
    assert is_dicom_file(tmp_path / "one.dcm")
    assert not is_dicom_file(tmp_path)
    assert not is_dicom_file(tmp_path / "none")
    (tmp_path / "IM 1").symlink_to(enhanced_file(real_data))
    assert read_grid(tmp_path / "IM 1").shape == (48, 64, 8)


def test_frames_are_sorted_by_position(tmp_path: Path, real_data: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    expected = read_volume(enhanced_file(real_data))
    document = pydicom.dcmread(enhanced_file(real_data))
    order = [3, 0, 7, 1, 6, 2, 5, 4]
    frames = document.PerFrameFunctionalGroupsSequence
    size = len(document.PixelData) // len(order)
    document.PerFrameFunctionalGroupsSequence = [frames[index] for index in order]
    document.PixelData = b"".join(document.PixelData[index * size : (index + 1) * size] for index in order)
    document.save_as(tmp_path / "shuffled.dcm")
    shuffled = read_volume(tmp_path / "shuffled.dcm")
    np.testing.assert_allclose(shuffled.grid.affine, expected.grid.affine)
    np.testing.assert_allclose(shuffled.array, expected.array)


def test_a_missing_frame_is_refused(tmp_path: Path, real_data: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    document = pydicom.dcmread(enhanced_file(real_data))
    del document.PerFrameFunctionalGroupsSequence[3]
    document.NumberOfFrames = 7
    document.PixelData = document.PixelData[: len(document.PixelData) // 8 * 7]
    document.save_as(tmp_path / "gap.dcm")
    with pytest.raises(DataError, match=r"about 1 missing\): they lie 1\.20 mm apart, and up to 2\.40 mm"):
        read_grid(tmp_path / "gap.dcm")


def test_enhanced_files_name_the_package_they_need(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_pydicom(name: str, *rest: Any, **named: Any) -> Any:
        if name == "pydicom":
            raise ImportError(name)
        return real_import(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_pydicom)
    with pytest.raises(DataError, match=r'pip install "segkit\[dicom\]"'):
        read_grid(real_data / "dicom_headers" / "philips_enhanced" / "anatomical" / "001")


def test_nothing_of_the_patient_is_kept(tmp_path: Path) -> None:
    volume = read_volume(series(tmp_path / "s", [0.0, 1.0, 2.0, 3.0]))
    write_labels(tmp_path / "a.nii", volume.array.astype(np.uint8), volume.grid)
    assert b"Mustermann" in (tmp_path / "s" / "0.dcm").read_bytes()
    assert b"Mustermann" not in (tmp_path / "a.nii").read_bytes()
    assert PATIENT not in repr(volume)
