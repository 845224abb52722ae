"""Holes filled on a real Ray cluster of one node: the same images, maps and bank, whatever becomes of a worker."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from segkit.batch.ray_executor import RayExecutor, Share
from segkit.batch.runner import run_folder
from segkit.batch.worker import LocalExecutor
from segkit.inpainting.inpaint import Inpaint, InpaintPlan
from segkit.inpainting.masks import masks_of_cohort
from segkit.inpainting.predictor import InpaintingPredictor
from segkit.phantoms.layouts import write_inpainting_phantoms
from segkit.reading.layouts.brats import find_voided
from tests.helpers import run_segkit

WriteInpainter = Callable[[str], Path]
VoxelsAndHeaders = Callable[[Path], dict[str, tuple[bytes, bytes]]]
CASES = ("BraTS-GLI-00001-000", "BraTS-GLI-00002-000", "BraTS-GLI-00003-000")

pytestmark = pytest.mark.usefixtures("cluster")


@dataclass(frozen=True)
class DeadlyOnce(InpaintPlan):
    """Ends the first process that receives it; `mark` is a file that tells the next ones."""

    mark: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        task = InpaintPlan(**{field.name: getattr(self, field.name) for field in fields(InpaintPlan)})
        # Classes and functions of a test module cannot be unpickled by name.
        received = "task if os.path.exists(mark) else os.close(os.open(mark, os.O_CREAT)) or os._exit(1)"
        return eval, (received, {"os": os, "mark": self.mark, "task": task})


@dataclass(frozen=True)
class Killing:
    """An executor whose second task kills the worker that begins it."""

    executor: RayExecutor
    mark: Path

    def map(self, work: Any, tasks: Iterable[Any]) -> Iterator[Any]:
        first, second, *others = tasks
        known = {field.name: getattr(second, field.name) for field in fields(InpaintPlan)}
        return self.executor.map(work, [first, DeadlyOnce(**known, mark=str(self.mark)), *others])


def test_the_same_images_maps_and_bank_as_here_though_a_worker_dies(
    inpainter: WriteInpainter, tmp_path: Path, voxels_and_headers: VoxelsAndHeaders
) -> None:
    predictor = InpaintingPredictor.load(inpainter("t1n"), "cpu", "onnxruntime", threads=1)
    written = write_inpainting_phantoms(tmp_path / "scans", (1, 2, 3), size=32)
    cohort = find_voided(tmp_path / "scans")
    documents = {}
    for name in ("local", "ray"):
        out, bank = tmp_path / name / "out", tmp_path / name / "bank"
        remote = Killing(RayExecutor([out, bank], Share(1), workers=1, results="files"), tmp_path / "killed")
        holes = masks_of_cohort(cohort, tmp_path / "scans")
        documents[name] = run_folder(
            Inpaint(predictor, holes, save_holes=True, anomaly=True, bank=bank),
            cohort,
            out,
            executor=LocalExecutor() if name == "local" else remote,
        )
        assert json.loads((out / "manifest.json").read_text()) == json.loads(json.dumps(documents[name]))
    assert (tmp_path / "killed").exists()
    by_case = {entry["case"]: entry for entry in documents["ray"]["cases"]}
    assert {case: entry["status"] for case, entry in by_case.items()} == dict.fromkeys(CASES, "done")
    assert by_case[CASES[1]]["made_up_voxels"] == documents["local"]["cases"][1]["made_up_voxels"] > 0
    expected = voxels_and_headers(tmp_path / "local")
    assert len(expected) == 3 * (3 + 2)  # the image, the hole and the map; image and hole of the bank
    assert voxels_and_headers(tmp_path / "ray") == expected
    assert (tmp_path / "ray/bank/bank.json").read_bytes() == (tmp_path / "local/bank/bank.json").read_bytes()
    others = [path.name for path in (tmp_path / "ray").rglob("*") if path.is_file() and path.suffix != ".gz"]
    assert sorted(others) == ["bank.json", "manifest.json"]
    for case in written:
        whole, filled = (
            np.asarray(nib.load(path).dataobj)
            for path in (case.images["t1n"], tmp_path / "ray" / "out" / f"{case.case}-t1n-inference.nii.gz")
        )
        known = np.asarray(nib.load(case.label).dataobj) == 0
        assert np.array_equal(whole[known], filled[known])
        assert not np.array_equal(whole, filled)


def test_lesions_that_a_model_finds_as_a_user_types_it(
    inpainter: WriteInpainter,
    export: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    voxels_and_headers: VoxelsAndHeaders,
) -> None:
    """Paths are relative to a folder where no worker is, and the two engines go on with each other's work."""
    monkeypatch.chdir(tmp_path)
    command = [
        "inpaint",
        "-m",
        inpainter("t1c").name,
        "-i",
        data.name,
        "--lesions",
        export.name,
        "--margin",
        "0",
        "-d",
        "cpu",
    ]
    command += ["--threads", "1", "--backend", "onnxruntime", "--bank", "bank", "--json"]
    remote = ["--engine", "ray", "--workers", "1", "--results", "store"]
    documents = []
    for options in (["-o", "local"], ["-o", "ray", *remote], ["-o", "ray"], ["-o", "local", *remote]):
        assert run_segkit(*command, *options) == 1  # for the case that is no image
        documents.append(json.loads(capfd.readouterr().out))
    counts = [{status: document["summary"][status] for status in ("done", "skipped")} for document in documents]
    assert counts == [{"done": 3, "skipped": 0}] * 2 + [{"done": 0, "skipped": 3}] * 2
    assert all(entry["made_up_voxels"] > 0 for entry in documents[1]["cases"] if entry["status"] == "done")
    expected = voxels_and_headers(tmp_path / "local")
    assert len(expected) == 3 * 2
    assert voxels_and_headers(tmp_path / "ray") == expected
    assert documents[1]["holes"]["from"] == export.name
