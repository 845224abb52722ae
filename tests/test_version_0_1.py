"""Run folders, exports and checkpoints of version 0.1 open, and give the masks and scores they gave then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import read_voxels, run_segkit

OLD = Path(__file__).resolve().parent / "data" / "version_0_1"
CASES = ("BraTS-GLI-00001-000", "BraTS-GLI-00002-000")
MOST_MOVED = 3 * 2 * 0.004
"""Two runs of three steps of lr 0.004 may move a weight to opposite sides."""


@pytest.mark.parametrize(("model", "backend"), [("run", "torch"), ("run", "onnxruntime"), ("export", "onnxruntime")])
def test_masks_are_equal_voxel_by_voxel(model: str, backend: str, tmp_path: Path) -> None:
    """On any processor: no probability of these cases is closer than 0.0018 to the threshold of 0.5."""
    arguments = ("-m", OLD / model, "-i", OLD / "data", "-o", tmp_path, "--backend", backend, "-d", "cpu", "-q")
    assert run_segkit("infer", *arguments) == 0
    for case in CASES:
        expected = read_voxels(OLD / "masks" / backend / f"{case}.nii.gz")
        assert len(np.unique(expected)) > 2
        assert np.array_equal(read_voxels(tmp_path / f"{case}.nii.gz"), expected)


def test_scores_are_equal(tmp_path: Path) -> None:
    assert run_segkit("evaluate", "-p", OLD / "masks" / "torch", "-r", OLD / "data", "-o", tmp_path, "-q") == 0
    found, expected = (json.loads((folder / "scores.json").read_text()) for folder in (tmp_path, OLD))
    places = {"predictions", "references"}  # relative to the folder of the scores
    assert set(found) - places == set(expected) - places
    assert {key: found[key] for key in found if key not in places} == {
        key: expected[key] for key in expected if key not in places
    }


def test_a_stopped_training_continues_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Three steps of version 0.1, three of this one with other patches: nearly the weights of six of version 0.1.

    A step of AdamW moves a weight by about lr (0.004) at most; weights that were begun again would be far away.
    """
    run = tmp_path / "stopped"
    shutil.copytree(OLD / "stopped", run)
    rows = (run / "metrics.jsonl").read_text().splitlines()
    assert run_segkit("train", OLD / "data", "-o", run, "-f", 1, "--resume", "-d", "cpu") == 0
    assert "the run was started by segkit 0.1, whose random patches and views differ" in caplog.text
    ours, theirs = load_file(run / "model.safetensors"), load_file(OLD / "whole.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=MOST_MOVED)
    assert any(not torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    resumed = (run / "metrics.jsonl").read_text().splitlines()
    assert resumed[: len(rows)] == rows
    assert json.loads(resumed[-1])["step"] == 6
