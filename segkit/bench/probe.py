"""One training step in a process of its own, and what it took: a peak of memory can only be read once per process.

`python -m segkit.bench.probe SPEC` with a JSON document for SPEC prints one JSON document.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from segkit.errors import SegkitError
from segkit.models.table import build_model
from segkit.runtime import current_rss_mb, peak_rss_mb, return_freed_memory

_OUTPUTS = 3
_WARM_UP_SIDE = 32
"""Longest side of the patch that loads the kernels before memory is counted, in voxels."""


@dataclass(frozen=True)
class Step:
    """One training step to measure: float32, batch 1, three sigmoid outputs, AdamW."""

    family: str = "revmbunet"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    patch: tuple[int, ...] = (64, 64, 64)
    modalities: int = 4
    device: str = "cpu"


@dataclass(frozen=True)
class Measured:
    """What a step took: MiB beyond the warm network and optimiser, peak of the process in MiB, seconds, parameters."""

    step_mb: float
    process_mb: float
    seconds: float
    parameters: int


def measure(step: Step) -> Measured:
    """Take the step in a fresh process.

    Raises:
        SegkitError: the process died, most often because the machine's memory was not enough.
    """
    command = [sys.executable, "-m", "segkit.bench.probe", json.dumps(asdict(step))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it was killed, as the kernel does when memory runs out"]
        found = f"the step on {' x '.join(map(str, step.patch))} voxels did not finish: {last[0]}"
        raise SegkitError(found, remedy="Measure a smaller patch, or on a machine with more memory")
    return Measured(**json.loads(done.stdout))


def take(step: Step) -> Measured:
    """Take the step in this process: a small one first, then the one that counts."""
    device = torch.device(step.device)
    return_freed_memory(device)  # as training does where memory is short
    torch.manual_seed(0)
    network = build_model(
        step.family, in_channels=step.modalities, out_channels=_OUTPUTS, dims=len(step.patch), **step.arguments
    )
    network.to(device).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4)
    divisor: tuple[int, ...] = network.divisor  # type: ignore[assignment]
    warm_up = [min(size, max(_WARM_UP_SIDE // part, 1) * part) for size, part in zip(step.patch, divisor, strict=True)]
    _train(network, optimiser, torch.randn(1, step.modalities, *warm_up, device=device))
    before_mb = _memory_now(device)
    x = torch.randn(1, step.modalities, *step.patch, device=device)
    began = time.perf_counter()
    _train(network, optimiser, x)
    seconds = time.perf_counter() - began
    peak_mb = _memory_peak(device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Measured(peak_mb - before_mb, peak_mb, seconds, parameters)


def _train(network: nn.Module, optimiser: torch.optim.Optimizer, x: Tensor) -> None:
    levels = network(x)
    target = torch.zeros(1, dtype=x.dtype, device=x.device)
    losses = [nn.functional.binary_cross_entropy_with_logits(level, target.expand_as(level)) for level in levels]
    torch.autograd.backward(torch.stack(losses).sum())
    optimiser.step()
    optimiser.zero_grad()
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def _memory_now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 1024**2
    if sys.platform == "linux":
        # What the warm-up has freed goes back to the system: else the step would use it again, uncounted.
        ctypes.CDLL(None).malloc_trim(0)
    return current_rss_mb()


def _memory_peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 1024**2 if device.type == "cuda" else peak_rss_mb()


if __name__ == "__main__":
    document = json.loads(sys.argv[1])
    document["patch"] = tuple(document["patch"])
    print(json.dumps(asdict(take(Step(**document)))))  # noqa: T201  the answer of this process
