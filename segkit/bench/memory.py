"""Memory of a training step in each memory mode, and what fits into one budget.

Every table: RevMBUNet, expansion 2, four modalities, batch 1, float32. A figure is the peak of a process of its own
(resident memory, or allocated GPU memory), because a process reports only one peak, minus what it held after a step on
a small patch: activations, scratch space and gradients. On a CPU freed memory is returned to the system at once, as in
training when memory is short.

`python -m segkit.bench.memory STEP` takes one training step; STEP is a `Step` in JSON, the output a `Measured` in JSON.
"""

import ctypes
import json
import math
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from segkit.bench.whole import run_python
from segkit.errors import SegkitError
from segkit.models.blocks import SegmentationNetwork
from segkit.models.table import build_model
from segkit.preparing.memory import step_bytes
from segkit.process_memory import current_rss_mb, peak_rss_mb, return_freed_memory

Row = dict[str, Any]

WIDTHS = (32, 64, 128, 256, 512)
_MODES: dict[str, dict[str, Any]] = {
    "plain": {"mode": "plain"},
    "checkpoint": {"mode": "checkpoint"},
    "reversible": {"mode": "reversible"},
    "reversible, chunked": {"mode": "reversible", "chunks": 4},
}
_DEPTH_FACTORS = (2, 3, 4, 6, 8, 12, 16)
_MOST = 31
"""Largest size of volumes and widths that is tried."""
_SMALLEST = _MODES["reversible, chunked"]
WHOLE_VOLUME = (240, 240, 160)
"""A BraTS volume, 240 x 240 x 155 voxels, padded to multiples of the network's divisor."""
_MODALITIES = 4
_WARM_UP_SIDE = 32
"""Longest side of the patch that loads the kernels before memory is counted, in voxels."""


