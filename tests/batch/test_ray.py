"""Cases on a real Ray cluster of one node, two cores of it: the same masks, whatever becomes of a worker."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from segkit.batch.cases import find_input, plan_cases
from segkit.batch.ray_executor import RayExecutor, Share
from segkit.batch.runner import open_manifest, run_folder
from segkit.batch.segment import Segment, SegmentPlan
from segkit.batch.worker import CaseWorker
from segkit.errors import RequestError
from segkit.inference.predictor import Predictor
from tests.helpers import run_segkit

VoxelsAndHeaders = Callable[[Path], dict[str, tuple[bytes, bytes]]]

ONE_CORE = Share(1)

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.mark.parametrize("results", ["auto", "store"])
def test_the_same_masks_as_here(
    export: Path, data: Path, tmp_path: Path, results: Any, voxels_and_headers: VoxelsAndHeaders
) -> None:
    predictor, cohort = Predictor.load(export, backend="onnxruntime", threads=1), find_input(data)

    run_folder(Segment(predictor, save_probabilities=True), cohort, tmp_path / "local")
    told: list[str] = []
    manifest = run_folder(
        Segment(predictor, save_probabilities=True),
        cohort,
        tmp_path / "ray",
        executor=RayExecutor([tmp_path / "ray"], ONE_CORE, results=results),
        on_record=lambda record: told.append(record.case),
    )
    expected = voxels_and_headers(tmp_path / "local")
    assert len(expected) == 3 * (1 + 3)
    assert voxels_and_headers(tmp_path / "ray") == expected
    assert json.loads((tmp_path / "ray" / "manifest.json").read_text()) == json.loads(json.dumps(manifest))
    by_case = {entry["case"]: entry for entry in manifest["cases"]}
    assert sorted(told) == sorted(by_case) == [f"BraTS2021_0000{number}" for number in (1, 2, 3, 4)]
    assert [by_case[case]["status"] for case in sorted(by_case)] == ["done", "done", "done", "failed"]
    assert "BraTS2021_00004_t1ce.nii.gz" in by_case["BraTS2021_00004"]["error"]
    left = [path.name for path in (tmp_path / "ray").iterdir() if path.name.startswith(".")]
    assert left == []


@dataclass(frozen=True)
class DeadlyPlan(SegmentPlan):
    """Ends the process that receives it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


def test_a_case_that_kills_its_workers_fails_and_the_others_are_done(
    export: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    predictor, cohort = Predictor.load(export, backend="onnxruntime", threads=1), find_input(data)
    task = Segment(predictor)
    plans, _ = plan_cases(task, cohort, tmp_path / "out", open_manifest(task, cohort, tmp_path / "out"))
    deadly = DeadlyPlan(**{field.name: getattr(plans[1], field.name) for field in fields(SegmentPlan)})
    executor = RayExecutor([tmp_path / "out"], ONE_CORE)
    records = {record.case[-1]: record for record in executor.map(CaseWorker(task), [plans[0], deadly, plans[2]])}
    assert {case: record.status for case, record in records.items()} == {"1": "done", "2": "failed", "3": "done"}
    error = records["2"].error
    assert error is not None
    assert error.startswith("started 3 times without an answer (")
    assert error.count("the worker process died") == 3
    assert capfd.readouterr().out == ""


def test_an_image_that_is_gone_fails_its_case_and_names_the_node(export: Path, data: Path, tmp_path: Path) -> None:
    predictor, cohort = Predictor.load(export, backend="onnxruntime", threads=1), find_input(data)
    path = data / "BraTS2021_00002" / "BraTS2021_00002_t1ce.nii.gz"
    path.unlink()
    executor = RayExecutor([tmp_path / "out"], ONE_CORE)
    manifest = run_folder(Segment(predictor), cohort, tmp_path / "out", executor=executor)
    errors = {entry["case"][-1]: entry["error"] for entry in manifest["cases"]}
    assert (errors["1"], errors["3"]) == (None, None)
    assert "node" in errors["2"]
    assert f"has no file {path}" in errors["2"]


def test_a_node_with_other_versions_is_named(
    export: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segkit.batch.ray_executor.decisive_versions", lambda: {"numpy": "1.0"})
    executor = RayExecutor([tmp_path / "out"], ONE_CORE)
    with pytest.raises(RequestError, match=r"no node .* can do this: .*, node \w+\) has numpy .* instead of 1\.0"):
        run_folder(
            Segment(Predictor.load(export, backend="onnxruntime")),
            find_input(data),
            tmp_path / "out",
            executor=executor,
        )


def test_a_node_too_small_is_named(export: Path, data: Path, tmp_path: Path) -> None:
    executor = RayExecutor([tmp_path / "out"], Share(64))
    with pytest.raises(RequestError, match=r"no node .* has room .* has 2 CPUs, 0 GPUs; expected 64 CPUs on one node"):
        run_folder(
            Segment(Predictor.load(export, backend="onnxruntime")),
            find_input(data),
            tmp_path / "out",
            executor=executor,
        )
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["summary"]["remaining"] == 4


def test_as_a_user_types_it(export: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["infer", "-m", export, "-i", data, "-o", tmp_path / "out", "-d", "cpu", "--json"]
    options = ["--engine", "ray", "--threads", "1", "--workers", "1"]
    assert run_segkit(*command, *options) == 1  # for the case that is no image
    captured = capfd.readouterr()
    assert json.loads(captured.out)["summary"]["done"] == 3
    assert "3 done, 0 skipped, 1 failed" in captured.err
    replaced = data / "BraTS2021_00002" / "BraTS2021_00002_t1ce.nii.gz"
    replaced.write_bytes((data / "BraTS2021_00001" / "BraTS2021_00001_t1ce.nii.gz").read_bytes())
    run_segkit(*command, *options)
    by_case = {entry["case"][-1]: entry["status"] for entry in json.loads(capfd.readouterr().out)["cases"]}
    assert by_case == {"1": "skipped", "2": "done", "3": "skipped", "4": "failed"}
    run_segkit(*command)  # without the cluster
    assert json.loads(capfd.readouterr().out)["summary"]["skipped"] == 3
