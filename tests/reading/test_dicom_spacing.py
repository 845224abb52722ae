"""DICOM series with one spacing, with none, and with one of zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segkit.errors import DataError
from segkit.reading.checks import check_cohort
from segkit.reading.files import read_grid
from segkit.reading.layouts.table import find_cases
from tests.dicom_files import enhanced_file, write_slice

STORED = np.arange(12, dtype=np.uint16).reshape(3, 4)
IMAGER = (0x18, 0x1164, "DS", r"2.5\0.75")


def series(folder: Path, spacing: str, *, has_imager_spacing: bool) -> Path:
    for height in range(4):
        more = [IMAGER] if has_imager_spacing else []
        write_slice(folder / f"{height}.dcm", STORED + height, height, spacing=spacing, more=more)
    return folder


def test_slices_written_by_itk_alone_have_their_spacing(tmp_path: Path) -> None:
    for height in range(4):
        more = [(0x18, 0x2010, "DS", r"2.5\0.75")]
        write_slice(tmp_path / f"{height}.dcm", STORED + height, height, spacing="", more=more)
    grid = read_grid(tmp_path)
    assert grid.spacing_mm == (0.75, 2.5, 1.0)
    assert grid.notes == ("there is no PixelSpacing; NominalScannedPixelSpacing is taken",)


def test_pixel_spacing_comes_first(tmp_path: Path) -> None:
    grid = read_grid(series(tmp_path, r"2\0.5", has_imager_spacing=True))
    assert (grid.spacing_mm, grid.notes) == ((0.5, 2.0, 1.0), ())


def test_imager_pixel_spacing_is_taken_with_a_note(tmp_path: Path) -> None:
    folder = series(tmp_path / "p1", "", has_imager_spacing=True)
    assert read_grid(folder).spacing_mm == (0.75, 2.5, 1.0)
    (report,) = check_cohort(find_cases(tmp_path))
    assert ["ImagerPixelSpacing" in problem.found for problem in report.problems] == [True]
    assert report.is_usable


@pytest.mark.parametrize("spacing", ["", " ", r"0\0", r"0.5\0", r"-1\1", "0.5"])
def test_no_spacing_is_refused_by_name(tmp_path: Path, spacing: str) -> None:
    with pytest.raises(DataError, match=r"0\.dcm: the DICOM file gives (the|no) pixel spacing.*PixelSpacing"):
        read_grid(series(tmp_path, spacing, has_imager_spacing=False))
    (report,) = check_cohort(find_cases(tmp_path))
    assert not report.is_usable


def test_enhanced_files_have_the_same_rules(tmp_path: Path) -> None:
    stored = np.stack([STORED] * 4)
    path = enhanced_file(tmp_path / "a.dcm", stored, spacing=None, imager=[2.5, 0.75])
    assert read_grid(path).spacing_mm == (0.75, 2.5, 1.0)
    assert "ImagerPixelSpacing" in read_grid(path).notes[0]
    for spacing in (None, [0.5, 0]):
        with pytest.raises(DataError, match=r"a\.dcm: the DICOM file gives (the|no) pixel spacing"):
            read_grid(enhanced_file(tmp_path / "a.dcm", stored, spacing=spacing))
