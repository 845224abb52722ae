"""How fast a training step and an inference window are, against the same network with PyTorch's grouped convolution.

Machines are shared and their clocks change, so variants run in turn (A B C, A B C, ...) in one process, and the figure
that counts is the ratio to the grouped convolution of the same round; the table gives its median.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segkit.models.depthwise import DepthwiseConv3d
from segkit.models.table import build_model

Row = dict[str, Any]
Work = Callable[[], Tensor]
"""Something to time; gives the tensor by which variants are compared: gradients in a row, or logits."""

_REFERENCE = "grouped Conv3d"
_CHANNELS, _OUTPUTS = 4, 3


def training(size: str, side: int, rounds: int, device: str) -> Iterator[Row]:
    """A training step (forward, backward) of RevMBUNet on (1, 4, side, side, side), per memory mode."""
    x = torch.randn(1, _CHANNELS, *(side,) * 3, device=device, generator=_generator(device))
    variants = {_REFERENCE: _with_grouped_convolution(_network(size, "plain", device))}
    variants |= {mode: _network(size, mode, device) for mode in ("plain", "checkpoint", "reversible")}
    steps = {name: _training_step(network.train(), x) for name, network in variants.items()}
    yield from _rows("training", steps, rounds, size, side)


def inference(size: str, side: int, rounds: int, device: str) -> Iterator[Row]:
    """One inference window of (1, 4, side, side, side), in every runtime that is installed."""
    x = torch.randn(1, _CHANNELS, *(side,) * 3, device=device, generator=_generator(device))
    network = _network(size, "plain", device).eval()
    runs = {_REFERENCE: _window(_with_grouped_convolution(_network(size, "plain", device)).eval(), x)}
    runs["torch"] = _window(network, x)
    if device == "cpu":
        runs |= {name: make(network, x) for name, make in RUNTIMES.items() if importlib.util.find_spec(name)}
    yield from _rows("inference", runs, rounds, size, side)


def _network(size: str, mode: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    network = build_model("revmbunet", in_channels=_CHANNELS, out_channels=_OUTPUTS, size=size, mode=mode)
    # Blocks start as the identity: without a scale the depthwise kernels would get no gradient to compare.
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
    return network.to(device)


def _with_grouped_convolution(network: nn.Module) -> nn.Module:
    """The same network with every depthwise layer turned into PyTorch's own, in memory as PyTorch lays it out."""
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, DepthwiseConv3d):
                channels, kernel = layer.in_channels, layer.kernel_size[0]
                plain = nn.Conv3d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
                plain.weight = layer.weight
                setattr(parent, name, plain)
    return network


def _training_step(network: nn.Module, x: Tensor) -> Work:
    def step() -> Tensor:
        network.zero_grad()
        levels = network(x)
        torch.autograd.backward(torch.stack([level.square().mean() for level in levels]).sum())
        _wait_for(x)
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    return step


def _window(network: nn.Module, x: Tensor) -> Work:
    def window() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = network(x)
        _wait_for(x)
        return logits

    return window


def _onnxruntime(network: nn.Module, x: Tensor) -> Work:
    import onnxruntime

    with _exported(network, x) as path:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {"image": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _openvino(network: nn.Module, x: Tensor) -> Work:
    import openvino

    with _exported(network, x) as path:
        model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    array = x.numpy()
    return lambda: torch.from_numpy(model(array)[0])


@contextmanager
def _exported(network: nn.Module, x: Tensor) -> Iterator[str]:
    """Path of the network as an ONNX file, for as long as the block lasts."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own future
        path = str(Path(folder) / "network.onnx")
        torch.onnx.export(network, (x,), path, input_names=["image"], output_names=["logits"], verbose=False)
        yield path


RUNTIMES: Mapping[str, Callable[[nn.Module, Tensor], Work]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}
"""Module name -> what makes a network run in it."""


def _rows(table: str, work: Mapping[str, Work], rounds: int, size: str, side: int) -> Iterator[Row]:
    expected = work[_REFERENCE]()
    differences = {name: _relative_difference(run(), expected) for name, run in work.items()}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        ratios = [one / reference for one, reference in zip(times, seconds[_REFERENCE], strict=True)]
        yield {
            "table": table,
            "network": f"revmbunet {size}",
            "patch": "x".join([str(side)] * 3),
            "variant": name,
            "seconds": round(statistics.median(times), 4),
            "of_grouped": round(statistics.median(ratios), 3),
            "difference": float(f"{differences[name]:.1e}"),
        }


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _wait_for(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


TABLES: dict[str, Callable[[str, int, int, str], Iterator[Row]]] = {"training": training, "inference": inference}
"""Table name -> the function that measures it."""
