"""Memory of a training step in each memory mode, and what fits into one budget.

Every table: RevMBUNet, expansion 2, four modalities, batch 1, float32. A figure is the peak of a process (resident
memory, or allocated GPU memory) minus what it held after a step on a small patch: activations, scratch space and
gradients. On a CPU freed memory goes back to the system at once, as in training where memory is short.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from segkit.bench.probe import Measured, Step, measure
from segkit.models.table import build_model
from segkit.preparing.memory import step_bytes

Row = dict[str, Any]

WIDTHS = (32, 64, 128, 256, 512)
_MODES: dict[str, dict[str, Any]] = {
    "plain": {"mode": "plain"},
    "checkpoint": {"mode": "checkpoint"},
    "reversible": {"mode": "reversible"},
    "reversible, chunked": {"mode": "reversible", "chunks": 4},
}
_SMALLEST = _MODES["reversible, chunked"]
WHOLE_VOLUME = (240, 240, 160)
"""A BraTS volume, 240 x 240 x 155 voxels, padded to what the network divides."""


def modes(side: int, depths: Sequence[int], device: str) -> Iterator[Row]:
    """Every memory mode at every depth (blocks per level) on patches of `side` voxels."""
    for blocks in depths:
        plain = None
        for name, chosen in _MODES.items():
            measured = measure(_step(blocks, chosen, (side,) * 3, device))
            plain = plain or measured.step_mb
            yield _row(measured, table="modes", mode=name, blocks=blocks, patch=(side,) * 3) | {
                "of_plain": round(measured.step_mb / plain, 3)
            }


def depth(side: int, depths: Sequence[int], device: str) -> Iterator[Row]:
    """How a reversible step grows with depth, its parameters and their gradients left out."""
    first = None
    for blocks in depths:
        measured = measure(_step(blocks, _MODES["reversible"], (side,) * 3, device))
        activations_mb = measured.step_mb - 4 * measured.parameters / 1024**2  # without gradients
        first = first or activations_mb
        yield _row(measured, table="depth", mode="reversible", blocks=blocks, patch=(side,) * 3) | {
            "without_gradients_mb": round(activations_mb, 1),
            "of_first": round(activations_mb / first, 3),
        }


def budget(side: int, depths: Sequence[int], device: str) -> Iterator[Row]:
    """What fits reversibly into the memory that plain mode needs on patches of `side` voxels."""
    for blocks in depths:
        plain = measure(_step(blocks, _MODES["plain"], (side,) * 3, device))
        limit_mb = plain.step_mb
        yield _row(plain, table="budget", mode="plain", blocks=blocks, patch=(side,) * 3) | {"buys": "the budget"}
        for what, candidate in (("volume", _larger), ("channels", _wider), ("depth", _deeper)):
            steps = partial(candidate, blocks=blocks, side=side, device=device)
            # An estimate of a deep network takes longer than measuring it.
            found = _largest(steps, limit_mb, len(_DEPTH_FACTORS) if what == "depth" else _estimated(steps, limit_mb))
            if found is None:
                continue
            step, measured, factor = found
            yield _row(
                measured, table="budget", mode="reversible, chunked", blocks=step.arguments["blocks"], patch=step.patch
            ) | {"buys": f"{factor:.1f} x {what}", "widths": "-".join(map(str, step.arguments["widths"]))}


def volume(device: str) -> Iterator[Row]:
    """A training step on a whole BraTS volume, uncropped, two blocks a level."""
    measured = measure(_step(2, _SMALLEST, WHOLE_VOLUME, device))
    yield _row(measured, table="volume", mode="reversible, chunked", blocks=2, patch=WHOLE_VOLUME) | {
        "minutes": round(measured.seconds / 60, 2)
    }


def _step(
    blocks: int, chosen: dict[str, Any], patch: tuple[int, ...], device: str, widths: Sequence[int] = WIDTHS
) -> Step:
    arguments = {"widths": tuple(widths), "blocks": blocks, "decoder_blocks": blocks, "expansion": 2, **chosen}
    return Step(arguments=arguments, patch=patch, device=device)


def _larger(size: int, blocks: int, side: int, device: str) -> tuple[Step, float]:
    longer = side + 16 * size
    return _step(blocks, _SMALLEST, (longer,) * 3, device), (longer / side) ** 3


def _wider(size: int, blocks: int, side: int, device: str) -> tuple[Step, float]:
    widths = [width * (2 + size) // 2 for width in WIDTHS]
    return _step(blocks, _SMALLEST, (side,) * 3, device, widths), (2 + size) / 2


def _deeper(size: int, blocks: int, side: int, device: str) -> tuple[Step, float]:
    factor = _DEPTH_FACTORS[size - 1]
    return _step(blocks * factor, _SMALLEST, (side,) * 3, device), float(factor)


_DEPTH_FACTORS = (2, 3, 4, 6, 8, 12, 16)
_MOST = 31
"""Largest size of volumes and widths that is tried."""

_Steps = Callable[[int], tuple[Step, float]]
"""Size, from 1 on, to a step and what it is a multiple of."""


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

    build = partial(
        build_model, step.family, in_channels=step.modalities, out_channels=3, dims=len(step.patch), **step.arguments
    )
    return step_bytes(build, (1, step.modalities, *step.patch), loss) / 1024**2


def _row(measured: Measured, *, table: str, mode: str, blocks: int, patch: Sequence[int]) -> Row:
    return {
        "table": table,
        "patch": "x".join(map(str, patch)),
        "blocks": blocks,
        "mode": mode,
        "step_mb": round(measured.step_mb, 1),
        "process_mb": round(measured.process_mb, 1),
        "seconds": round(measured.seconds, 2),
        "parameters": measured.parameters,
        "megavoxels": round(math.prod(patch) / 1e6, 2),
    }


TABLES: dict[str, Callable[..., Iterator[Row]]] = {"modes": modes, "depth": depth, "budget": budget, "volume": volume}
"""Table name -> the function that measures it row by row."""
