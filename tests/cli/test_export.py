"""`segkit export` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import segkit
import segkit.cli
from segkit.inference import graph
from tests.helpers import run_segkit, write_segmentation_run


@pytest.fixture(autouse=True)
def _only_this_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segkit.cli, "VERBS", {verb: segkit.cli.VERBS[verb] for verb in ("export", "phantom")})
    monkeypatch.setattr(graph, "_by_capture", graph._by_tracing)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a small network whose weights are random."""
    return write_segmentation_run(
        tmp_path / "run",
        widths=(4, 8),
        patch_size=(8, 8, 8),
        training_data={"identity": "none", "licence": "CC-BY 4.0"},
    )


def call(*arguments: object, verb: str = "export") -> int:
    return run_segkit(verb, *arguments)


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
