"""`segkit export` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import segkit
import segkit.cli
from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.model import save_model
from segkit.inference import graph
from segkit.labels import SCHEMES, outputs_of


@pytest.fixture(autouse=True)
def _only_this_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segkit.cli, "VERBS", {verb: segkit.cli.VERBS[verb] for verb in ("export", "phantom")})
    monkeypatch.setattr(graph, "_by_capture", graph._by_tracing)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a small network whose weights are random."""
    torch.manual_seed(0)
    scheme = SCHEMES["brats2023"]
    network = segkit.build_model("revmbunet", size="tiny", widths=(4, 8), in_channels=4, out_channels=3)
    document: dict[str, Any] = {
        "network": {
            "family": "revmbunet",
            "size": "tiny",
            "in_channels": 4,
            "out_channels": 3,
            "arguments": {"widths": (4, 8)},
        },
        "modalities": ("t1n", "t1c", "t2w", "t2f"),
        "patch_size": (8, 8, 8),
        "divisor": (2, 2, 2),
        "activation": "sigmoid",
        "outputs": [{"name": o.name, "label": o.label, "members": o.members} for o in outputs_of(scheme)],
        "label_scheme": scheme.to_json(),
        "training_data": {"identity": "none", "licence": "CC-BY 4.0"},
    }
    save_model(tmp_path / "run", network.state_dict(), ModelCard.model_validate(document))
    return tmp_path / "run"


def call(*arguments: object, verb: str = "export") -> int:
    with pytest.raises(SystemExit) as leave:
        segkit.cli.main([verb, *(str(argument) for argument in arguments)])
    return int(leave.value.code or 0)


def test_json_document(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("-m", run, "-o", tmp_path / "out", "--json", "-q") == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert captured.err == ""
    assert document["output"] == str(tmp_path / "out")
    card = json.loads((tmp_path / "out" / "model.json").read_text())
    assert card["export"] == document["models"][0]["export"]
    assert card["training_data"]["licence"] == "CC-BY 4.0"


def test_cases_and_table(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path / "data", "--cases", 2, "--size", 24, verb="phantom") == 0
    ids = sorted(path.name for path in (tmp_path / "data").iterdir() if path.is_dir())
    (tmp_path / "ids.txt").write_text(ids[0])
    capsys.readouterr()
    options = ("-i", tmp_path / "data", "--cases", tmp_path / "ids.txt", "--precision", "int8")
    assert call("-m", run, "-o", tmp_path / "out", *options) == 0
    table = capsys.readouterr().out
    assert "model.int8.onnx" in table
    assert "openvino" in table
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model.int8.onnx", "model.json", "model.onnx"
    ]  # fmt: skip


def test_wrong_requests_are_told_and_leave_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("-m", tmp_path / "nowhere", "-o", tmp_path / "out") == 2
    assert call("-m", run, "-o", tmp_path / "out", "--precision", "fp16") == 2
    assert call("-m", run, "-o", tmp_path / "out", "--cases", tmp_path / "ids.txt") == 2
    assert call("-m", run, "-o", run) == 2
    error = capsys.readouterr().err
    assert "is not a folder" in error
    assert "-i DATA" in error
    assert "model's own folder" in error
    assert not (tmp_path / "out").exists()
