"""The end-to-end benchmark on a tiny model: the same mask by hand and by command, every figure of the table there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import segkit
from segkit.bench.whole import measure_whole
from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.model import save_model
from segkit.errors import RequestError
from segkit.labels import SCHEMES, outputs_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    scheme = SCHEMES["brats2017"]
    network = segkit.build_model("revmbunet", size="tiny", in_channels=1, out_channels=3)
    torch.nn.init.normal_(network.heads[0].weight, std=3.0)
    document: dict[str, Any] = {
        "network": {"family": "revmbunet", "size": "tiny", "in_channels": 1, "out_channels": 3},
        "modalities": ["t1c"],
        "patch_size": [16, 16, 16],
        "divisor": list(network.divisor),
        "activation": "sigmoid",
        "outputs": [{"name": o.name, "label": o.label, "members": o.members} for o in outputs_of(scheme)],
        "label_scheme": scheme.to_json(),
        "training_data": {"identity": "none", "cases": 0},
    }
    save_model(tmp_path / "run", network.state_dict(), ModelCard.model_validate(document))
    return tmp_path / "run"


@pytest.fixture
def case(tmp_path: Path) -> Path:
    folder = tmp_path / "BraTS2021_00001"
    folder.mkdir()
    values = np.random.default_rng(0).normal(500, 100, (20, 22, 18)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.diag([-1.0, -1.0, 1.0, 1.0])), folder / f"{folder.name}_t1ce.nii.gz")
    return folder


def test_rows_of_whole_commands(run: Path, case: Path) -> None:
    by_hand, cold, warm = measure_whole(run, case, 1, backends=["torch"])
    assert [by_hand["command"], cold["command"], warm["command"]] == ["by hand", "torch, cold", "torch"]
    assert by_hand["of_by_hand"] == by_hand["memory_of_by_hand"] == 1
    for row in (cold, warm):
        assert set(row["dice"]) == {"WT", "TC", "ET"}
        assert all(dice > 0.999 or np.isnan(dice) for dice in row["dice"].values())
        assert row["of_by_hand"] == pytest.approx(row["seconds"] / by_hand["seconds"], abs=0.02)
        assert 0 < row["predict"] < row["seconds"]


def test_a_command_that_fails_tells_why(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file or folder"):
        list(measure_whole(run, tmp_path / "nothing", 1, backends=["torch"]))
