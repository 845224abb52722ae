"""A series in which the same slice is stored twice, and one whose slices all have one number."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from segkit.errors import DataError
from segkit.reading.checks import check_cohort
from segkit.reading.files import read_volume
from segkit.reading.layouts.table import find_cases
from tests.dicom_files import write_slice

STORED = np.arange(12, dtype=np.uint16).reshape(3, 4)
TRUTH = np.stack([STORED + height for height in range(5)]).transpose(2, 1, 0)


@pytest.mark.parametrize("copies", [(2,), (0, 4), (0, 1, 2, 3, 4)])
def test_the_same_slice_is_used_once(tmp_path: Path, copies: tuple[int, ...]) -> None:
    folder = tmp_path / "p1"
    for height in range(5):
        write_slice(folder / f"{height}.dcm", STORED + height, height)
    for height in copies:
        shutil.copy(folder / f"{height}.dcm", folder / f"{height} (1).dcm")
    volume = read_volume(folder)
    assert np.array_equal(volume.array, TRUTH)
    (note,) = volume.grid.notes
    assert note.startswith("slices stored twice (with equal SOPInstanceUID) are used once; not used: ")
    assert note.count("dcm") == len(copies)
    (report,) = check_cohort(find_cases(tmp_path))
    assert report.is_usable
    assert [problem.found for problem in report.problems] == [note]


def test_slices_with_one_number_at_other_places_are_all_used(tmp_path: Path) -> None:
    for height in range(5):
        write_slice(tmp_path / f"{height}.dcm", STORED + height, height, instance="1.2.3")
    assert np.array_equal(read_volume(tmp_path).array, TRUTH)


def test_other_slices_at_one_place_are_still_refused(tmp_path: Path) -> None:
    for number in range(8):  # two echoes
        write_slice(tmp_path / f"{number}.dcm", STORED, number // 2, instance=f"1.2.{number + 1}")
    with pytest.raises(DataError, match="several slices lie at one and the same position"):
        read_volume(tmp_path)
