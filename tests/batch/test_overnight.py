"""What happens to a folder overnight: bad cases of every kind, a full disk, a killed process."""

from __future__ import annotations

import errno
import gzip
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import segkit
from segkit.batch import segment
from segkit.batch.cases import find_input
from segkit.batch.runner import run_folder
from segkit.batch.segment import Segment
from segkit.batch.worker import LocalExecutor
from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.model import save_model
from segkit.errors import DataError
from segkit.inference.predictor import Predictor
from segkit.labels import SCHEMES, outputs_of
from segkit.reading.files import _host
from segkit.runtime import variables_with

MakeRun = Callable[..., Path]
KINDS = ("truncated", "huge", "nan", "missing", "shapes", "dtype")


def spoil(case: Path, kind: str) -> None:
    """Make a case of t1c and t2f bad in its own way."""
    path = case / f"{case.name}_t1ce.nii.gz"
    image = nib.load(path)
    values = image.get_fdata(dtype=np.float32)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    elif kind == "huge":
        block = bytearray(gzip.decompress(path.read_bytes()))
        block[40:56] = struct.pack("<8h", 3, 10000, 10000, 10000, 1, 1, 1, 1)
        path.write_bytes(gzip.compress(bytes(block)))
    elif kind == "missing":
        path.unlink()
    elif kind == "dtype":
        nib.save(nib.Nifti1Image(values.astype(np.complex64), image.affine), path)
    else:
        values = np.where(values == 1, np.nan, values) if kind == "nan" else values[:-1]
        nib.save(nib.Nifti1Image(values, image.affine), path)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_cases_of_every_kind_are_named_and_the_others_done(
    make_run: MakeRun, tmp_path: Path, scans: Any, workers: int
) -> None:
    for number, kind in enumerate(("good", *KINDS, "fine"), start=1):
        images = {"t1c": scans.stairs() / 2, "t2f": scans.stairs() / 2}
        case = scans.write_case(tmp_path / "data", f"BraTS2021_0000{number}", images)
        if kind in KINDS:
            spoil(case, kind)
    predictor, out = Predictor.load(make_run(modalities=("t1c", "t2f"))), tmp_path / "out"
    manifest = run_folder(Segment(predictor), find_input(tmp_path / "data"), out, executor=LocalExecutor(workers))
    assert manifest["summary"]["done"] == 2
    reasons = {entry["case"][-1]: entry["error"] for entry in manifest["cases"] if entry["error"]}
    expected = (
        "truncated or damaged",
        "1.0e+12 voxels",
        "NaN or infinite",
        "t1c is missing",
        "the grid of",
        "complex64",
    )
    assert len(reasons) == len(expected)
    for number, text in enumerate(expected, start=2):
        assert text in reasons[str(number)]
    assert sorted(path.name for path in out.glob("*.nii.gz")) == ["BraTS2021_00001.nii.gz", "BraTS2021_00008.nii.gz"]


def test_a_disk_that_is_full_costs_only_what_did_not_fit(
    make_run: MakeRun, tmp_path: Path, scans: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2, 3):
        scans.write_case(tmp_path / "data", f"BraTS2021_0000{number}", {"t1c": scans.stairs()})
    whole = segment.write_labels

    def full(path: Path, *arguments: Any) -> None:
        if path.name.startswith("BraTS2021_00002"):
            raise DataError("the disk is full", where=path) from OSError(errno.ENOSPC, "No space left on device")
        whole(path, *arguments)

    monkeypatch.setattr(segment, "write_labels", full)
    manifest = run_folder(Segment(Predictor.load(make_run())), find_input(tmp_path / "data"), tmp_path / "out")
    assert [entry["status"] for entry in manifest["cases"]] == ["done", "failed", "done"]
    assert "the disk is full" in manifest["cases"][1]["error"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_run_leaves_whole_masks_and_goes_on(tmp_path: Path, scans: Any) -> None:
    scheme, cases = SCHEMES["brats2017"], 40
    network = segkit.build_model("revmbunet", size="tiny", in_channels=1, out_channels=3)
    torch.nn.init.normal_(network.heads[0].weight)
    document = {
        "network": {"family": "revmbunet", "size": "tiny", "in_channels": 1, "out_channels": 3},
        "modalities": ["t1c"],
        "patch_size": [16, 16, 16],
        "divisor": list(network.divisor),
        "activation": "sigmoid",
        "outputs": [{"name": o.name, "label": o.label, "members": o.members} for o in outputs_of(scheme)],
        "label_scheme": scheme.to_json(),
        "training_data": {"identity": "none", "cases": 0},
    }
    run, out = tmp_path / "run", tmp_path / "out"
    save_model(run, network.state_dict(), ModelCard.model_validate(document))
    for number in range(1, cases + 1):
        values = np.random.default_rng(number).normal(500, 100, (24, 24, 24)).astype(np.float32)
        scans.write_case(tmp_path / "data", f"BraTS2021_{number:05d}", {"t1c": values})
    arguments = ["infer", "-m", run, "-i", tmp_path / "data", "-o", out, "-d", "cpu", "--backend", "torch", "-q"]
    command = [sys.executable, "-m", "segkit", *map(str, arguments)]
    environment = variables_with(PYTHONPATH=str(Path(segkit.__file__).parents[1]))
    process = subprocess.Popen(command, env=environment)
    until = time.monotonic() + 120
    while len(list(out.glob("[!.]*.nii.gz"))) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (out / f".{_host()}-{process.pid}-0123456789ab.nii.gz").write_bytes(b"half a mask")  # as if it had been writing
    finished = {path: path.stat().st_mtime_ns for path in out.glob("[!.]*.nii.gz")}
    assert 3 <= len(finished) < cases
    for path in finished:
        assert np.asarray(nib.load(path).dataobj).shape == (24, 24, 24)
    manifest = run_folder(Segment(Predictor.load(run)), find_input(tmp_path / "data"), out)
    skipped = [entry["case"] for entry in manifest["cases"] if entry["status"] == "skipped"]
    assert manifest["summary"]["failed"] == 0
    assert len(finished) - 2 <= len(skipped) <= len(finished)  # the records of the last ones may be lost
    assert all((out / f"{case}.nii.gz").stat().st_mtime_ns == finished[out / f"{case}.nii.gz"] for case in skipped)
    assert len(list(out.glob("[!.]*.nii.gz"))) == cases
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
