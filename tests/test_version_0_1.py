"""Run folders, exports and checkpoints of version 0.1 open, and give the masks, scores and weights they gave then."""

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
WEIGHT_TOLERANCE = 1e-6
"""Processors round differently: 6e-8 was measured between AVX-512 and SSE instructions."""


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


def test_a_stopped_training_ends_with_the_weights_of_a_whole_one(tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    shutil.copytree(OLD / "stopped", run)
    assert run_segkit("train", OLD / "data", "-o", run, "-f", 1, "--resume", "-d", "cpu", "-q") == 0
    ours, theirs = load_file(run / "model.safetensors"), load_file(OLD / "whole.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=WEIGHT_TOLERANCE)
