"""Export folders: complete and checked, or not there."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from segkit.checkpoint.run_folder import load_card, model_folders
from segkit.errors import CheckpointError, RequestError
from segkit.exporting import onnx
from segkit.exporting.cases import named_cases
from segkit.exporting.onnx import export_models
from segkit.inference.graph import write_graph
from segkit.inference.predictor import Predictor
from segkit.reading.files import file_sha256
from segkit.reading.layouts.table import find_cases

pytestmark = pytest.mark.usefixtures("_quick")


@pytest.fixture
def lone_run(run: Path, tmp_path: Path) -> Path:
    """The run without the way back to its data."""
    folder = tmp_path / "lone run"
    folder.mkdir()
    for name in ("model.json", "model.safetensors"):
        shutil.copy(run / name, folder / name)
    return folder


def test_an_export_stands_for_its_run(run: Path, phantoms: Path, tmp_path: Path) -> None:
    document = export_models(run, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.json", "model.onnx"]
    assert document["models"][0]["cases"] == f"validation cases of {run}"
    trained, card = load_card(run), load_card(tmp_path / "out")
    assert card.export is not None
    assert card.export.model_dump(mode="json") == document["models"][0]["export"]
    assert set(card.versions) >= {*trained.versions, "onnx", "onnxruntime", "openvino"}
    assert card.model_copy(update={"export": None, "versions": trained.versions}) == trained
    (graph,) = card.export.graphs
    assert graph.sha256 == {"model.onnx": file_sha256(tmp_path / "out" / "model.onnx")}
    assert set(graph.seconds) == {"onnxruntime", "openvino"}
    for backend in ("onnxruntime", "openvino"):
        assert card.export.parity[backend]["windows"] == 6  # two of noise, four of the case
        assert card.export.parity[backend]["dice"] >= 0.9995
    case = find_cases(phantoms).cases[0]
    scan = {name: file.path for name, file in case.images.items()}
    masks = [
        Predictor.load(folder, backend=name)(scan).labels
        for folder, name in ((run, "torch"), (tmp_path / "out", "auto"))
    ]
    assert np.count_nonzero(masks[0] != masks[1]) <= 2


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_shorter_precisions_tell_what_they_cost(
    precision: Any, lone_run: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "SMALLEST_SPEED_UP", 0.0)
    monkeypatch.setattr(onnx, "LARGEST_DICE_LOSS", 1.0)
    cases = named_cases(phantoms)
    document = export_models(lone_run, tmp_path / "out", precision=precision, cases=cases)
    card = load_card(tmp_path / "out")
    assert card.export is not None
    whole, shorter = card.export.graphs
    assert (whole.precision, whole.dice_change, whole.is_approved) == ("fp32", None, True)
    assert (shorter.file, shorter.precision, shorter.is_approved) == (f"model.{precision}.onnx", precision, True)
    assert shorter.dice_change is not None
    assert abs(shorter.dice_change) < 0.1
    assert document["models"][0]["cases"] == str(phantoms)


def test_what_is_slow_or_untrue_is_kept_but_not_approved(
    lone_run: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onnx, "LARGEST_DICE_LOSS", -1.0)
    with caplog.at_level(logging.WARNING):
        export_models(lone_run, tmp_path / "out", precision="fp16", cases=named_cases(phantoms))
    card = load_card(tmp_path / "out")
    assert card.export is not None
    assert [graph.is_approved for graph in card.export.graphs] == [True, False]
    assert "--backend auto will not use it" in caplog.text


def test_shorter_precisions_need_cases(lone_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no cases to measure int8 with.*-i DATA"):
        export_models(lone_run, tmp_path / "out", precision="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["lone run"]


def _spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs from now on are those of a network whose last bias is another."""

    def write(network: nn.Module, *arguments: Any) -> None:
        with torch.no_grad():
            network.heads[0].bias += 0.1  # type: ignore[index, union-attr]
            write_graph(network, *arguments)
            network.heads[0].bias -= 0.1  # type: ignore[index, union-attr]

    monkeypatch.setattr(onnx, "write_graph", write)


def test_a_graph_that_computes_something_else_leaves_nothing(
    lone_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil(monkeypatch)
    with pytest.raises(CheckpointError, match=r"from the exact logits.*Nothing was written"):
        export_models(lone_run, tmp_path / "new" / "out")
    assert not (tmp_path / "new" / "out").exists()
    assert list((tmp_path / "new").iterdir()) == []


def test_an_export_that_fails_keeps_the_one_before(
    lone_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_models(lone_run, tmp_path / "out")
    before = (tmp_path / "out" / "model.json").read_bytes()
    with pytest.raises(RequestError, match=r"is not empty.*--overwrite"):
        export_models(lone_run, tmp_path / "out")
    export_models(lone_run, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.json").read_bytes() != before  # other seconds
    before = (tmp_path / "out" / "model.json").read_bytes()
    _spoil(monkeypatch)
    with pytest.raises(CheckpointError):
        export_models(lone_run, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lone run", "out"]


def test_other_folders_are_never_replaced(lone_run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(RequestError, match="something else than an export"):
        export_models(lone_run, tmp_path / "thesis", overwrite=True)
    for own in (lone_run, tmp_path):
        with pytest.raises(RequestError, match="is the model's own folder"):
            export_models(lone_run, own, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"


def test_folds_are_exported_each_into_a_folder(lone_run: Path, tmp_path: Path) -> None:
    for fold in range(2):
        shutil.copytree(lone_run, tmp_path / "folds" / f"fold_{fold}")
    export_models(tmp_path / "folds", tmp_path / "out")
    assert model_folders(tmp_path / "out") == [tmp_path / "out" / "fold_0", tmp_path / "out" / "fold_1"]
    assert all((folder / "model.onnx").is_file() for folder in model_folders(tmp_path / "out"))


def test_what_is_no_segmentation_model_is_refused(lone_run: Path, tmp_path: Path) -> None:
    document = json.loads((lone_run / "model.json").read_text())
    (lone_run / "model.json").write_text(json.dumps({**document, "task": "pretraining"}))
    with pytest.raises(RequestError, match="a pretraining model"):
        export_models(lone_run, tmp_path / "out")
    with pytest.raises(RequestError, match=r"holds no model\.json"):
        export_models(tmp_path, tmp_path / "out")
    export = {"opset": 20, "graphs": [{"file": "model.onnx", "precision": "fp32", "sha256": {}}]}
    (lone_run / "model.json").write_text(json.dumps({**document, "export": export}))
    with pytest.raises(RequestError, match="is an export already"):
        export_models(lone_run, tmp_path / "out")
