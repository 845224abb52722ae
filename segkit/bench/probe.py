"""Measurements in processes of their own: a process reports only one peak of memory.

`python -m segkit.bench.probe STEP` takes one training step; STEP is a `Step` in JSON, the output a `Measured` in JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from segkit.errors import SegkitError
from segkit.models.table import build_model
from segkit.runtime import current_rss_mb, peak_rss_mb, return_freed_memory, variables_with

_OUTPUTS = 3
_WARM_UP_SIDE = 32
"""Longest side of the patch that loads the kernels before memory is counted, in voxels."""


@dataclass(frozen=True)
class Finished:
    """What a process wrote, its exit code, wall seconds and peak resident memory in MB."""

    output: str
    errors: str
    code: int
    seconds: float
    peak_rss_mb: float


def run_python(arguments: Sequence[str], **variables: str) -> Finished:
    """Run Python with these arguments and these environment variables changed, to its end."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=output, stderr=errors, env=variables_with(**variables)
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        scale = 1024**2 if sys.platform == "darwin" else 1024
        return Finished(output.read(), errors.read(), process.returncode, seconds, usage.ru_maxrss / scale)


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
    """A step: MiB beyond the warm network and optimiser, peak of the process in MiB, seconds, parameters."""

    step_mb: float
    process_mb: float
    seconds: float
    parameters: int


def measure(step: Step) -> Measured:
    """Take the step in a fresh process.

    Raises:
        SegkitError: the process died, most often because the machine's memory was not enough.
    """
    done = run_python(["-m", "segkit.bench.probe", json.dumps(asdict(step))])
    if done.code:
        last = done.errors.strip().splitlines()[-1:] or ["it was killed, as the kernel does when memory runs out"]
        found = f"the step on {' x '.join(map(str, step.patch))} voxels did not finish: {last[0]}"
        raise SegkitError(found, remedy="Measure a smaller patch, or on a machine with more memory")
    return Measured(**json.loads(done.output))


def take(step: Step) -> Measured:
    """Take the step in this process, after a small one that is not counted."""
    device = torch.device(step.device)
    return_freed_memory(device)  # as training does where memory is short
    torch.manual_seed(0)
    network = build_model(
        step.family, in_channels=step.modalities, out_channels=_OUTPUTS, dims=len(step.patch), **step.arguments
    )
    network.to(device).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4)
    warm_up = [
        min(size, max(_WARM_UP_SIDE // part, 1) * part) for size, part in zip(step.patch, network.divisor, strict=True)
    ]
    _train(network, optimiser, torch.randn(1, step.modalities, *warm_up, device=device))
    before_mb = _memory_now(device)
    x = torch.randn(1, step.modalities, *step.patch, device=device)
    began = time.perf_counter()
    _train(network, optimiser, x)
    seconds = time.perf_counter() - began
    peak_mb = torch.cuda.max_memory_allocated(device) / 1024**2 if device.type == "cuda" else peak_rss_mb()
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
        ctypes.CDLL(None).malloc_trim(0)  # the step must not reuse what the warm-up has freed, which is not counted
    return current_rss_mb()


if __name__ == "__main__":
    document = json.loads(sys.argv[1])
    document["patch"] = tuple(document["patch"])
    print(json.dumps(asdict(take(Step(**document)))))  # noqa: T201
