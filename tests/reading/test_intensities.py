"""One rule for intensities that cannot be used, in check, train and infer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import segkit
from segkit.errors import DataError
from segkit.preparing.preprocessing import load_case
from segkit.reading.checks import check_cohort
from segkit.reading.layouts.table import find_cases
from segkit.reading.volume import measure_intensities
from tests.helpers import save_nifti, write_segmentation_run

SHAPE = (12, 10, 8)


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, SHAPE).astype(np.float32)


def write_case(folder: Path, name: str, flair: np.ndarray) -> None:
    save_nifti(folder / f"{name}_t1.nii.gz", image(1))
    save_nifti(folder / f"{name}_flair.nii.gz", flair)


BAD = {
    "zeros": (np.zeros(SHAPE, np.float32), r"every voxel holds the same value, 0"),
    "one value": (np.full(SHAPE, -1024, np.int16), r"every voxel holds the same value, -1024"),
}
for peak in (3e38, -3e38, 1e12):
    voxel = image()
    voxel[3, 4, 5] = peak
    BAD[f"a voxel of {peak:g}"] = (voxel, rf"1 voxels hold up to {abs(peak):.3g}".replace("+", r"\+"))


@pytest.mark.parametrize(("flair", "match"), BAD.values(), ids=BAD)
def test_check_train_and_infer_agree_and_name_the_file(tmp_path: Path, flair: np.ndarray, match: str) -> None:
    write_case(tmp_path / "data", "good", image())
    write_case(tmp_path / "data", "bad", flair)
    cohort = find_cases(tmp_path / "data")
    bad, good = check_cohort(cohort)
    assert (bad.is_usable, good.is_usable) == (False, True)
    with pytest.raises(DataError, match=rf"bad_flair\.nii\.gz: {match}"):  # as training and inference read it
        load_case(cohort.cases[0], cohort.modalities, None)


def test_an_image_of_one_value_counts_as_missing_where_that_is_allowed(tmp_path: Path) -> None:
    write_case(tmp_path, "a", np.full(SHAPE, 7, np.float32))
    cohort = find_cases(tmp_path)
    loaded = load_case(cohort.cases[0], cohort.modalities, None, allow_missing=True)
    assert loaded.available == (True, False)
    assert not loaded.image[1].any()
    assert loaded.image[0].any()
    voxel = image()
    voxel[0, 0, 0] = 3e38
    write_case(tmp_path, "a", voxel)
    with pytest.raises(DataError, match="1 voxels hold up to"):
        load_case(cohort.cases[0], cohort.modalities, None, allow_missing=True)


@pytest.mark.parametrize("values", [(np.nan,), (np.inf, -np.inf), (-np.inf, np.nan)])
def test_nan_and_infinity_are_counted(values: tuple[float, ...]) -> None:
    array = image()
    array[0, 0, : len(values)] = values
    with pytest.raises(DataError, match=rf"a: {len(values)} voxels are NaN or infinite"):
        measure_intensities(array, "a")


@pytest.mark.parametrize("largest", [30_000.0, 5e6])
def test_metal_and_spikes_of_maps_are_no_damage(largest: float) -> None:
    array = image()
    array[:6] = 0
    array[7, 4, 5] = largest
    background, bright = measure_intensities(array, "a")
    assert background == pytest.approx(0.5, abs=0.02)
    assert 100 < bright < 5e6


def test_black_planes_of_pictures_are_usual(tmp_path: Path) -> None:
    import PIL.Image

    colour = np.zeros((16, 16, 3), np.uint8)
    colour[4:8, 4:8, 0] = 200  # no green and no blue
    PIL.Image.fromarray(colour).save(tmp_path / "a.png")
    cohort = find_cases(tmp_path)
    assert load_case(cohort.cases[0], cohort.modalities, None).available == (True, True, True)


def test_infer_fails_the_case_or_does_without_the_sequence(tmp_path: Path) -> None:
    write_case(tmp_path / "data", "good", image())
    write_case(tmp_path / "data", "bad", np.zeros(SHAPE, np.float32))
    model = write_segmentation_run(tmp_path / "run", ("t1n", "t2f"))
    options = {"device": "cpu", "backend": "torch", "workers": 0}
    failed, done = segkit.infer(model, tmp_path / "data", tmp_path / "masks", **options)["cases"]
    assert (failed["status"], done["status"]) == ("failed", "done")
    assert "bad_flair.nii.gz: every voxel holds the same value, 0" in failed["error"]
    without = segkit.infer(model, tmp_path / "data", tmp_path / "masks", allow_missing=True, **options)
    assert without["summary"]["failed"] == 0, without["cases"]
