"""Whether a graph computes what the trained network computes: logits and decoded masks of the same windows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from segkit.errors import CheckpointError
from segkit.inference.backends import Array, Backend
from segkit.inference.decode import Activation

if TYPE_CHECKING:
    from torch import nn

LARGEST_DIFFERENCE = 1e-3
"""Of logits."""
LARGEST_SHARE = 1e-4
"""Of the largest logit, which allows more where logits are larger than 10."""
SMALLEST_DICE = 0.9995
"""Of the decoded masks."""

_AS_INEXACT_AS_TORCH = 3.0
"""A graph may be so many times as far from the network in float64 as the network in float32 is."""


@dataclass(frozen=True)
class Parity:
    """How one backend compares: largest difference of a logit, the largest logit, Dice of the masks, windows."""

    largest_difference: float
    largest_logit: float
    dice: float
    windows: int

    def to_json(self) -> dict[str, Any]:
        """What the card keeps."""
        return {
            "largest_difference": float(f"{self.largest_difference:.2e}"),
            "largest_logit": float(f"{self.largest_logit:.4g}"),
            "dice": round(self.dice, 6),
            "windows": self.windows,
        }


def random_windows(channels: int, window: Sequence[int], count: int, seed: int = 0) -> list[Array]:
    """Windows (1, channels, *window) of normal noise, which is what normalised images are closest to."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, channels, *window), np.float32) for _ in range(count)]


def check_parity(
    network: nn.Module, backend: Backend, windows: Iterable[Array], expected: Iterable[Array], activation: Activation
) -> Parity:
    """Compare a backend with logits `expected` (1, K, *window) of windows (1, C, *window), those of `network`.

    Where the logits differ by more than is allowed, the network is computed in float64: norms of maps that are nearly
    constant magnify rounding, and a graph that is as close to the exact result as torch itself is no worse.

    Raises:
        CheckpointError: logits or masks differ by more than rounding explains.
    """
    difference = largest = 0.0
    common = voxels = count = 0
    for window, logits in zip(windows, expected, strict=True):
        found = backend(window)
        count += 1
        size = float(np.abs(logits).max())
        gap = float(np.abs(found - logits).max())
        if not gap <= max(LARGEST_DIFFERENCE, LARGEST_SHARE * size):
            _require_rounding(network, backend.name, window, found, logits)
        difference, largest = max(difference, gap), max(largest, size)
        one, other = _masks(found, activation), _masks(logits, activation)
        common += int(np.count_nonzero(one & other))
        voxels += int(np.count_nonzero(one)) + int(np.count_nonzero(other))
    dice = 2 * common / voxels if voxels else 1.0
    if dice < SMALLEST_DICE:
        raise CheckpointError(
            f"in {backend.name} the masks of the graph agree with those of the network to Dice {dice:.5f} only",
            expected=f"at least {SMALLEST_DICE}",
            remedy="Nothing was written. Use the run folder, and report the network and the versions at hand",
        )
    return Parity(difference, largest, dice, count)


def seconds_per_window(backends: Sequence[Backend], window: Array, rounds: int = 5) -> list[float]:
    """Median seconds of a window (1, C, *window) in each backend, all of them in turn: clocks of machines change."""
    for backend in backends:
        backend(window)
    times: list[list[float]] = [[] for _ in backends]
    for _ in range(rounds):
        for backend, so_far in zip(backends, times, strict=True):
            began = time.perf_counter()
            backend(window)
            so_far.append(time.perf_counter() - began)
    return [statistics.median(so_far) for so_far in times]


def _masks(logits: Array, activation: Activation) -> NDArray[np.bool_]:
    """What is painted, one mask an output, without the background of a softmax."""
    if activation == "sigmoid":
        return logits > 0
    outputs = np.arange(1, logits.shape[1]).reshape(1, -1, *(1,) * (logits.ndim - 2))
    painted: NDArray[np.bool_] = logits.argmax(1)[:, None] == outputs
    return painted


def _require_rounding(network: nn.Module, name: str, window: Array, found: Array, logits: Array) -> None:
    """Refuse a graph that is further from the exact result than rounding in float32 brings torch itself.

    Raises:
        CheckpointError: as said.
    """
    import torch

    try:
        with torch.inference_mode():
            exact = network.double()(torch.from_numpy(window).double()).numpy()
    finally:
        network.float()
    of_graph, of_torch = (float(np.abs(result - exact).max()) for result in (found, logits))
    if not of_graph <= _AS_INEXACT_AS_TORCH * of_torch:
        raise CheckpointError(
            f"in {name} the graph is up to {of_graph:.1e} from the exact logits, the network itself {of_torch:.1e}",
            expected=f"differences of at most {LARGEST_DIFFERENCE} or {LARGEST_SHARE} of the largest logit",
            remedy="Nothing was written. Use the run folder, and report the network and the versions at hand",
        )
