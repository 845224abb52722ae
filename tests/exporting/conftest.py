"""A run folder of seconds, and the exporter that takes a fraction of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from segkit.config import build_config
from segkit.inference import graph
from segkit.training.config import TrainConfig
from segkit.training.run import train
from segkit.training.segmentation import SegmentationKind
from segkit.training.task import TrainingRequest

_SETTINGS = {
    "network": {"size": "tiny", "arguments": {"widths": [8, 12]}},
    "planning": {"patch_limit": 16, "batch_limit": 1},
    "training": {"steps": 4, "steps_per_epoch": 4},
    "data": {"folds": 3},
}


@pytest.fixture(scope="session")
def phantoms(phantom_data: Callable[[int], Path]) -> Path:
    return phantom_data(3)


@pytest.fixture(scope="session")
def run(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on three phantoms, one of which validates."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = build_config(TrainConfig, [("test", {**_SETTINGS})])
    request = TrainingRequest(data=(phantoms,), run=folder, config=config, device=torch.device("cpu"))
    train(request, SegmentationKind())
    return folder


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_by_capture", graph._by_tracing)
