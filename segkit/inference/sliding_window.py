"""Sliding-window inference: logits of a volume of any size, slab by slab.

Overlapping windows are blended with Gaussian weights (Isensee et al., nnU-Net, Nature Methods 2021, supplement 4). A
volume smaller than the window is padded with zeros, half on each side. MONAI bundles may ask for equal weights and
other padding.

Windows are computed row by row along one axis. Logits that no later row changes are yielded as slabs, so only one
window's depth of them is in memory. Equal windows with one value per channel are computed once.

Torch on an NVIDIA GPU keeps the logits there, see `on_device`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segkit.checkpoint.card import Blending, Padding
from segkit.inference.backends import torch_backend, windows_at_once
from segkit.shapes import Image

Logits: TypeAlias = NDArray[np.float32]
Network: TypeAlias = Callable[[Logits], Logits]
"""Windows (B, C, *window) float32 to logits (B, K, *window) float32."""

_SIGMA = 0.125
"""Standard deviation of the Gaussian as a fraction of the window, as in nnU-Net and MONAI."""
_LOWEST_WEIGHT = 1e-3
_PART_VALUES = 2**25
"""Most logits of a slab: those of a row exist twice only in part."""
_SAMPLE_STEP = 16
"""Step in voxels of the first test whether a window is constant."""


@dataclass(frozen=True)
class Slab:
    """Final logits (K, *spatial) of all voxels with an index along `axis` from `start` to before `stop`."""

    axis: int
    start: int
    stop: int
    values: Any = field(repr=False)
    """The logits, as a numpy array or as a tensor on a GPU."""
    spread: Any = field(default=None, repr=False)
    """Disagreement of the members of an ensemble, (*spatial) in 0..1, where the logits are; None without one."""

    @property
    def logits(self) -> Logits:
        """The logits as a numpy array, copied from a GPU."""
        return on_host(self.values)

    @property
    def index(self) -> tuple[slice, ...]:
        """Index of its voxels in the volume (*spatial)."""
        return (*(slice(None),) * self.axis, slice(self.start, self.stop))

    def part(self, start: int, stop: int) -> Slab:
        """The voxels from `start` to before `stop`, a view."""
        index = (*(slice(None),) * self.axis, slice(start - self.start, stop - self.start))
        spread = None if self.spread is None else self.spread[index]
        return Slab(self.axis, start, stop, self.values[(slice(None), *index)], spread)


def on_host(array: Any) -> NDArray[np.float32]:
    """A numpy array itself, or a copy of a tensor as one."""
    copied: NDArray[np.float32] = array if isinstance(array, np.ndarray) else array.numpy(force=True)
    return copied


@dataclass(frozen=True)
class WindowPlan:
    """Positions of the windows of one volume: `starts` per axis, in voxels of the volume padded to `shape`."""

    shape: tuple[int, ...]
    window: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    axis: int
    """Axis of the slabs; by default that with the smallest slabs of one window's depth."""
    blending: Blending | Literal["half"] = "gaussian"
    """half: sums, weights and quotients in half precision, as in nnU-Net; slabs are then along axis 0."""
    padding: Padding = "constant"

    @property
    def count(self) -> int:
        """Number of windows."""
        return prod(map(len, self.starts))

    @property
    def logit_bytes(self) -> int:
        """Bytes of a logit of the sums."""
        return 2 if self.blending == "half" else 4

    @property
    def slab_voxels(self) -> int:
        """Voxels per output that are in memory at a time."""
        return prod(self.shape) // self.shape[self.axis] * self.window[self.axis]


def plan_windows(shape: Sequence[int], window: Sequence[int], overlap: float, axis: int | None = None) -> WindowPlan:
    """Windows over (*spatial) voxels that overlap by the fraction `overlap`; the last one ends at the edge."""
    padded = tuple(max(size, length) for size, length in zip(shape, window, strict=True))
    starts = []
    for size, length in zip(padded, window, strict=True):
        step = max(1, int(length * (1 - overlap)))
        starts.append(tuple(dict.fromkeys(min(start, size - length) for start in range(0, size - length + step, step))))
    if axis is None:
        axis = min(range(len(padded)), key=lambda one: window[one] / padded[one])
    return WindowPlan(padded, tuple(window), tuple(starts), axis)


