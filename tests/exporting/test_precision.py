"""Graphs with shorter numbers: they run in both runtimes and stay near the float32 one."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from segkit.exporting.precision import write_fp16, write_int8
from segkit.inference import graph
from segkit.inference.backends import Array, OnnxRuntimeBackend, OpenvinoBackend
from segkit.inference.graph import graph_files, write_graph

pytestmark = pytest.mark.usefixtures("_quick")
_SHAPE = (6, 6, 6)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    network = nn.Sequential(
        nn.Conv3d(1, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), nn.Conv3d(16, 2, 3, padding=1)
    )
    network[1].running_mean.uniform_(-1, 1)
    write_graph(network, tmp_path / "model.onnx", 1, _SHAPE)
    return tmp_path / "model.onnx"


def _windows(count: int) -> list[Array]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, 1, *_SHAPE), np.float32) for _ in range(count)]


def _largest_change(source: Path, target: Path) -> float:
    (window,) = _windows(1)
    expected = OnnxRuntimeBackend(source)(window)
    found = [backend(target)(window) for backend in (OnnxRuntimeBackend, OpenvinoBackend)]
    return max(float(np.abs(logits - expected).max()) for logits in found) / float(np.abs(expected).max())


def test_fp16_halves_large_weights_only(source: Path, tmp_path: Path) -> None:
    write_fp16(source, tmp_path / "short.onnx")
    types = {tensor.name: tensor.data_type for tensor in onnx.load(tmp_path / "short.onnx").graph.initializer}
    halved = {name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT16}
    assert len(halved) == 2
    assert 0 < _largest_change(source, tmp_path / "short.onnx") < 2e-3


def test_fp16_keeps_what_16_bits_cannot_hold(tmp_path: Path) -> None:
    network = nn.Conv3d(1, 16, 3, padding=1)
    with torch.no_grad():
        network.weight[0, 0, 0, 0, 0] = 1e5
    write_graph(network, tmp_path / "model.onnx", 1, _SHAPE)
    write_fp16(tmp_path / "model.onnx", tmp_path / "short.onnx")
    assert _largest_change(tmp_path / "model.onnx", tmp_path / "short.onnx") < 1e-6


def test_int8_is_near_and_quiet(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_int8(source, tmp_path / "short.onnx", _windows(4))
    assert "pre-processing" not in caplog.text
    assert logging.root.manager.disable == logging.NOTSET
    model = onnx.load(tmp_path / "short.onnx")
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph.node}
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert 0 < _largest_change(source, tmp_path / "short.onnx") < 0.05


def test_weights_outside_the_file_stay_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "LARGEST_FILE_BYTES", 10)
    source = tmp_path / "model.onnx"
    write_graph(nn.Conv3d(1, 64, 3, padding=1), source, 1, _SHAPE)  # smaller weights stay inside
    write_fp16(source, tmp_path / "half.onnx")
    write_int8(source, tmp_path / "byte.onnx", _windows(2))
    for name in ("half.onnx", "byte.onnx"):
        assert graph_files(tmp_path / name) == [tmp_path / name, tmp_path / f"{name}.data"]
        assert _largest_change(source, tmp_path / name) < 0.05
