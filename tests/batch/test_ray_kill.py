"""A node of two is killed in the midst of a run: nothing is lost."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from segkit.batch.cases import find_input
from segkit.batch.manifest import CaseRecord
from segkit.batch.ray_executor import RayExecutor, Share
from segkit.batch.runner import run_folder
from segkit.batch.segment import Segment
from segkit.inference.predictor import Predictor

CASES = 40


@pytest.mark.slow
def test_a_node_that_dies_costs_no_case(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray = importlib.import_module("ray")
    options: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = importlib.import_module("ray.cluster_utils").Cluster(initialize_head=True, head_node_args=options)
    try:
        second = cluster.add_node(**{key: options[key] for key in ("num_cpus", "object_store_memory")})
        ray.init(cluster.address, log_to_driver=False, logging_level="error")
        for number in range(CASES):
            folder = tmp_path / "data" / f"BraTS2021_{number:05d}"
            folder.mkdir(parents=True)
            values = np.random.default_rng(number).normal(500, 100, (48, 40, 36)).astype(np.float32)
            nib.save(nib.Nifti1Image(values, np.eye(4)), folder / f"{folder.name}_t1ce.nii.gz")
        predictor, cohort = Predictor.load(export, backend="onnxruntime", threads=1), find_input(tmp_path / "data")
        run_folder(Segment(predictor), cohort, tmp_path / "local")
        told: list[str] = []

        def kill_second(record: CaseRecord) -> None:
            told.append(record.case)
            if len(told) == CASES // 4:
                assert len(ray.nodes()) == 2
                cluster.remove_node(second, allow_graceful=False)

        executor = RayExecutor([tmp_path / "ray"], Share(1))
        manifest = run_folder(Segment(predictor), cohort, tmp_path / "ray", executor=executor, on_record=kill_second)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert sorted(told) == [case.id for case in cohort.cases]
    assert {entry["status"] for entry in manifest["cases"]} == {"done"}
    assert json.loads((tmp_path / "ray" / "manifest.json").read_text()) == json.loads(json.dumps(manifest))
    for path in sorted((tmp_path / "local").glob("[!.]*.nii.gz")):
        here, there = nib.load(path), nib.load(tmp_path / "ray" / path.name)
        assert here.header.binaryblock == there.header.binaryblock
        assert np.array_equal(np.asarray(here.dataobj), np.asarray(there.dataobj))
