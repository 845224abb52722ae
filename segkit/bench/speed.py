"""How fast a training step and an inference window are, against the same network made of PyTorch's own layers.

Machines are shared and their clocks change, so variants run in turn (A B C, A B C, ...), each in a process of its own
that lives as long as the table: what a process does with freed memory is part of its speed. The figure that counts is
the ratio to the reference of the same round; the table gives its median.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segkit.bench.reference import build_network, with_library_layers
from segkit.inference.backends import OnnxRuntimeBackend, OpenvinoBackend
from segkit.inference.graph import write_graph
from segkit.runtime import keep_freed_memory

Row = dict[str, Any]
Work = Callable[[], Tensor]
"""Something to time; gives the tensor by which variants are compared: gradients in a row, or logits."""

_CHANNELS = 4


@dataclass(frozen=True)
class Variant:
    """One way to compute: what is computed, in which memory mode, in which layers, in which runtime."""

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
"""Table name -> its variants; the first is the reference: every layer PyTorch's own, in a process as it comes. "grouped
Conv3d" has PyTorch's depthwise layer alone and segkit's everything else."""


def measure(table: str, size: str, side: int, rounds: int, device: str) -> Iterator[Row]:
    """A table on (1, 4, side, side, side), RevMBUNet of a named size; runtimes that are not installed are left out."""
    variants = [variant for variant in TABLES[table] if _can_run(variant, device)]
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        workers = []
        for variant in variants:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, variant, size, side, device), daemon=True)
            process.start()
            stack.callback(process.terminate)
            workers.append(ours)
            # One at a time: the first computation of each is no part of the others' rounds.
            ours.send("compare")
        results = [torch.from_numpy(worker.recv()) for worker in workers]
        seconds: list[list[float]] = [[] for _ in workers]
        for _ in range(rounds):
            for worker, times in zip(workers, seconds, strict=True):
                worker.send("time")
                times.append(worker.recv())
    for variant, times, result in zip(variants, seconds, results, strict=True):
        yield {
            "table": table,
            "network": f"revmbunet {size}",
            "patch": "x".join([str(side)] * 3),
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
    """Compute once for comparison, then as often as asked, telling the seconds."""
    if variant.layers == "segkit":
        keep_freed_memory(torch.device(device))
    work = _work(variant, size, side, device)
    while True:
        request = connection.recv()
        began = time.perf_counter()
        result = work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        connection.send(time.perf_counter() - began if request == "time" else result.detach().cpu().numpy())


def _work(variant: Variant, size: str, side: int, device: str) -> Work:
    network = with_library_layers(build_network(size, variant.mode), variant.layers).to(device)
    x = torch.randn(1, _CHANNELS, *(side,) * 3, generator=torch.Generator().manual_seed(0)).to(device)
    if variant.task == "training":
        return _training_step(network.train(), x)
    network.eval()
    if variant.runtime != "torch":
        return _in_runtime(RUNTIMES[variant.runtime], network, x)

    def window() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = network(x)
        return logits

    return window


def _training_step(network: torch.nn.Module, x: Tensor) -> Work:
    def step() -> Tensor:
        network.zero_grad()
        levels = network(x)
        torch.autograd.backward(torch.stack([level.square().mean() for level in levels]).sum())
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    return step


def _in_runtime(kind: type[OnnxRuntimeBackend] | type[OpenvinoBackend], network: torch.nn.Module, x: Tensor) -> Work:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        write_graph(network, path, _CHANNELS, x.shape[2:])
        backend = kind(path)
    array = x.numpy()
    return lambda: torch.from_numpy(backend(array))


RUNTIMES: Mapping[str, type[OnnxRuntimeBackend] | type[OpenvinoBackend]] = {
    "onnxruntime": OnnxRuntimeBackend,
    "openvino": OpenvinoBackend,
}
"""Module name -> what computes a graph in it."""
