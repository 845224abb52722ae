"""Scale factors of DICOM slices: each slice, and each frame of an enhanced file, has its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segkit.reading.files import read_labels, read_volume
from tests.dicom_files import enhanced_file, write_slice

SLOPES = {
    "the first slice has no fraction": [(1, 0), (0.003, 0), (0.5, -7.25), (0.25, 1)],
    "the first slice has one": [(0.5, 0), (1, 0), (1, 0), (2, 0)],
    "fractional intercepts": [(1, 0), (1, 0.5), (1, 0.25), (1, 0)],
    "an exponent": [(1, 0), ("1.5e-3", 0), (1, 0), (1, 0)],
}


@pytest.mark.parametrize("scales", SLOPES.values(), ids=SLOPES)
@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.uint8])
def test_each_slice_has_its_own_scale(tmp_path: Path, scales: list[tuple[Any, float]], dtype: Any) -> None:
    stored = np.random.default_rng(0).integers(0, 200, (4, 3, 4)).astype(dtype)
    for height in (2, 0, 3, 1):  # names in another order than positions
        write_slice(tmp_path / f"{height * 7 % 4}.dcm", stored[height], height, scales[height])
    truth = np.stack([plane * float(m) + b for plane, (m, b) in zip(stored, scales, strict=True)]).transpose(2, 1, 0)
    array = read_volume(tmp_path).array
    assert array.dtype == np.float32
    assert np.abs(array - truth).max() <= 1e-6 * np.ptp(truth)


def test_whole_scales_stay_integers_and_do_not_overflow(tmp_path: Path) -> None:
    stored = np.full((4, 2, 2), 300, np.uint16)
    for height, scale in enumerate([(1, 0), (2, -5), (1, -1024), (300, 0)]):
        write_slice(tmp_path / f"{height}.dcm", stored[height], height, scale)
    array = read_volume(tmp_path).array
    assert array.dtype.kind == "i"
    assert array[0, 0].tolist() == [300, 595, -724, 90000]


def test_a_mask_with_a_slope_next_to_1_keeps_every_voxel(tmp_path: Path) -> None:
    mask = np.zeros((9, 16, 16), np.uint16)
    mask.reshape(-1)[np.random.default_rng(1).permutation(mask.size)[:1476]] = 1
    for height, plane in enumerate(mask):
        write_slice(tmp_path / f"{height}.dcm", plane, height, (1, 0) if height == 0 else (0.99999, 0))
    labels = read_labels(tmp_path)[0]
    assert int(labels.sum()) == 1476
    assert np.array_equal(labels, mask.transpose(2, 1, 0))


@pytest.mark.parametrize("scales", [*SLOPES.values(), [(1, 0), (2, -5), (3, 0), (300, 0)]])
def test_each_frame_of_an_enhanced_file_has_its_own_scale(tmp_path: Path, scales: list[tuple[Any, float]]) -> None:
    stored = np.random.default_rng(0).integers(0, 200, (4, 3, 4)).astype(np.uint16)
    heights = (2, 0, 3, 1)  # frames in another order than positions
    path = enhanced_file(tmp_path / "a.dcm", stored, scales, heights)
    frames = [plane * float(m) + b for plane, (m, b) in zip(stored, scales, strict=True)]
    truth = np.stack([frames[heights.index(height)] for height in range(4)]).transpose(2, 1, 0)
    assert np.abs(read_volume(path).array - truth).max() <= 1e-6 * np.ptp(truth)
