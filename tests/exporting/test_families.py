"""Every family of the table as an ONNX file: the same logits in both runtimes, at two sizes, by either exporter."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from segkit.exporting.bundle import trace
from segkit.inference import graph
from segkit.inference.backends import OnnxRuntimeBackend, OpenvinoBackend, TorchBackend
from segkit.inference.graph import write_graph
from segkit.models.table import MODELS, build_model

_SMALLEST: dict[str, dict[str, object]] = {
    "revmbunet": {"size": "tiny", "widths": (4, 8), "mode": "reversible"},
    "r2unet": {"size": "tiny", "widths": (4, 8), "steps": 1, "norm": "group"},
    "runet": {"size": "tiny", "widths": (4, 8), "steps": 1},
    "plainunet": {"size": "tiny", "widths": (4, 8), "norm": "batch"},
    "resencunet": {"size": "tiny", "widths": (4, 8), "blocks": (1, 2), "bottleneck_widths": (4, 4)},
    "stunet": {"size": "S", "width": 4, "mode": "checkpoint"},
    "smp": {"size": "unet-small", "encoder_depth": 3, "decoder_channels": (32, 16, 16)},
    "generator": {"size": "tiny", "width": 4},
    "monai": {"network_def": {"_target_": "UNet", "channels": [4, 8], "strides": [2], "num_res_units": 1}},
    "inpainter": {"size": "tiny", "widths": (4, 8)},
    "vit": {
        "size": "tiny",
        "width": 8,
        "depth": 2,
        "heads": 2,
        "window": 1,
        "global_blocks": (1,),
        "image_size": 32,
        "neck": 4,
        "decoder_widths": (4, 4, 4, 4),
    },
}
_IN_3D: dict[str, dict[str, object]] = {"smp": {"neighbours": 1}, "vit": {"slice_axis": 1}}
_TRACED: dict[str, dict[str, object]] = {"revmbunet": {"chunks": 2, "mode": "checkpoint"}}
_NOT_TRACED = {"inpainter": "the older exporter loses an input of RN-B with three regions; torch computes it then"}
_ENTRIES = [(family, dims) for family, entry in MODELS.items() for dims in entry.dims]


def _network(family: str, dims: int, **more: object) -> nn.Module:
    arguments = {**_SMALLEST[family], **(_IN_3D.get(family, {}) if dims == 3 else {}), **more}
    network = build_model(family, in_channels=2, out_channels=3, dims=dims, **arguments)  # type: ignore[arg-type]
    for name, parameter in network.named_parameters():
        if ("norm" in name and name.endswith("weight")) or name == "head.weight":
            nn.init.uniform_(parameter, 0.5, 1.5)  # some begin with 0, which would hide what is behind them
    return network


def _window(network: nn.Module, factor: int) -> tuple[int, ...]:
    return tuple(factor * divisor for divisor in network.divisor)  # type: ignore[union-attr, arg-type]


def _require_same(network: nn.Module, path: Path, window: tuple[int, ...], batch: int) -> None:
    windows = np.random.default_rng(0).standard_normal((batch, 2, *window), np.float32)
    expected = TorchBackend(network)(windows)
    assert expected.shape == (batch, 3, *window)
    for backend in (OnnxRuntimeBackend(path), OpenvinoBackend(path)):
        np.testing.assert_allclose(backend(windows), expected, atol=2e-5 * max(10, np.abs(expected).max()), rtol=0)


def test_every_family_is_tried() -> None:
    assert set(_SMALLEST) == set(MODELS)


@pytest.mark.parametrize("family", MODELS)
def test_volumes_of_every_family_as_they_are_captured(family: str, tmp_path: Path) -> None:
    network = _network(family, 3).train()
    window = _window(network, 1 if family == "stunet" else 2)
    write_graph(network, tmp_path / "model.onnx", 2, window)
    assert network.training
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    _require_same(network, tmp_path / "model.onnx", window, batch=3)


@pytest.mark.parametrize(("family", "dims"), _ENTRIES)
def test_the_older_exporter_is_the_second_try(
    family: str, dims: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if family in _NOT_TRACED:
        pytest.skip(_NOT_TRACED[family])

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(graph, "_by_capture", fail)
    network = _network(family, dims, **_TRACED.get(family, {}))
    window = _window(
        network, 2 if family in ("vit", "generator", "inpainter", "monai") else 1
    )  # of one pixel a norm only shows rounding
    with caplog.at_level(logging.INFO):
        write_graph(network, tmp_path / "model.onnx", 2, window)
    assert "no luck" in caplog.text
    _require_same(network, tmp_path / "model.onnx", window, batch=2)


@pytest.mark.parametrize("family", [name for name in MODELS if name not in ("inpainter", "generator")])
def test_volumes_of_every_family_as_torchscript(family: str) -> None:
    network = _network(family, 3, **_TRACED.get(family, {})).train()
    window = _window(network, 1 if family == "stunet" else 2)
    traced = trace(network, 2, window)
    assert network.training
    assert "PythonOp" not in str(traced.inlined_graph)  # autograd functions of Python cannot be loaded elsewhere
    windows = np.random.default_rng(0).standard_normal((3, 2, *window), np.float32)
    expected = TorchBackend(network)(windows)
    with torch.no_grad():
        found = traced(torch.from_numpy(windows)).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(10, np.abs(expected).max()), rtol=0)
