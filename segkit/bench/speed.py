"""Speed of a training step and of an inference window, against the same network made of PyTorch's own layers.

Variants run in turn (A B C, A B C, ...), because clock speeds of shared machines change, each in one process for the
whole table, because reuse of freed memory is part of the speed. Ratios are medians over the rounds of the ratio to the
reference in the same round.
"""

import importlib.util
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from segkit.inference.backends import open_graph
from segkit.inference.graph import write_graph
from segkit.models.kernels.convolutions import DepthwiseConv3d, PointwiseConv3d
from segkit.models.revmbunet import Encoder, InvertedBottleneck
from segkit.models.table import build_model
from segkit.process_memory import keep_freed_memory

Row = dict[str, Any]
Work = Callable[[], Tensor]
"""Computes what is timed; returns the tensor by which variants are compared: all gradients, or logits."""

_CHANNELS, _OUTPUTS = 4, 3


@dataclass(frozen=True)
class Variant:
    """One way to compute a training step or an inference window."""

    name: str
    task: str
    mode: str = "plain"
    layers: str = "segkit"
    runtime: str = "torch"


TABLES: dict[str, tuple[Variant, ...]] = {
    "training": (
        Variant("PyTorch layers", "training", layers="library"),
        Variant("grouped Conv3d", "training", layers="grouped"),
        Variant("plain", "training"),
        Variant("checkpoint", "training", mode="checkpoint"),
        Variant("reversible", "training", mode="reversible"),
    ),
    "inference": (
        Variant("PyTorch layers", "inference", layers="library"),
        Variant("grouped Conv3d", "inference", layers="grouped"),
        Variant("torch", "inference"),
        Variant("onnxruntime", "inference", runtime="onnxruntime"),
        Variant("openvino", "inference", runtime="openvino"),
    ),
}
"""Table name -> its variants, the first with PyTorch's layers and memory settings; "grouped Conv3d" has PyTorch's
depthwise layers and segkit's others."""


def measure(table: str, size: str, side: int, rounds: int, device: str) -> Iterator[Row]:
    """A table on (1, 4, side, side, side), RevMBUNet of a named size; runtimes that are not installed are left out."""
    variants = [variant for variant in TABLES[table] if _can_run(variant, device)]
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        workers = []
        for variant in variants:
            worker, other_end = context.Pipe()
            process = context.Process(target=_serve, args=(other_end, variant, size, side, device), daemon=True)
            process.start()
            stack.callback(process.terminate)
            workers.append(worker)
            # One at a time, so that no first computation disturbs another variant.
            worker.send("compare")
        results = [torch.from_numpy(worker.recv()) for worker in workers]
        seconds: list[list[float]] = [[] for _ in workers]
        for _ in range(rounds):
            for worker, times in zip(workers, seconds, strict=True):
                worker.send("time")
                times.append(worker.recv())
    what = {"table": table, "network": f"revmbunet {size}", "patch": "x".join([str(side)] * 3)}
    for variant, times, result in zip(variants, seconds, results, strict=True):
        yield what | {
            "variant": variant.name,
            "seconds": round(statistics.median(times), 4),
            "of_reference": _median_ratio(times, seconds[0]),
            "difference": float(f"{float((result - results[0]).norm() / results[0].norm()):.1e}"),
        }


def _median_ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    return round(statistics.median(one / other for one, other in zip(times, reference, strict=True)), 3)


def _can_run(variant: Variant, device: str) -> bool:
    if variant.runtime == "torch":
        return True
    return device == "cpu" and all(importlib.util.find_spec(name) for name in (variant.runtime, "onnxscript"))


def _serve(connection: Connection, variant: Variant, size: str, side: int, device: str) -> None:
    """Answer each request with the seconds of a computation ("time") or its result ("compare")."""
    if variant.layers == "segkit":
        keep_freed_memory(torch.device(device))
    work = _work(variant, size, side, device)
    while True:
        request = connection.recv()
        start = time.perf_counter()
        result = work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        connection.send(time.perf_counter() - start if request == "time" else result.detach().cpu().numpy())


def _work(variant: Variant, size: str, side: int, device: str) -> Work:
    network = with_library_layers(build_network(size, variant.mode), variant.layers).to(device)
    x = torch.randn(1, _CHANNELS, *(side,) * 3, generator=torch.Generator().manual_seed(0)).to(device)
    if variant.task == "training":
        return partial(_train, network.train(), x)
    if variant.runtime == "torch":
        return partial(torch.inference_mode()(network.eval()), x)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        write_graph(network.eval(), path, _CHANNELS, x.shape[2:])
        backend = open_graph(path, variant.runtime)
    array = x.numpy()
    return lambda: torch.from_numpy(backend(array))


def _train(network: nn.Module, x: Tensor) -> Tensor:
    network.zero_grad()
    torch.autograd.backward(torch.stack([level.square().mean() for level in network(x)]).sum())
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def build_network(size: str, mode: str = "plain") -> nn.Module:
    """RevMBUNet of a named size, 4 inputs and 3 outputs, the same weights every time."""
    torch.manual_seed(0)
    return build_model("revmbunet", in_channels=_CHANNELS, out_channels=_OUTPUTS, size=size, mode=mode)


def with_library_layers(network: nn.Module, layers: str) -> nn.Module:
    """The network, in place, with "segkit" layers, depthwise layers replaced ("grouped"), or all of them ("library").

    "library" is `nn.Conv3d`, `nn.GroupNorm` and SiLU in turn.
    """
    if layers == "segkit":
        return network
    replaced = (DepthwiseConv3d,) if layers == "grouped" else (DepthwiseConv3d, PointwiseConv3d)
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, replaced):
                setattr(parent, name, _library_convolution(layer))
            elif layers == "library" and isinstance(layer, InvertedBottleneck):
                setattr(parent, name, _LibraryBottleneck(layer))
    if layers == "library":
        encoder = network.encoder
        network.encoder = _LibraryEncoder(encoder.stem, encoder.downs, encoder.stages)  # type: ignore[arg-type, union-attr]
    return network


def _library_convolution(layer: nn.Conv3d) -> nn.Conv3d:
    kernel, padding = layer.kernel_size[0], layer.kernel_size[0] // 2
    plain = nn.Conv3d(layer.in_channels, layer.out_channels, kernel, padding=padding, groups=layer.groups)
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


class _LibraryBottleneck(nn.Module):
    """An inverted bottleneck computed layer by layer."""

    def __init__(self, bottleneck: InvertedBottleneck) -> None:
        super().__init__()
        self.bottleneck = bottleneck

    def forward(self, x: Tensor) -> Tensor:
        layers = self.bottleneck
        x = functional.silu(layers.expand_norm(layers.expand(x)))
        x = functional.silu(layers.depthwise_norm(layers.depthwise(x)))
        result: Tensor = layers.project_norm(layers.project(x))
        return result


class _LibraryEncoder(Encoder):
    """The encoder without segkit's memory layouts."""

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [self.stages[0](self.stem(x))]
        for down, stage in zip(self.downs, self.stages[1:], strict=True):
            features.append(stage(down(features[-1])))
        return features