def predict_slabs(
    network: Network, image: Image, plan: WindowPlan, *, mirror_axes: Sequence[int] = (), rows: Rows | None = None
) -> Iterator[Slab]:
    """Logits of an image (C, *spatial) float32, slab by slab in the order of their voxels.

    `rows` None: on an NVIDIA GPU if torch computes the network there, else on the CPU.

    With `mirror_axes` (of *spatial) logits are averaged over all combinations of flips along these axes, so each axis
    doubles the time.
    """
    spatial = image.shape[1:]
    before = [(size - old) // 2 for size, old in zip(plan.shape, spatial, strict=True)]
    if plan.shape != spatial:
        after = [size - old - pad for size, old, pad in zip(plan.shape, spatial, before, strict=True)]
        image = np.pad(image, [(0, 0), *zip(before, after, strict=True)], plan.padding)
    inside = tuple(slice(pad, pad + old) for pad, old in zip(before, spatial, strict=True))
    axis, rows = plan.axis, rows or rows_for(network, plan, mirror_axes)
    for start, following in itertools.pairwise((*plan.starts[axis], plan.shape[axis])):
        others = itertools.product(*plan.starts[:axis], *plan.starts[axis + 1 :])
        rows.compute(image, [(*other[:axis], start, *other[axis:]) for other in others])
        for begin, logits in rows.finish(following - start):
            first, last = start + begin, start + begin + logits.shape[axis + 1]
            low, high = max(first, inside[axis].start), min(last, inside[axis].stop)
            if high > low:
                cut = list(inside)
                cut[axis] = slice(low - first, high - first)
                offset = inside[axis].start
                yield Slab(axis, low - offset, high - offset, logits[(slice(None), *cut)])


def rows_for(network: Network, plan: WindowPlan, mirror_axes: Sequence[int]) -> Rows:
    """Rows on the NVIDIA GPU where torch computes the network, else on the CPU."""
    backend = torch_backend(network)
    if backend is None or backend.device.type != "cuda":
        return Rows(network, plan, mirror_axes)
    from segkit.inference.on_device import DeviceRows

    return DeviceRows(backend, plan, mirror_axes)


class Rows:
    """Weighted sums of the logits of one row of windows; moves along the axis as rows are finished.

    As many windows are computed at once as torch has threads on a CPU, else one.
    """

    def __init__(self, network: Network, plan: WindowPlan, mirror_axes: Sequence[int]) -> None:
        self.plan = plan
        self.at_once = windows_at_once(network)
        self.logits_of = _with_cache(mirrored(lambda x: network(np.ascontiguousarray(x)), mirror_axes, np.flip))
        self.shape = [*plan.shape[: plan.axis], plan.window[plan.axis], *plan.shape[plan.axis + 1 :]]
        is_even = plan.blending == "constant"
        self.weight: Any = np.ones(plan.window, np.float32) if is_even else _gaussian(plan.window)
        if plan.blending == "half":
            self.weight = nnunet_weight(plan.window)
        self.weights: Any = np.zeros(self.shape, self.weight.dtype)
        self.sums: Any = None
        self.scratch = np.empty(0, np.float32)

    def compute(self, image: Image, places: Sequence[tuple[int, ...]]) -> None:
        """Add the logits of the windows of a padded image (C, *padded) that start at these places."""
        for first in range(0, len(places), self.at_once):
            some = places[first : first + self.at_once]
            found = self.logits_of([image[(slice(None), *_box(place, self.plan.window))] for place in some])
            for place, logits in zip(some, found, strict=True):
                self.add(place, logits)

    def add(self, place: Sequence[int], logits: Any) -> None:
        """Add the logits (K, *window) of the window that starts at `place`."""
        if self.sums is None:
            self.sums = np.zeros((len(logits), *self.shape), self.weights.dtype)
            self.scratch = np.empty(self.plan.window, np.float32)
        box = self.box(place)
        for total, plane in zip(self.sums, logits, strict=True):  # plane by plane, within the cache of a core
            np.multiply(plane, self.weight, out=self.scratch)
            total[box] += self.scratch
        self.weights[box] += self.weight

    def box(self, place: Sequence[int]) -> tuple[slice, ...]:
        """Index in the row (*row) of the window that starts at `place` of the volume."""
        return _box((*place[: self.plan.axis], 0, *place[self.plan.axis + 1 :]), self.plan.window)

    def finish(self, count: int) -> Iterator[tuple[int, Any]]:
        """Blended logits (K, *part) float32 of the first `count` voxels along the axis, which are then dropped.

        They come in parts, with the first voxel of each.
        """
        if self.sums is None:
            raise ValueError("no window was added")
        axis = self.plan.axis
        at_once = max(1, _PART_VALUES * self.shape[axis] // (len(self.sums) * prod(self.shape)))
        for begin in range(0, count, at_once):
            part = (*(slice(None),) * axis, slice(begin, min(begin + at_once, count)))
            yield begin, self.in_float32(self.sums[(slice(None), *part)] / self.weights[part])  # of half: also half
        for planes in (self.sums.swapaxes(0, axis + 1), self.weights.swapaxes(0, axis)):
            kept = len(planes) - count
            for begin in range(0, kept, count):  # source and target do not overlap
                end = min(begin + count, kept)
                planes[begin:end] = planes[begin + count : end + count]
            planes[kept:] = 0

    def in_float32(self, logits: Any) -> Any:
        """The logits themselves, or a copy of those of half precision."""
        return np.asarray(logits, np.float32)


def _with_cache(network: Network) -> Callable[[Sequence[Image]], list[Logits]]:
    """Logits (K, *window) of each window (C, *window), with a cache for windows that are constant in each channel."""
    known: dict[tuple[float, ...], Logits] = {}

    def logits_of(windows: Sequence[Image]) -> list[Logits]:
        values = [_constant_values(window) for window in windows]
        new = [number for number, constant in enumerate(values) if constant is None or constant not in known]
        computed = dict(zip(new, network(np.stack([windows[number] for number in new])), strict=True)) if new else {}
        for number, logits in computed.items():
            if (constant := values[number]) is not None:
                known[constant] = logits.copy()
        return [
            computed[number] if number in computed else known[values[number] or ()] for number in range(len(values))
        ]

    return logits_of


def _constant_values(window: Image) -> tuple[float, ...] | None:
    """The value of each channel of a window (C, *window) that is constant in each; None for all others."""
    first = window[(slice(None), *(slice(0, 1),) * (window.ndim - 1))]
    sample = window[(slice(None), *(slice(None, None, _SAMPLE_STEP),) * (window.ndim - 1))]
    is_varied = (sample != first).any() or (window != first).any()
    return None if is_varied else tuple(first.ravel().tolist())


def mirrored(network: Callable[[Any], Any], axes: Sequence[int], flip: Callable[[Any, Any], Any]) -> Any:
    """The mean of a network's logits over all flips of its input along some spatial axes, of arrays that `flip` takes.

    Without axes it is the network itself.
    """
    counts = range(1, len(axes) + 1)
    flips = [tuple(a + 2 for a in chosen) for count in counts for chosen in itertools.combinations(axes, count)]

    def mean(windows: Any) -> Any:
        total = network(windows)
        for chosen in flips:
            total = total + flip(network(flip(windows, chosen)), chosen)
        return total / (len(flips) + 1)

    return mean if flips else network


def _box(place: Sequence[int], window: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(place, window, strict=True))


def _gaussian(window: Sequence[int]) -> NDArray[np.float32]:
    """Weight of each voxel, (*window), 1 in the centre."""
    weight = np.ones((), np.float64)
    for length in window:
        place = np.arange(length) - (length - 1) / 2
        weight = weight[..., None] * np.exp(-(place**2) / (2 * (_SIGMA * length) ** 2))
    return np.maximum(weight, _LOWEST_WEIGHT).astype(np.float32)


def nnunet_weight(window: Sequence[int]) -> NDArray[np.float16]:
    """nnU-Net's weight of each voxel, (*window): a filtered point, 10 in the centre, in half precision, never 0."""
    point = np.zeros(window)
    point[tuple(length // 2 for length in window)] = 1
    weight = ndimage.gaussian_filter(point, [_SIGMA * length for length in window], mode="constant")
    half: NDArray[np.float16] = (weight / (weight.max() / 10)).astype(np.float32).astype(np.float16)
    half[half == 0] = half[half > 0].min()
    return half
