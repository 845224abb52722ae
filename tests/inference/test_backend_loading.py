"""Run folders computed by another runtime: prepared once, checked, kept; torch where that is not possible."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import segkit
from segkit.checkpoint.run_folder import load_card
from segkit.errors import RequestError
from segkit.inference import backend_loading, graph
from segkit.inference.backend_loading import open_backend
from segkit.inference.backends import OnnxRuntimeBackend, torch_backend
from segkit.inference.predictor import Predictor
from segkit.reading.volume import Grid, Volume
from segkit.runtime import cache_folder, variables_with

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
MakeRun = Callable[..., Path]


@pytest.fixture
def volume(scans: Any) -> Volume:
    return Volume(scans.stairs(), Grid((6, 5, 4), np.diag([-1.0, -1.0, 1.0, 1.0])))


def test_a_run_folder_is_turned_into_a_graph_once(
    make_run: MakeRun, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(bias=0.25)
    expected = Predictor.load(run)(volume).labels
    first = Predictor.load(run, backend="onnxruntime")
    assert first.backend.name == "onnxruntime"
    assert np.array_equal(first(volume).labels, expected)
    assert len(list((cache_folder() / "graphs").glob(f"{first.card.sha256[:32]}*/model.onnx"))) == 1
    monkeypatch.setattr(graph, "write_graph", lambda *_: pytest.fail("it was there already"))
    assert np.array_equal(Predictor.load(run, backend="onnxruntime")(volume).labels, expected)


def test_a_graph_that_differs_is_not_used(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = graph.write_graph

    def wrong(network: Any, *arguments: Any, **options: Any) -> None:
        network.bias += 1
        whole(network, *arguments, **options)
        network.bias -= 1

    monkeypatch.setattr(graph, "write_graph", wrong)
    predictor = Predictor.load(make_run(bias=0.5), backend="auto")
    assert torch_backend(predictor.backend) is not None
    assert "differs by" in caplog.text
    assert not list((cache_folder() / "graphs").glob(f"{predictor.card.sha256[:32]}*"))


def test_without_exporter_auto_is_torch_and_others_say_what_to_install(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_EXPORTERS", ("no_such_module",))
    run = make_run(bias=0.75)
    assert torch_backend(Predictor.load(run, backend="auto").backend) is not None
    with pytest.raises(RequestError, match=r"no_such_module is not installed.*what turns.*segkit\[onnx\]"):
        Predictor.load(run, backend="onnxruntime")


def test_runtimes_for_onnx_files_compute_on_a_cpu(make_run: MakeRun) -> None:
    with pytest.raises(RequestError, match="device 'abacus' is not known"):
        Predictor.load(make_run(), device="abacus", backend="auto")


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "abacus"])
def test_an_export_refuses_a_device_that_is_not_there(make_run: MakeRun, device: str) -> None:
    card = load_card(make_run()).model_copy(update={"export": "stands for that of an export"})
    with pytest.raises(RequestError, match=f"no usable {device} device|device '{device}' is not known"):
        open_backend(Path("gone"), card, device, "auto", card.patch_size)


def test_an_export_is_computed_by_a_gpu_only_where_the_runtime_can(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(backend_loading, "_open_export", lambda folder, card, device, *_: opened.append(device))
    monkeypatch.setattr("segkit.runtime.devices", lambda: ("cuda:0", "cpu"))
    card = load_card(make_run()).model_copy(update={"export": "stands for that of an export"})
    for device in ("auto", "cpu"):
        open_backend(tmp_path, card, device, "auto", card.patch_size)
    assert opened == ["cpu", "cpu"]
    with pytest.raises(RequestError, match=r"an export cannot be computed on cuda:0 .* onnxruntime-gpu\. Pass"):
        open_backend(tmp_path, card, "cuda", "auto", card.patch_size)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    open_backend(tmp_path, card, "cuda", "auto", card.patch_size)
    open_backend(tmp_path, card, "auto", "openvino", card.patch_size)
    assert opened[2:] == ["cuda:0", "cpu"]
    with pytest.raises(RequestError, match="cannot be computed on cuda:0 by backend openvino"):
        open_backend(tmp_path, card, "cuda", "openvino", card.patch_size)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_runtime_that_falls_back_to_the_cpu_is_refused(make_run: MakeRun) -> None:
    predictor = Predictor.load(make_run(bias=0.25), backend="onnxruntime")
    (graph_file,) = (cache_folder() / "graphs").glob(f"{predictor.card.sha256[:32]}*/model.onnx")
    with pytest.raises(RequestError, match="ONNX Runtime cannot use cuda:0; expected the CUDA and cuDNN"):
        OnnxRuntimeBackend(graph_file, device="cuda:0")


def test_nothing_on_the_way_to_a_mask_loads_torch() -> None:
    code = (
        "import sys, segkit.batch.runner, segkit.batch.cases, segkit.cli.infer;"
        "print([name for name in ('torch', 'monai', 'SimpleITK', 'matplotlib') if name in sys.modules])"
    )
    environment = variables_with(PYTHONPATH=str(Path(segkit.__file__).parents[1]))
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert json.loads(result.stdout.replace("'", '"')) == []
