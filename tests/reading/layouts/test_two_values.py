"""Masks with one foreground that several values show: after lossy compression, resizing, or from two programs."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import segkit
from segkit.reading.files import read_labels
from segkit.reading.layouts.table import find_cases
from tests.helpers import run_segkit, save_nifti


def disc(size: int = 96) -> np.ndarray:
    """A disc of a third of the width in the middle, (size, size) bool."""
    rows, columns = np.indices((size, size)) - size / 2 + 0.5
    return np.hypot(rows, columns) < size / 3


def write(folder: Path, masks: dict[str, np.ndarray]) -> Path:
    for name, mask in masks.items():
        for kind, array in (("images", np.arange(mask.size, dtype=np.uint8).reshape(mask.shape)), ("masks", mask)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(array).save(folder / kind / f"{name}.png")
    return folder


def through_jpeg(mask: np.ndarray, folder: Path, quality: int) -> np.ndarray:
    PIL.Image.fromarray(mask).save(folder / "lossy.jpg", quality=quality)
    return np.array(PIL.Image.open(folder / "lossy.jpg"))


@pytest.mark.parametrize("quality", [20, 75, 95])
def test_masks_that_were_jpeg_are_refused_and_can_be_thresholded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quality: int
) -> None:
    lossy = through_jpeg(np.where(disc(), 255, 0).astype(np.uint8), tmp_path, quality)
    assert len(np.unique(lossy)) > 10
    data = write(tmp_path / "my data", {f"p{number}": lossy for number in range(3)})
    found = segkit.check(data, estimate=False)
    assert found.cohort.scheme is None
    assert "lossy compression" in found.problems[0].found
    assert run_segkit("train", data, "-o", tmp_path / "run") != 0
    monkeypatch.chdir(tmp_path)
    _, *words = shlex.split(found.next_command)
    assert run_segkit(*words) == 0
    masks = tmp_path / "my data-masks"
    assert all(np.array_equal(read_labels(path)[0], disc()) for path in masks.glob("*.png"))
    assert len(list(masks.glob("*.png"))) == 3
    assert len(find_cases(data, label_scheme="classes").scheme.values) > 10  # on request
    assert run_segkit("evaluate", "-p", masks, "-r", data / "masks") == 2
    assert run_segkit("evaluate", "-p", masks, "-r", masks) == 0


def test_resized_masks_are_refused(tmp_path: Path) -> None:
    small = PIL.Image.fromarray(np.where(disc(), 255, 0).astype(np.uint8)).resize(
        (301, 301), PIL.Image.Resampling.BICUBIC
    )
    cohort = find_cases(write(tmp_path, {"a": np.array(small), "b": np.array(small)}))
    assert "lossy compression or resizing" in cohort.problems[0].found


@pytest.mark.parametrize("values", [(1, 254, 255), (2, 253), (254, 255)])
def test_a_few_values_next_to_0_and_255(tmp_path: Path, values: tuple[int, ...]) -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[0, : len(values)] = values
    assert find_cases(write(tmp_path, {"a": mask})).scheme is None


@pytest.mark.parametrize("other", [255, 254, 128])
def test_0_1_beside_0_255_names_both_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: int) -> None:
    data = write(
        tmp_path / "data", {name: disc(16) * np.uint8(value) for name, value in (("a", 1), ("b", other), ("c", 1))}
    )
    found = segkit.check(data, estimate=False)
    assert found.cohort.scheme is None
    assert f"1 in 2 (a.png, c.png) and {other} in 1 (b.png)" in found.problems[0].found
    monkeypatch.chdir(tmp_path)
    assert run_segkit(*shlex.split(found.next_command)[1:]) == 0
    assert all(np.array_equal(read_labels(tmp_path / "data-masks" / f"{name}.png")[0], disc(16)) for name in "abc")


def test_volumes_have_the_same_rules(tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", 255)):
        save_nifti(tmp_path / f"{name}.nii.gz", np.arange(512, dtype=np.int16).reshape(8, 8, 8))
        save_nifti(tmp_path / f"{name}_seg.nii.gz", np.repeat(disc(8)[..., None], 8, axis=2) * np.uint8(value))
    cohort = find_cases(tmp_path)
    assert cohort.scheme is None
    assert "1 in 1 (a_seg.nii.gz) and 255 in 1 (b_seg.nii.gz)" in cohort.problems[-1].found


@pytest.mark.parametrize(
    "values",
    [
        (255,),
        (1, 255),  # in one file: a class and what to ignore, as in PASCAL VOC
        (1, 2, 3, 255),
        (38, 75, 113, 150),
        (2, 3, 4, 41, 42, 43, 251, 252, 253, 254, 255),  # FreeSurfer
        (64, 128, 192, 255),
    ],
)
def test_classes_remain_classes(tmp_path: Path, values: tuple[int, ...]) -> None:
    mask = np.zeros((8, 32), np.uint8)
    mask[2:6, : len(values)] = values
    scheme = find_cases(write(tmp_path, {"a": mask, "b": mask})).scheme
    assert scheme is not None
    assert sorted(scheme.values.values()) == list(values)


def test_classes_of_different_files_remain_classes(tmp_path: Path) -> None:
    cohort = find_cases(write(tmp_path, {"a": disc(16) * np.uint8(1), "b": disc(16) * np.uint8(2)}))
    assert cohort.scheme is not None
    assert dict(cohort.scheme.values) == {"label_1": 1, "label_2": 2}
