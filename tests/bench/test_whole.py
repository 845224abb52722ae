"""The end-to-end benchmark on a tiny model: the same mask by hand and by command, every figure of the table there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from segkit.bench.whole import measure_whole
from segkit.errors import RequestError
from segkit.labels import SCHEMES
from tests.helpers import save_nifti, write_segmentation_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_segmentation_run(
        tmp_path / "run",
        ("t1c",),
        SCHEMES["brats2017"],
        change=lambda network: torch.nn.init.normal_(network.heads[0].weight, std=3.0),
    )


@pytest.fixture
def case(tmp_path: Path) -> Path:
    folder = tmp_path / "BraTS2021_00001"
    values = np.random.default_rng(0).normal(500, 100, (20, 22, 18)).astype(np.float32)
    save_nifti(folder / f"{folder.name}_t1ce.nii.gz", values)
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
