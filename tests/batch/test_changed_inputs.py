"""A scan that was replaced since its result was made: its case alone is computed again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segkit.batch.manifest import CaseRecord, InputFile, Manifest
from segkit.phantoms.layouts import write_inpainting_phantoms
from tests.helpers import run_segkit, save_nifti

CASES = [f"BraTS2021_0000{number}" for number in (1, 2, 3)]


def scan_of(data: Path, case: str) -> Path:
    return data / case / f"{case}_t1ce.nii"


def replace_scan(path: Path, seed: int, *, keep_size: bool = True) -> None:
    """Write other voxels, of another size unless `keep_size`."""
    shape = (24, 20, 18) if keep_size else (26, 20, 18)
    save_nifti(path, np.random.default_rng(seed).normal(500, 100, shape).astype(np.float32))


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Three cases whose files are not compressed, so that all have one size."""
    for number, case in enumerate(CASES):
        replace_scan(scan_of(tmp_path / "scans", case), number)
    return tmp_path / "scans"


@pytest.fixture
def infer(export: Path, scans: Path, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Runs `segkit infer` on the scans; returns the status of each case."""

    def run(*options: object, manifest: str = "manifest.json", models: tuple[Path, ...] = ()) -> dict[str, str]:
        named = [word for model in (models or (export,)) for word in ("-m", model)]
        command = ("infer", *named, "-i", scans, "-o", tmp_path / "out", "--workers", 0, "--backend", "onnxruntime")
        assert run_segkit(*command, *options) == 0
        document = json.loads((tmp_path / "out" / manifest).read_text())
        return {entry["case"]: entry["status"] for entry in document["cases"]}

    return run


def all_skipped_but(*computed: str) -> dict[str, str]:
    return dict.fromkeys(CASES, "skipped") | dict.fromkeys(computed, "done")


@pytest.mark.parametrize("keep_size", [True, False])
def test_one_replaced_scan(
    infer: Callable[..., dict[str, str]],
    scans: Path,
    tmp_path: Path,
    keep_size: bool,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert infer() == dict.fromkeys(CASES, "done")
    before = {case: (tmp_path / "out" / f"{case}.nii.gz").read_bytes() for case in CASES}
    replace_scan(scan_of(scans, CASES[1]), 7, keep_size=keep_size)
    assert infer("--dry-run") == dict.fromkeys(CASES, "done")
    assert capsys.readouterr().out.count("planned") == 1
    caplog.clear()
    assert infer() == all_skipped_but(CASES[1])
    assert caplog.text.count("has changed since its result was made") == 1
    assert f"{CASES[1]}: {CASES[1]}_t1ce.nii has changed" in caplog.text
    after = {case: (tmp_path / "out" / f"{case}.nii.gz").read_bytes() for case in CASES}
    assert [case for case in CASES if before[case] != after[case]] == [CASES[1]]
    assert infer() == all_skipped_but()


def test_equal_size_and_time_are_taken_for_equal_contents(infer: Callable[..., dict[str, str]], scans: Path) -> None:
    infer()
    times = scan_of(scans, CASES[0]).stat()
    replace_scan(scan_of(scans, CASES[0]), 7)
    os.utime(scan_of(scans, CASES[0]), ns=(times.st_atime_ns, times.st_mtime_ns))
    assert infer() == all_skipped_but()


def test_another_time_alone_changes_nothing_and_is_taken_down(
    infer: Callable[..., dict[str, str]], scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer()
    for case in CASES:
        os.utime(scan_of(scans, case), (1, 1))
    assert infer() == all_skipped_but()
    monkeypatch.setattr("segkit.batch.manifest.file_sha256", None)  # contents are not read again
    assert infer() == all_skipped_but()


def test_results_of_an_earlier_version_are_kept_with_one_warning(
    infer: Callable[..., dict[str, str]], scans: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    infer()
    path = tmp_path / "out" / "manifest.json"
    document = json.loads(path.read_text())
    for entry in document["cases"]:
        del entry["inputs"], entry["recorded"]
    path.write_text(json.dumps(document))
    replace_scan(scan_of(scans, CASES[0]), 7)
    caplog.clear()
    assert infer() == all_skipped_but()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "3 results of an earlier version" in warning
    assert "--overwrite" in warning
    replace_scan(scan_of(scans, CASES[2]), 8)
    caplog.clear()
    assert infer() == all_skipped_but(CASES[2])
    assert "--overwrite" not in caplog.text


def test_parts_and_the_whole_know_the_latest_result(infer: Callable[..., dict[str, str]], scans: Path) -> None:
    infer()
    replace_scan(scan_of(scans, CASES[1]), 7)
    part = ("--num-parts", 2, "--part-id", 1)
    assert infer(*part, manifest="manifest_part_1_of_2.json") == {CASES[1]: "done"}
    assert infer(*part, manifest="manifest_part_1_of_2.json") == {CASES[1]: "skipped"}
    assert infer() == all_skipped_but()
    replace_scan(scan_of(scans, CASES[1]), 1)  # as it was at first, when the manifest of the whole was written
    assert infer() == all_skipped_but(CASES[1])


def test_an_ensemble(infer: Callable[..., dict[str, str]], export: Path, scans: Path, tmp_path: Path) -> None:
    models = (export, shutil.copytree(export, tmp_path / "second"))
    infer(models=models)
    replace_scan(scan_of(scans, CASES[2]), 7)
    assert infer(models=models) == all_skipped_but(CASES[2])


def test_holes_are_inputs_of_inpainting(inpainter: Callable[[str], Path], tmp_path: Path) -> None:
    model = inpainter("t1n")
    write_inpainting_phantoms(tmp_path / "scans", (1, 2), size=32)

    def run() -> list[str]:
        out = tmp_path / "out"
        command = ("inpaint", "-m", model, "-i", tmp_path / "scans", "-o", out, "--backend", "onnxruntime")
        assert run_segkit(*command) == 0
        return [entry["status"] for entry in json.loads((out / "manifest.json").read_text())["cases"]]

    assert run() == ["done", "done"]
    assert run() == ["skipped", "skipped"]
    (mask,) = (tmp_path / "scans").rglob("*00002*-mask.nii.gz")
    image = nib.load(mask)
    smaller = np.asarray(image.dataobj).copy()
    smaller[: smaller.shape[0] // 2] = 0
    nib.save(nib.Nifti1Image(smaller, image.affine, image.header), mask)
    assert run() == ["skipped", "done"]


def test_an_image_in_several_files(tmp_path: Path) -> None:
    series = tmp_path / "series"
    series.mkdir()
    for name in "ab":
        (series / f"{name}.dcm").write_bytes(name.encode())
    first = InputFile.of(series)
    assert InputFile.of(series) == first
    (series / "b.dcm").write_bytes(b"c")
    assert InputFile.of(series).sha256 != first.sha256
    header = tmp_path / "scan.mhd"
    header.write_text("NDims = 3\nElementDataFile = voxels.raw\n")
    (tmp_path / "voxels.raw").write_bytes(b"1")
    of_header = InputFile.of(header)
    (tmp_path / "voxels.raw").write_bytes(b"2")
    assert InputFile.of(header).sha256 != of_header.sha256 != ""
    assert InputFile.of(tmp_path / "gone.nii") == InputFile("gone.nii")


def test_of_several_records_the_latest_result_counts(tmp_path: Path) -> None:
    one, two = (InputFile("scan.nii", stamp, stamp) for stamp in "ab")
    whole = Manifest(tmp_path, ["x"], {}, "m1")
    whole.add(CaseRecord("x", "done", model="m1", inputs=(one,)))
    part = Manifest(tmp_path, ["x"], {}, "m1", "part_0_of_2")
    part.add(CaseRecord("x", "done", model="m1", inputs=(two,)))
    Manifest(tmp_path, ["x"], {}, "m1", "part_1_of_2").add(CaseRecord("x", "failed", "why", model="m1"))
    assert Manifest(tmp_path, ["x"], {}, "m1").inputs_of("x") == [{"name": "scan.nii", "stamp": "b", "sha256": "b"}]
