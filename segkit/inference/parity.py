"""Comparison of an ONNX graph with the trained network on the same windows: logits and masks, or filled holes."""

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
"""Largest allowed difference of logits."""
LARGEST_SHARE = 1e-4
"""The same as a share of the largest logit; the larger of both limits holds."""
SMALLEST_DICE = 0.9995
"""Smallest allowed Dice of the decoded masks."""

LARGEST_ODD_SHARE = 0.01
"""Share of the voxels of a filled hole that may differ by more than the limits of logits."""
LARGEST_RMS = 0.01
"""Root mean square difference in a filled hole, of intensities whose standard deviation is 1."""

_LARGEST_ERROR_RATIO = 3.0
"""Error of the graph against the network in float64, relative to the error of the network in float32."""
_REMEDY = "Nothing was written. Use the run folder, and report the network and the versions at hand"


@dataclass(frozen=True)
class Parity:
    """Comparison of one backend; for inpainting the logits are intensities, and Dice is None."""

    largest_difference: float
    largest_logit: float
    dice: float | None
    windows: int

    def to_json(self) -> dict[str, Any]:
        """The entry of the model card."""
        return {
            "largest_difference": float(f"{self.largest_difference:.2e}"),
            "largest_logit": float(f"{self.largest_logit:.4g}"),
            "dice": None if self.dice is None else round(self.dice, 6),
            "windows": self.windows,
        }


def random_windows(channels: int, window: Sequence[int], count: int, seed: int = 0) -> list[Array]:
    """Windows (1, channels, *window) of normal noise, similar to normalised images."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, channels, *window), np.float32) for _ in range(count)]


def relative_difference(backend: Backend, reference: Backend, window: Array) -> float:
    """Largest difference of the logits of a window (1, C, *window), relative to the largest logit if that exceeds 1."""
    expected = reference(window)
    return float(np.abs(backend(window) - expected).max() / max(1.0, float(np.abs(expected).max())))


class HoledWindow(NamedTuple):
    """Input of an inpainting network, (1, K, *window), and its hole, (*window)."""

    stacked: Array
    hole: NDArray[np.bool_]


def windows_with_holes(
    channels: int, context: Literal["none", "hole", "mirror"], window: Sequence[int], count: int, seed: int = 0
) -> list[HoledWindow]:
    """Inputs of an inpainting network: normal noise in a ball, 0 outside it, a missing box inside.

    `channels` are those of the image; `context` adds more, see `ModelCard.input_channels`.
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


def check_restored(backend: Backend, windows: Sequence[HoledWindow], expected: Iterable[Array]) -> Parity:
    """Compare a backend with the output `expected` (1, C, *window) of a network, inside the holes of windows.

    A layer that thresholds may decide differently within rounding of the threshold, which changes nearby voxels. So a
    few voxels may differ, if the root mean square difference is small.

    Raises:
        CheckpointError: the images differ by more than that.
    """
    difference = largest = 0.0
    for window, image in zip(windows, expected, strict=True):
        gap = np.abs(backend(window.stacked) - image)[..., window.hole]
        size = float(np.abs(image[..., window.hole]).max())
        odd_share = 1 - float((gap <= max(LARGEST_DIFFERENCE, LARGEST_SHARE * size)).mean())
        rms = float(np.sqrt(np.square(gap, dtype=np.float64).mean()))
        if not (odd_share <= LARGEST_ODD_SHARE and rms <= LARGEST_RMS):
            raise CheckpointError(
                f"in {backend.name} the filled holes differ by {rms:.1e} (root of the mean square), and "
                f"{odd_share:.1%} of their voxels by more than {LARGEST_DIFFERENCE}",
                expected=f"at most {LARGEST_RMS} and {LARGEST_ODD_SHARE:.0%}",
                remedy=_REMEDY,
            )
        difference, largest = max(difference, float(gap.max())), max(largest, size)
    return Parity(difference, largest, None, len(windows))


def check_parity(
    network: nn.Module, backend: Backend, windows: Sequence[Array], expected: Iterable[Array], activation: Activation
) -> Parity:
    """Compare a backend with the logits `expected` (1, K, *window) of `network` for windows (1, C, *window).

    If logits differ by more than the limits, both are compared with the network in float64, because norms of nearly
    constant maps magnify rounding: an error like that of torch in float32 is accepted.

    Raises:
        CheckpointError: logits or masks differ by more than rounding explains.
    """
    difference = largest = 0.0
    common = voxels = 0
    for window, logits in zip(windows, expected, strict=True):
        found = backend(window)
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
            remedy=_REMEDY,
        )
    return Parity(difference, largest, dice, len(windows))


def seconds_per_window(backends: Sequence[Backend], window: Array, rounds: int = 5) -> list[float]:
    """Median seconds of a window (1, C, *window) in each backend, run in turn because clock speeds change."""
    for backend in backends:
        backend(window)
    times: list[list[float]] = [[] for _ in backends]
    for _ in range(rounds):
        for backend, so_far in zip(backends, times, strict=True):
            start = time.perf_counter()
            backend(window)
            so_far.append(time.perf_counter() - start)
    return [statistics.median(so_far) for so_far in times]


def _masks(logits: Array, activation: Activation) -> NDArray[np.bool_]:
    """One mask per output, without the background of a softmax."""
    if activation == "sigmoid":
        return logits > 0
    outputs = np.arange(1, logits.shape[1]).reshape(1, -1, *(1,) * (logits.ndim - 2))
    painted: NDArray[np.bool_] = logits.argmax(1)[:, None] == outputs
    return painted


def _require_rounding(network: nn.Module, name: str, window: Array, found: Array, logits: Array) -> None:
    """Refuse a graph whose error against the network in float64 is much larger than that of torch in float32."""
    import torch

    try:
        with torch.inference_mode():
            exact = network.double()(torch.from_numpy(window).double()).numpy()
    finally:
        network.float()
    of_graph, of_torch = (float(np.abs(result - exact).max()) for result in (found, logits))
    if not of_graph <= _LARGEST_ERROR_RATIO * of_torch:
        raise CheckpointError(
            f"in {name} the graph is up to {of_graph:.1e} from the exact logits, the network itself {of_torch:.1e}",
            expected=f"differences of at most {LARGEST_DIFFERENCE} or {LARGEST_SHARE} of the largest logit",
            remedy=_REMEDY,
        )
