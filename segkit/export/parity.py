"""Whether a graph computes what the trained network computes of the same windows: logits and masks, or images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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

LARGEST_ODD_SHARE = 0.01
"""Of the voxels of a filled hole that may differ by more than that; together they are bound by the next."""
LARGEST_RMS = 0.01
"""Root of the mean squared difference in a filled hole, of intensities whose deviation is 1."""

_AS_INEXACT_AS_TORCH = 3.0
"""A graph may be so many times as far from the network in float64 as the network in float32 is."""


@dataclass(frozen=True)
class Parity:
    """How one backend compares: largest difference of a logit, the largest logit, Dice of the masks, windows.

    Of an inpainting model the logits are intensities, and there is no Dice.
    """

    largest_difference: float
    largest_logit: float
    dice: float | None
    windows: int

    def to_json(self) -> dict[str, Any]:
        """What the card keeps."""
        return {
            "largest_difference": float(f"{self.largest_difference:.2e}"),
            "largest_logit": float(f"{self.largest_logit:.4g}"),
            "dice": None if self.dice is None else round(self.dice, 6),
            "windows": self.windows,
        }


def random_windows(channels: int, window: Sequence[int], count: int, seed: int = 0) -> list[Array]:
    """Windows (1, channels, *window) of normal noise, which is what normalised images are closest to."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, channels, *window), np.float32) for _ in range(count)]


class HoledWindow(NamedTuple):
    """What an inpainting network is given, (1, K, *window), and the hole in it, (*window)."""

    stacked: Array
    hole: NDArray[np.bool_]


def windows_with_holes(
    channels: int, context: Literal["none", "hole", "mirror"], window: Sequence[int], count: int, seed: int = 0
) -> list[HoledWindow]:
    """Windows as an inpainting network is given them: normal noise in a ball, 0 around it, a box missing inside.

    By `context` the image of `channels` is followed by the hole, then by the image mirrored along its first axis and
    where that is known.
    """
    rng = np.random.default_rng(seed)
    places = np.meshgrid(*(np.linspace(-1, 1, length) for length in window), indexing="ij", sparse=True)
    brain = np.asarray(sum(place**2 for place in places) <= 1)
    found: list[HoledWindow] = []
    for _ in range(count):
        starts = [int(rng.integers(length // 6, length // 2 + 1)) for length in window]
        hole = np.zeros(brain.shape, bool)
        hole[tuple(slice(first, first + -(-length // 3)) for first, length in zip(starts, window, strict=True))] = True
        known = brain & ~hole
        image = rng.standard_normal((channels, *window), np.float32) * known
        stacked = [image] if context == "none" else [image, hole[None]]
        if context == "mirror":
            stacked += [image[:, ::-1], known[None, ::-1]]
        found.append(HoledWindow(np.concatenate(stacked, dtype=np.float32)[None], hole))
    return found


def check_restored(backend: Backend, windows: Iterable[HoledWindow], expected: Iterable[Array]) -> Parity:
    """Compare a backend with the images `expected` (1, C, *window) that a network makes of windows, in their holes.

    A layer that decides for each voxel whether it belongs to a region may decide otherwise where it is undecided to the
    last digit, and then some voxels around differ; so a few may, as long as all together the images are the same.
    Outside the hole nothing is used, and where nothing at all is to be seen, rounding is all there is.

    Raises:
        CheckpointError: the images differ by more than that.
    """
    difference = largest = 0.0
    count = 0
    for window, image in zip(windows, expected, strict=True):
        gap = np.abs(backend(window.stacked) - image)[..., window.hole]
        count += 1
        size = float(np.abs(image[..., window.hole]).max())
        odd_share = 1 - float((gap <= max(LARGEST_DIFFERENCE, LARGEST_SHARE * size)).mean())
        rms = float(np.sqrt(np.square(gap, dtype=np.float64).mean()))
        if not (odd_share <= LARGEST_ODD_SHARE and rms <= LARGEST_RMS):
            raise CheckpointError(
                f"in {backend.name} the filled holes differ by {rms:.1e} (root of the mean square), and "
                f"{odd_share:.1%} of their voxels by more than {LARGEST_DIFFERENCE}",
                expected=f"at most {LARGEST_RMS} and {LARGEST_ODD_SHARE:.0%}",
                remedy="Nothing was written. Use the run folder, and report the network and the versions at hand",
            )
        difference, largest = max(difference, float(gap.max())), max(largest, size)
    return Parity(difference, largest, None, count)


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
