"""Networks as ONNX files: the same logits in both runtimes, and files that are complete or not there."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from segkit.errors import CheckpointError, RequestError
from segkit.inference import graph
from segkit.inference.backends import OnnxRuntimeBackend, OpenvinoBackend, TorchBackend
from segkit.inference.graph import graph_files, write_graph
from segkit.models.blocks import InstanceNorm


class _Norms(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.norm(x), x]


@pytest.mark.parametrize(("mean", "tolerance", "shape"), [(3.0, 5e-5, (5, 6, 4)), (100.0, 1e-2, (6, 4))])
def test_group_norm_is_written_as_sums(
    mean: float, tolerance: float, shape: tuple[int, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    norm = nn.GroupNorm(2, 6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    path = tmp_path / "norm.onnx"
    write_graph(_Norms(norm), path, 6, shape)
    assert capfd.readouterr() == ("", "")
    assert "InstanceNormalization" not in {node.op_type for node in onnx.load(path).graph.node}
    windows = np.random.default_rng(0).normal(mean, 1.0, (2, 6, *shape)).astype(np.float32)
    expected = norm(torch.from_numpy(windows)).detach().numpy()
    for backend in (OnnxRuntimeBackend(path), OpenvinoBackend(path)):
        np.testing.assert_allclose(backend(windows), expected, atol=tolerance)


def test_group_norm_of_one_value_is_its_shift(tmp_path: Path) -> None:
    norm = nn.GroupNorm(2, 4)
    nn.init.constant_(norm.bias, 0.5)
    write_graph(_Norms(norm), tmp_path / "norm.onnx", 4, (4, 4))
    windows = np.full((1, 4, 4, 4), 7.0, np.float32)
    for backend in (OnnxRuntimeBackend(tmp_path / "norm.onnx"), OpenvinoBackend(tmp_path / "norm.onnx")):
        # Rounding of 7 is divided by the root of the norm's epsilon.
        np.testing.assert_allclose(backend(windows), 0.5, atol=1e-3)


def test_moments_keep_their_digits_beside_the_patient(tmp_path: Path) -> None:
    norm = nn.GroupNorm(2, 4)
    path = tmp_path / "norm.onnx"
    write_graph(_Norms(norm), path, 4, (64, 64, 64))
    windows = np.full((1, 4, 64, 64, 64), -0.7, np.float32)
    windows[:, :, :20, :20, :20] = np.random.default_rng(0).normal(3.0, 1.0, (1, 4, 20, 20, 20))
    expected = norm.double()(torch.from_numpy(windows).double()).detach().numpy()
    for backend in (OnnxRuntimeBackend(path), OpenvinoBackend(path)):
        np.testing.assert_allclose(backend(windows), expected, atol=2e-5)


def test_instance_norm_changes_no_shapes(tmp_path: Path) -> None:
    path = tmp_path / "norm.onnx"
    norm = InstanceNorm(3)
    nn.init.normal_(norm.weight)
    write_graph(_Norms(norm), path, 3, (4, 5, 4))
    assert {"Reshape", "InstanceNormalization"}.isdisjoint(node.op_type for node in onnx.load(path).graph.node)
    windows = np.random.default_rng(0).normal(1.0, 1.0, (2, 3, 4, 5, 4)).astype(np.float32)
    for backend in (OnnxRuntimeBackend(path), OpenvinoBackend(path)):
        np.testing.assert_allclose(backend(windows), TorchBackend(_Norms(norm))(windows), atol=1e-5)


def _tiny() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Conv3d(4, 3, 1))


def _require_same(network: nn.Module, path: Path) -> None:
    windows = np.random.default_rng(0).standard_normal((2, 2, 4, 4, 4), np.float32)
    for backend in (OnnxRuntimeBackend(path), OpenvinoBackend(path)):
        np.testing.assert_allclose(backend(windows), TorchBackend(network)(windows), atol=1e-5)


@pytest.mark.parametrize("exporter", ["_by_capture", "_by_tracing"])
def test_weights_beyond_the_limit_go_into_a_file_of_their_own(
    exporter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_by_capture", getattr(graph, exporter))
    monkeypatch.setattr(graph, "LARGEST_FILE_BYTES", 10)
    network, path = _tiny(), tmp_path / "model.onnx"
    write_graph(network, path, 2, (4, 4, 4))
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert graph_files(path) == [path, tmp_path / "model.onnx.data"]
    _require_same(network, path)


def test_a_graph_is_one_file_where_weights_are_few_and_tells_no_paths(tmp_path: Path) -> None:
    network, path = _tiny(), tmp_path / "model.onnx"
    write_graph(network, path, 2, (4, 4, 4))
    assert graph_files(path) == [path]
    assert str(Path(torch.__file__).parent).encode() not in path.read_bytes()
    assert __file__.encode() not in path.read_bytes()
    _require_same(network, path)


class _Unwritable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("cannot compute this")


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("before")
    with pytest.raises(CheckpointError, match=r"cannot be written as a graph: .*cannot compute this"):
        write_graph(_Unwritable(), path, 1, (4, 4))
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_text() == "before"


def test_without_the_libraries_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(RequestError, match=r"onnxscript is not installed.*segkit\[onnx\]"):
        write_graph(_tiny(), tmp_path / "model.onnx", 2, (4, 4, 4))
