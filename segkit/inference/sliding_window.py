"""Sliding-window inference: logits of a volume of any size, slab by slab.

Overlapping windows are blended with Gaussian weights (Isensee et al., nnU-Net, Nature Methods 2021, supplement 4). A
volume smaller than the window is padded with zeros, half on each side. MONAI bundles may ask for equal weights and
other padding.

Windows are computed row by row along one axis. Logits that no later row changes are yielded as a slab, so only one
window's depth of them is in memory. Equal windows with one value per channel are computed once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segkit.checkpoint.card import Blending, Padding
from segkit.shapes import Image

Logits: TypeAlias = NDArray[np.float32]
Network: TypeAlias = Callable[[Logits], Logits]
"""Windows (B, C, *window) float32 to logits (B, K, *window) float32."""

_SIGMA = 0.125
"""Standard deviation of the Gaussian as a fraction of the window, as in nnU-Net and MONAI."""
_LOWEST_WEIGHT = 1e-3
_PART_VALUES = 2**25
"""Logits that are converted from half precision at a time."""
_SAMPLE_STEP = 16
"""Step in voxels of the first test whether a window is constant."""


@dataclass(frozen=True)
class Slab:
    """Final logits (K, *spatial) of all voxels with an index along `axis` from `start` to before `stop`."""

    axis: int
    start: int
    stop: int
    logits: Logits = field(repr=False)
    spread: NDArray[np.float32] | None = field(default=None, repr=False)
    """Disagreement of the members of an ensemble, (*spatial) in 0..1."""

    @property
    def index(self) -> tuple[slice, ...]:
        """Index of its voxels in the volume (*spatial)."""
        return (*(slice(None),) * self.axis, slice(self.start, self.stop))

    def part(self, start: int, stop: int) -> Slab:
        """The voxels from `start` to before `stop`, a view."""
        index = (*(slice(None),) * self.axis, slice(start - self.start, stop - self.start))
        spread = None if self.spread is None else self.spread[index]
        return Slab(self.axis, start, stop, self.logits[(slice(None), *index)], spread)


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
    network: Network, image: Image, plan: WindowPlan, *, mirror_axes: Sequence[int] = ()
) -> Iterator[Slab]:
    """Logits of an image (C, *spatial) float32, slab by slab in the order of their voxels.

    With `mirror_axes` (of *spatial) logits are averaged over all combinations of flips along these axes, so each axis
    doubles the time.
    """
    spatial = image.shape[1:]
    before = [(size - old) // 2 for size, old in zip(plan.shape, spatial, strict=True)]
    if plan.shape != spatial:
        after = [size - old - pad for size, old, pad in zip(plan.shape, spatial, before, strict=True)]
        image = np.pad(image, [(0, 0), *zip(before, after, strict=True)], plan.padding)
    inside = tuple(slice(pad, pad + old) for pad, old in zip(before, spatial, strict=True))
    logits_of = _with_cache(_mirrored(network, mirror_axes) if mirror_axes else network)
    axis, rows = plan.axis, _Rows(plan)
    for start, following in itertools.pairwise((*plan.starts[axis], plan.shape[axis])):
        for other in itertools.product(*plan.starts[:axis], *plan.starts[axis + 1 :]):
            place = (*other[:axis], start, *other[axis:])
            rows.add(place, logits_of(image[(slice(None), *_box(place, plan.window))]))
        logits = rows.finish(following - start)
        first, last = max(start, inside[axis].start), min(following, inside[axis].stop)
        if last > first:
            cut = list(inside)
            cut[axis] = slice(first - start, last - start)
            offset = inside[axis].start
            slab = Slab(axis, first - offset, last - offset, logits[(slice(None), *cut)])
            yield from _parts(slab) if plan.blending == "half" else [slab]


def _parts(slab: Slab) -> Iterator[Slab]:
    """A slab of half precision as thin slabs of float32, so that few of its logits exist twice."""
    planes = max(1, _PART_VALUES * (slab.stop - slab.start) // slab.logits.size)
    for start in range(slab.start, slab.stop, planes):
        part = slab.part(start, min(start + planes, slab.stop))
        yield replace(part, logits=part.logits.astype(np.float32))


class _Rows:
    """Weighted sums of the logits of one row of windows; moves along the axis as rows are finished."""

    def __init__(self, plan: WindowPlan) -> None:
        self.plan = plan
        self.shape = [*plan.shape[: plan.axis], plan.window[plan.axis], *plan.shape[plan.axis + 1 :]]
        is_even = plan.blending == "constant"
        self.weight: NDArray[np.floating[Any]] = np.ones(plan.window, np.float32) if is_even else _gaussian(plan.window)
        if plan.blending == "half":
            self.weight = nnunet_weight(plan.window)
        self.weights: NDArray[Any] = np.zeros(self.shape, self.weight.dtype)
        self.sums: NDArray[Any] | None = None
        self.scratch: Logits | None = None

    def add(self, place: tuple[int, ...], logits: Logits) -> None:
        """Add the logits (K, *window) of the window that starts at `place`."""
        if self.sums is None or self.scratch is None:
            self.sums = np.zeros((len(logits), *self.shape), self.weights.dtype)
            self.scratch = np.empty(self.plan.window, np.float32)
        place = (*place[: self.plan.axis], 0, *place[self.plan.axis + 1 :])
        box = _box(place, self.plan.window)
        for total, plane in zip(self.sums, logits, strict=True):
            np.multiply(plane, self.weight, out=self.scratch)
            total[box] += self.scratch
        self.weights[box] += self.weight

    def finish(self, count: int) -> Logits:
        """Blended logits (K, *spatial) of the first `count` voxels along the axis, which are then dropped."""
        if self.sums is None:
            raise ValueError("no window was added")
        finished = (*(slice(None),) * self.plan.axis, slice(0, count))
        done: Logits = self.sums[(slice(None), *finished)] / self.weights[finished]  # of half precision: also half
        for array, axis in ((self.sums, self.plan.axis + 1), (self.weights, self.plan.axis)):
            planes = np.moveaxis(array, axis, 0)
            kept = len(planes) - count
            for begin in range(0, kept, count):  # source and target do not overlap
                end = min(begin + count, kept)
                planes[begin:end] = planes[begin + count : end + count]
            planes[kept:] = 0
        return done


def _with_cache(network: Network) -> Callable[[Image], Logits]:
    """Logits (K, *window) of one window (C, *window), with a cache for windows that are constant in each channel."""
    known: dict[tuple[float, ...], Logits] = {}

    def logits_of(window: Image) -> Logits:
        first = window[(slice(None), *(slice(0, 1),) * (window.ndim - 1))]
        sample = window[(slice(None), *(slice(None, None, _SAMPLE_STEP),) * (window.ndim - 1))]
        is_varied = (sample != first).any() or (window != first).any()
        values = tuple(first.ravel().tolist())
        if not is_varied and values in known:
            return known[values]
        logits: Logits = network(np.stack([window]))[0]
        if not is_varied:
            known[values] = logits.copy()
        return logits

    return logits_of


def _mirrored(network: Network, axes: Sequence[int]) -> Network:
    """The mean of a network's logits over all flips of its input along some spatial axes."""
    counts = range(1, len(axes) + 1)
    flips = [tuple(a + 2 for a in chosen) for count in counts for chosen in itertools.combinations(axes, count)]

    def mean(windows: Logits) -> Logits:
        total = np.array(network(windows))
        for flip in flips:
            total += np.flip(network(np.ascontiguousarray(np.flip(windows, flip))), flip)
        total /= len(flips) + 1
        return total

    return mean


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