@dataclass(frozen=True)
class Step:
    """One training step of a RevMBUNet to measure: float32, batch 1, three sigmoid outputs, AdamW."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    patch: tuple[int, ...] = (64, 64, 64)
    device: str = "cpu"

    def build(self) -> SegmentationNetwork:
        """The network, with random weights."""
        return build_model("revmbunet", in_channels=_MODALITIES, out_channels=3, **self.arguments)


@dataclass(frozen=True)
class Measured:
    """A step: MiB beyond the warm network and optimiser, peak of the process in MiB, seconds, parameters."""

    step_mb: float
    process_mb: float
    seconds: float
    parameters: int


def modes(side: int, depths: Sequence[int], device: str) -> Iterator[Row]:
    """Every memory mode at every depth (blocks per level) on patches of `side` voxels."""
    for blocks in depths:
        plain = None
        for name, chosen in _MODES.items():
            step = _step(blocks, chosen, (side,) * 3, device)
            measured = measure(step)
            plain = plain or measured.step_mb
            yield _row("modes", name, step, measured) | {"of_plain": round(measured.step_mb / plain, 3)}


def depth(side: int, depths: Sequence[int], device: str) -> Iterator[Row]:
    """How a reversible step grows with depth, its parameters and their gradients left out."""
    first = None
    for blocks in depths:
        step = _step(blocks, _MODES["reversible"], (side,) * 3, device)
        measured = measure(step)
        activations_mb = measured.step_mb - 4 * measured.parameters / 1024**2  # without gradients
        first = first or activations_mb
        yield _row("depth", "reversible", step, measured) | {
            "without_gradients_mb": round(activations_mb, 1),
            "of_first": round(activations_mb / first, 3),
        }


def budget(side: int, depths: Sequence[int], device: str) -> Iterator[Row]:
    """What fits in reversible mode into the memory that plain mode needs on patches of `side` voxels."""
    for blocks in depths:
        plain = _step(blocks, _MODES["plain"], (side,) * 3, device)
        measured = measure(plain)
        limit_mb = measured.step_mb
        yield _row("budget", "plain", plain, measured) | {"buys": "the budget"}
        for what in ("volume", "channels", "depth"):
            steps = partial(_bought, what=what, blocks=blocks, side=side, device=device)
            # An estimate of a deep network takes longer than measuring it.
            found = _largest(steps, limit_mb, len(_DEPTH_FACTORS) if what == "depth" else _estimated(steps, limit_mb))
            if found is None:
                continue
            step, measured, factor = found
            bought = {"buys": f"{factor:.1f} x {what}", "widths": "-".join(map(str, step.arguments["widths"]))}
            yield _row("budget", "reversible, chunked", step, measured) | bought


def volume(device: str) -> Iterator[Row]:
    """A training step on a whole BraTS volume, uncropped, two blocks a level."""
    step = _step(2, _SMALLEST, WHOLE_VOLUME, device)
    measured = measure(step)
    yield _row("volume", "reversible, chunked", step, measured) | {"minutes": round(measured.seconds / 60, 2)}


def _step(
    blocks: int, chosen: dict[str, Any], patch: tuple[int, ...], device: str, widths: Sequence[int] = WIDTHS
) -> Step:
    arguments = {"widths": tuple(widths), "blocks": blocks, "decoder_blocks": blocks, "expansion": 2, **chosen}
    return Step(arguments=arguments, patch=patch, device=device)


def _bought(size: int, what: str, blocks: int, side: int, device: str) -> tuple[Step, float]:
    """A step of this size in volume, channels or depth, and its factor over the plain one."""
    if what == "volume":
        longer = side + 16 * size
        return _step(blocks, _SMALLEST, (longer,) * 3, device), (longer / side) ** 3
    if what == "channels":
        widths = [width * (2 + size) // 2 for width in WIDTHS]
        return _step(blocks, _SMALLEST, (side,) * 3, device, widths), (2 + size) / 2
    factor = _DEPTH_FACTORS[size - 1]
    return _step(blocks * factor, _SMALLEST, (side,) * 3, device), float(factor)


_Steps = Callable[[int], tuple[Step, float]]
"""Size (from 1) to a step and its factor over the plain one."""


def _largest(steps: _Steps, limit_mb: float, size: int) -> tuple[Step, Measured, float] | None:
    """The largest step that was measured within the limit, from `size` downwards."""
    while size > 0:
        step, factor = steps(size)
        measured = measure(step)
        if measured.step_mb <= limit_mb:
            return step, measured, factor
        size -= max(1, size // 8)
    return None


def _estimated(steps: _Steps, limit_mb: float) -> int:
    """The largest size whose step fits by estimate."""
    return bisect_right(range(1, _MOST + 1), limit_mb, key=lambda size: _estimate_mb(steps(size)[0]))


def _estimate_mb(step: Step) -> float:
    def loss(levels: list[Tensor], labels: Tensor) -> Tensor:
        return torch.stack([functional.softplus(level).mean() for level in levels]).sum()

    return step_bytes(step.build, (1, _MODALITIES, *step.patch), loss) / 1024**2


def _row(table: str, mode: str, step: Step, measured: Measured) -> Row:
    what = {"table": table, "patch": "x".join(map(str, step.patch)), "blocks": step.arguments["blocks"], "mode": mode}
    memory = {"step_mb": round(measured.step_mb, 1), "process_mb": round(measured.process_mb, 1)}
    sizes = {"parameters": measured.parameters, "megavoxels": round(math.prod(step.patch) / 1e6, 2)}
    return what | memory | {"seconds": round(measured.seconds, 2)} | sizes


TABLES: dict[str, Callable[..., Iterator[Row]]] = {"modes": modes, "depth": depth, "budget": budget, "volume": volume}
"""Table name -> the function that measures it row by row."""


def measure(step: Step) -> Measured:
    """Take the step in a new process.

    Raises:
        SegkitError: the process failed, most often because memory was too short.
    """
    done = run_python(["-m", "segkit.bench.memory", json.dumps(asdict(step))])
    if done.code:
        last = done.errors.strip().splitlines()[-1:] or ["it was killed, probably because memory ran out"]
        found = f"the step on {' x '.join(map(str, step.patch))} voxels did not finish: {last[0]}"
        raise SegkitError(found, remedy="Measure a smaller patch, or on a machine with more memory")
    return Measured(**json.loads(done.output))


def take(step: Step) -> Measured:
    """Take the step in this process, after a small one that is not counted."""
    device = torch.device(step.device)
    return_freed_memory(device)  # as training does where memory is short
    torch.manual_seed(0)
    network = step.build()
    network.to(device).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4)
    multiples = [max(_WARM_UP_SIDE // part, 1) * part for part in network.divisor]
    warm_up = map(min, step.patch, multiples)
    _train(network, optimiser, torch.randn(1, _MODALITIES, *warm_up, device=device))
    before_mb = _memory_now(device)
    x = torch.randn(1, _MODALITIES, *step.patch, device=device)
    start = time.perf_counter()
    _train(network, optimiser, x)
    seconds = time.perf_counter() - start
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
        ctypes.CDLL(None).malloc_trim(0)  # the step must not reuse memory that the warm-up freed: it is not counted
    return current_rss_mb()


if __name__ == "__main__":
    document = json.loads(sys.argv[1])
    document["patch"] = tuple(document["patch"])
    print(json.dumps(asdict(take(Step(**document)))))  # noqa: T201
