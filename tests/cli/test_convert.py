from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import PIL.Image
import pytest

from segkit.errors import DataError
from segkit.reading.files import read_labels
from segkit.reading.layouts.table import find_cases
from tests.helpers import LPS, run_segkit, save_nifti


def _save(path: Path, affine: Any = LPS, values: tuple[int, ...] = (5, 6)) -> None:
    array = np.zeros((4, 4, 4), np.int16)
    array[1, 1, : len(values)] = values
    save_nifti(path, array, affine)


def _brats2024(root: Path) -> Path:
    folder = root / "BraTS-GLI-00001-100"
    for suffix in ("t1n", "t1c", "t2w", "t2f"):
        _save(folder / f"{folder.name}-{suffix}.nii.gz")
    _save(folder / f"{folder.name}-seg.nii.gz", values=(1, 2, 3, 4))
    return folder


def _convert(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_segkit("convert", *arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _first_values(path: Path, count: int = 4) -> list[int]:
    return [int(value) for value in np.asarray(nib.load(path).dataobj)[1, 1, :count]]


def test_labels_go_by_tissue_and_what_is_lost_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _brats2024(tmp_path / "in")
    out = tmp_path / "out"
    code, text, _ = _convert(capsys, "labels", str(tmp_path / "in"), "-o", str(out), "--to", "msd-brats", "--json")
    assert code == 0
    # 2024: NCR 1, ED 2, ET 3, RC 4; Decathlon: ED 1, NCR 2, ET 3.
    assert _first_values(out / "BraTS-GLI-00001-100.nii.gz") == [2, 1, 3, 0]
    assert json.loads(text)["cases"][0]["detail"] == "msd-brats has no RC: now background"
    assert json.loads((out / "label_scheme.json").read_text())["name"] == "msd-brats"


def test_existing_copies_are_kept_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _brats2024(tmp_path / "in")
    out = tmp_path / "out"
    _save(out / "BraTS-GLI-00001-100.nii.gz", values=(9,))
    arguments = ("labels", str(tmp_path / "in"), "-o", str(out), "--to", "brats2023")
    assert "kept" in _convert(capsys, *arguments)[1]
    assert _first_values(out / "BraTS-GLI-00001-100.nii.gz", 1) == [9]
    _convert(capsys, *arguments, "--overwrite")
    assert _first_values(out / "BraTS-GLI-00001-100.nii.gz") == [1, 2, 3, 0]


def test_stray_values_fail_their_case_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _brats2024(tmp_path / "in")
    _save(folder / f"{folder.name}-seg.nii.gz", values=(1, 7))
    for suffix in ("t1n", "seg"):
        _save(tmp_path / "in" / "BraTS-GLI-00002-100" / f"BraTS-GLI-00002-100-{suffix}.nii.gz", values=(1,))
    out = tmp_path / "out"
    code, text, _ = _convert(capsys, "labels", str(tmp_path / "in"), "-o", str(out), "--to", "brats2023", "--json")
    assert code == 1
    assert [case["status"] for case in json.loads(text)["cases"]] == ["failed", "done"]
    assert "holds label values 7" in json.loads(text)["cases"][0]["detail"]
    assert not (out / "BraTS-GLI-00001-100.nii.gz").exists()


def test_wrong_requests_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _brats2024(tmp_path / "in")
    data = str(tmp_path / "in")
    code, _, err = _convert(capsys, "labels", data, "-o", str(tmp_path / "out"), "--to", "brats1999")
    assert (code, (tmp_path / "out").exists()) == (2, False)
    assert "there is no label scheme 'brats1999'" in err
    code, _, err = _convert(capsys, "headers", data, "-o", str(tmp_path / "in" / "out"))
    assert code == 2
    assert "inside the data folder" in err


def test_headers_are_repaired_and_the_rest_is_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _brats2024(tmp_path / "in")
    _save(folder / f"{folder.name}-t2w.nii.gz", np.eye(4), (8, 9))
    _save(folder / "seg-algorithm.nii.gz", np.eye(4), (1, 2))
    out = tmp_path / "out"
    code, text, _ = _convert(capsys, "headers", str(tmp_path / "in"), "-o", str(out), "--json")
    assert code == 0
    detail = json.loads(text)["cases"][0]["detail"]
    assert detail == "repaired BraTS-GLI-00001-100-t2w.nii.gz, seg-algorithm.nii.gz"
    copy = out / folder.name
    assert sorted(path.name for path in copy.iterdir()) == sorted(path.name for path in folder.iterdir())
    for path in copy.iterdir():
        np.testing.assert_array_equal(nib.load(path).affine, LPS)
    assert _first_values(copy / f"{folder.name}-t2w.nii.gz", 2) == [8, 9]
    untouched = f"{folder.name}-t1c.nii.gz"
    assert (copy / untouched).read_bytes() == (folder / untouched).read_bytes()
    assert find_cases(out).cases[0].problems == ()


def test_the_majority_of_modalities_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _brats2024(tmp_path / "in")
    _save(folder / f"{folder.name}-t1n.nii.gz", np.eye(4))
    _convert(capsys, "headers", str(tmp_path / "in"), "-o", str(tmp_path / "out"))
    repaired = nib.load(tmp_path / "out" / folder.name / f"{folder.name}-t1n.nii.gz")
    np.testing.assert_array_equal(repaired.affine, LPS)


def test_another_scan_is_not_forced_onto_the_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _brats2024(tmp_path / "in")
    _save(folder / f"{folder.name}-t2w.nii.gz", np.diag([-2.0, -2.0, 3.0, 1.0]))
    code, text, _ = _convert(capsys, "headers", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--json")
    assert code == 1
    assert "more than its header differs" in json.loads(text)["cases"][0]["detail"]


def test_references_beside_the_given_folder_are_copied_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _save(tmp_path / "set" / "imagesTr" / "a_0000.nii.gz")
    _save(tmp_path / "set" / "labelsTr" / "a.nii.gz", values=(1,))
    out = tmp_path / "out"
    code, _, _ = _convert(capsys, "headers", str(tmp_path / "set" / "imagesTr"), "-o", str(out))
    assert code == 0
    assert (out / "a_0000.nii.gz").is_file()
    assert (out / "labelsTr" / "a.nii.gz").is_file()


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
def test_values_beyond_labels_are_mapped_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: Any
) -> None:
    masks = {"p1": (205, 420, 0, 0), "p2": (550, 205, -1, 0) if dtype != np.uint16 else (550, 205, 600, 0)}
    for case, values in masks.items():
        array = np.zeros((4, 4, 4), dtype)
        _save(tmp_path / "in" / f"{case}.nii.gz")
        array[1, 1] = values
        save_nifti(tmp_path / "in" / f"{case}_seg.nii.gz", array, LPS)
    with pytest.raises(DataError, match=r"no labels: .*convert labels DATA -o MASKS --values 205=1 --values 420=2"):
        read_labels(tmp_path / "in" / "p1_seg.nii.gz")
    out, arguments = tmp_path / "out", ["--values", "205=1", "--values", "420=2", "--values", "500-600=3"]
    code, text, _ = _convert(capsys, "labels", str(tmp_path / "in"), "-o", str(out), *arguments, "--json")
    assert _first_values(out / "p1.nii.gz") == [1, 2, 0, 0]
    if dtype == np.uint16:
        assert (code, _first_values(out / "p2.nii.gz")) == (0, [3, 1, 3, 0])
        return
    assert code == 1
    assert "p2_seg.nii.gz: holds values that no --values maps: -1" in json.loads(text)["cases"][1]["detail"]
    code, _, _ = _convert(capsys, "labels", str(tmp_path / "in"), "-o", str(out), *arguments, "--values=-1=0")
    assert (code, _first_values(out / "p2.nii.gz")) == (0, [3, 1, 0, 0])


def _save_channels(path: Path, planes: list[list[int]]) -> None:
    array = np.zeros((4, 4, 4, len(planes)), np.uint8)
    array[1, 1] = np.transpose(planes)
    save_nifti(path, array, LPS)


@pytest.mark.parametrize("has_background", [False, True])
def test_one_mask_per_class_is_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str], has_background: bool) -> None:
    _save(tmp_path / "in" / "p1.nii.gz")
    path = tmp_path / "in" / "p1_seg.nii.gz"
    _save_channels(path, [[1, 0, 0, 0], [0, 1, 1, 0]])
    if has_background:
        classes = np.asarray(nib.load(path).dataobj)
        save_nifti(
            path, np.concatenate([1 - classes.sum(axis=-1, keepdims=True), classes], axis=-1).astype(np.uint8), LPS
        )
    with pytest.raises(DataError, match=r"the mask holds [23] channels.*one-hot.*segkit convert labels"):
        read_labels(path)
    arguments = ["labels", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--values", "1=1", "--values", "2=5"]
    assert _convert(capsys, *arguments)[0] == 0
    assert _first_values(tmp_path / "out" / "p1.nii.gz") == [1, 5, 5, 0]
    _save_channels(path, [[1, 1, 0, 0], [0, 1, 1, 0]])
    assert _convert(capsys, *arguments, "--overwrite")[0] == 1


@pytest.mark.parametrize(
    "arguments", [["--values", "1=x"], ["--values", "1=256"], ["--values", "1=1", "--to", "brats2023"], []]
)
def test_values_that_cannot_be_read(tmp_path: Path, arguments: list[str]) -> None:
    _brats2024(tmp_path / "in")
    assert run_segkit("convert", "labels", tmp_path / "in", "-o", tmp_path / "out", *arguments) == 2


def test_the_command_of_the_message_maps_one_voxel_of_minus_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _save(tmp_path / "DATA" / "p1.nii.gz")
    _save(tmp_path / "DATA" / "p1_seg.nii.gz", values=(1, 2, -1))
    with pytest.raises(DataError, match=r"1 voxels hold values that are no labels: -1") as error:
        read_labels(tmp_path / "DATA" / "p1_seg.nii.gz")
    _, *words = shlex.split(error.value.remedy.split("`")[1])
    assert _convert(capsys, *words[1:])[0] == 0
    assert _first_values(tmp_path / "MASKS" / "p1.nii.gz") == [1, 2, 0, 0]


def test_pictures_of_16_bits_are_mapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = np.zeros((8, 8), np.uint16)
    mask[0, :2] = 1001, 2035
    for folder, array in (("images", np.arange(64, dtype=np.uint8).reshape(8, 8)), ("masks", mask)):
        (tmp_path / "in" / folder).mkdir(parents=True)
        PIL.Image.fromarray(array).save(tmp_path / "in" / folder / "a.png")
    with pytest.raises(DataError, match=r"--values 1001=1 --values 2035=2"):
        read_labels(tmp_path / "in" / "masks" / "a.png")
    arguments = [
        "labels",
        str(tmp_path / "in"),
        "-o",
        str(tmp_path / "out"),
        "--values",
        "1001=1",
        "--values",
        "2035=2",
    ]
    assert _convert(capsys, *arguments)[0] == 0
    assert read_labels(tmp_path / "out" / "a.png")[0][0].tolist() == [1, 2, 0, 0, 0, 0, 0, 0]
