"""Slabs of logits on the prepared grid to label maps, probabilities and uncertainty on the grid of the input file.

The preparation is undone: logits are resampled linearly to the cropped box, the box is placed in the whole volume, and
the orientation is restored. Slabs are decoded as they arrive, so the label map, one byte per voxel, is the only array
of the size of the input.

Most voxels need no resampling: where the eight prepared voxels around a voxel have the same label, the linear
interpolation between them has it too, since their logits have the same sign or the same largest output.
"""

import itertools
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from segkit.errors import CheckpointError
from segkit.inference.sliding_window import Logits, Slab, on_host
from segkit.preparing.preprocessing import Preparation
from segkit.preparing.resampling import Neighbours, nearest_neighbours, neighbours
from segkit.reading.files import write_image
from segkit.shapes import AnyArray, LabelMap

Activation = Literal["sigmoid", "softmax"]

_HALF_STEP = 2.0**-10
"""Largest distance of neighbouring numbers of half precision, relative to them."""
_AT_ONCE = 4096
"""Voxels interpolated at a time, so that their outputs fit into the cache of a core."""


def decode(slabs: Iterable[Slab], preparation: Preparation, activation: Activation, values: Sequence[int]) -> LabelMap:
    """Label map (*source) uint8 on the input's grid, from slabs of logits (K, *prepared) in order.

    Output k paints `values[k]`. Sigmoid outputs are painted where the logit is above 0 (probability above one half),
    later over earlier; softmax outputs where their logit is the largest, the first of equals. Outside the crop is 0.

    Raises:
        CheckpointError: the logits contain NaN, or their number differs from that of the values.
    """
    whole = np.zeros(preparation.reoriented_shape, np.uint8)
    _paint(slabs, whole[preparation.crop_slices], preparation.resampled_shape, activation, values, preparation)
    return _to_source(whole, preparation)


def decode_prepared(
    slabs: Iterable[Slab], shape: tuple[int, ...], activation: Activation, values: Sequence[int]
) -> LabelMap:
    """Label map (*prepared) uint8 of `shape`, painted like `decode` and with its errors."""
    labels = np.zeros(shape, np.uint8)
    _paint(slabs, labels, shape, activation, values)
    return labels


def _to_source(whole: AnyArray, preparation: Preparation) -> AnyArray:
    """An array of the reoriented volume in the orientation of the input, (*source)."""
    return np.ascontiguousarray(preparation.reorientation.undo(whole))


def _functions(array: Any) -> Any:
    """The module with functions of such arrays: numpy, or torch for tensors."""
    return np if isinstance(array, np.ndarray) else sys.modules["torch"]


def probabilities(logits: Any, activation: Activation) -> Any:
    """Probabilities of logits (K, ...), float32 in 0..1, array or tensor; those of a softmax add up to 1."""
    xp = _functions(logits)
    if activation == "sigmoid":
        return 0.5 * (1 + xp.tanh(0.5 * logits))
    shares = xp.exp(logits - xp.amax(logits, 0))
    shares /= shares.sum(0)
    return shares


def logits_of(shares: Any, activation: Activation) -> Any:
    """Logits (K, ...) of probabilities; of a softmax their logarithms, which have the same argmax and softmax."""
    xp = _functions(shares)
    if activation == "softmax":
        return xp.log(xp.clip(shares, float(np.finfo(np.float32).tiny), None))
    shares = xp.clip(shares, 1e-7, 1 - 1e-7)
    return xp.log(shares / (1 - shares))


def _paint(
    slabs: Iterable[Slab],
    box: LabelMap,
    shape: tuple[int, ...],
    activation: Activation,
    values: Sequence[int],
    preparation: Preparation | None = None,
) -> None:
    """Paint slabs of a prepared grid of that shape into `box` (*cropped), in place."""
    table, resampling, slabs = np.asarray(values, np.uint8), None, iter(slabs)
    for slab in slabs:
        if len(slab.values) != len(values):
            found = f"the network gave {len(slab.values)} outputs"
            raise CheckpointError(found, expected=f"the {len(values)} of its model card")
        if not isinstance(slab.values, np.ndarray):
            from segkit.inference import on_device

            on_device.paint(itertools.chain([slab], slabs), box, shape, activation, table, preparation)
            return
        if np.isnan(slab.logits.min()):
            raise not_a_number()
        if shape == box.shape:
            box[slab.index] = _labels(_decide(slab.logits, activation), activation, table)
        else:
            resampling = resampling or SlabResampling(shape, box.shape, slab.axis, preparation)
            _paint_resampled(slab, resampling, np.moveaxis(box, slab.axis, 0), activation, table)


def not_a_number() -> CheckpointError:
    """The error of logits that contain NaN."""
    return CheckpointError(
        "the network gave NaN",
        expected="finite logits",
        remedy="The training probably diverged: look at metrics.jsonl, and train with a smaller learning rate",
    )


def _decide(logits: Logits, activation: Activation) -> AnyArray:
    """(K, ...) to (...): position of the largest output, or one bit for each output above 0."""
    if activation == "softmax":
        largest: AnyArray = logits.argmax(0).astype(np.uint8)
        return largest
    bits = np.min_scalar_type((1 << len(logits)) - 1)
    decided = np.zeros(logits.shape[1:], bits)
    for position, plane in enumerate(logits):
        decided |= (plane > 0).astype(bits) << bits.type(position)
    return decided


def _labels(decided: AnyArray, activation: Activation, values: NDArray[np.uint8]) -> LabelMap:
    """Labels (...) uint8 of decisions (...)."""
    if activation == "softmax":
        return values[decided]
    labels = np.zeros(decided.shape, np.uint8)
    for position, value in enumerate(values):
        labels[(decided >> decided.dtype.type(position)) & decided.dtype.type(1) != 0] = value
    return labels


class SlabResampling:
    """Linear resampling of slabs as they arrive; the axis of the slabs is the first, of planes (*across)."""

    def __init__(
        self, old: tuple[int, ...], new: tuple[int, ...], axis: int, preparation: Preparation | None = None
    ) -> None:
        self.axis = axis
        self.rounds = preparation is not None and preparation.rounds_to_half
        nearest = None if preparation is None else preparation.nearest_axis
        dtype = np.float64 if self.rounds else np.float32
        near = [
            nearest_neighbours(*sizes, dtype) if other == nearest else neighbours(*sizes, dtype)
            for other, sizes in enumerate(zip(old, new, strict=True))
        ]
        self.along = near.pop(axis)
        self.across = near
        self._ready = 0
        self._kept: Logits | None = None
        self._first = 0

    def add(self, planes: Logits, stop: int) -> Logits:
        """Planes (K, *spatial) that end before `stop`, with the last of the previous ones: (K, n, *across)."""
        planes = np.moveaxis(planes, self.axis + 1, 1)
        if self._kept is not None:
            planes = np.concatenate([self._kept, planes], 1)
        self._kept = planes[:, -1:].copy()
        self._first = stop - planes.shape[1]
        return planes

    def ready(self, stop: int) -> Iterator[tuple[int, int, int, np.floating[Any]]]:
        """New planes between those added: index, positions of its two neighbours, weight of the second."""
        while self._ready < len(self.along.upper) and self.along.upper[self._ready] < stop:
            index, self._ready = self._ready, self._ready + 1
            lower, upper = int(self.along.lower[index]), int(self.along.upper[index])
            yield index, lower - self._first, upper - self._first, self.along.weight[index]


def _paint_resampled(
    slab: Slab, resampling: SlabResampling, target: LabelMap, activation: Activation, values: NDArray[np.uint8]
) -> None:
    """Paint the planes of `target` (along, *across) that are in this slab, or between it and the previous one."""
    logits, across = resampling.add(slab.logits, slab.stop), resampling.across
    decided = _decide(logits, activation)
    labels = _labels(decided, activation, values)
    if resampling.rounds and activation == "softmax":
        decided = np.where(_is_close(logits), np.arange(logits[0].size).reshape(decided.shape) + 256, decided)
    side_by_side = np.ascontiguousarray(np.moveaxis(logits, 0, -1))  # (..., K): outputs of a voxel are adjacent
    last, alike = -1, np.empty(0, np.bool_)
    for index, lower, upper, weight in resampling.ready(slab.stop):
        if lower != last:
            last, alike = lower, _alike(decided[lower], decided[upper])
        target[index] = _spread(labels[lower], across)
        places = np.nonzero(~_spread(alike, across))
        if len(places[0]):
            between = side_by_side[lower] + (side_by_side[upper] - side_by_side[lower]) * weight  # float64 if it rounds
            for start in range(0, len(places[0]), _AT_ONCE):
                some = tuple(place[start : start + _AT_ONCE] for place in places)
                found = _at(between, some, across)
                if resampling.rounds:
                    found = found.astype(np.float16)
                target[index][some] = _labels(_decide(found.T, activation), activation, values)


def _is_close(logits: Logits) -> NDArray[np.bool_]:
    """Whether the best two of the outputs (K, ...) could become equal when interpolations are rounded, (...)."""
    if len(logits) == 1:
        return np.zeros(logits.shape[1:], np.bool_)
    best, second = logits[0].copy(), np.full_like(logits[0], -np.inf)
    for plane in logits[1:]:
        np.maximum(second, np.minimum(best, plane), out=second)
        np.maximum(best, plane, out=best)
    step = _HALF_STEP * max(float(best.max()), -float(second.min()))
    close: NDArray[np.bool_] = best - second <= step
    return close


def _alike(lower: AnyArray, upper: AnyArray) -> NDArray[np.bool_]:
    """Whether both planes (*across) agree at each voxel and at its next neighbours along every axis."""
    alike: NDArray[np.bool_] = lower == upper
    for axis in range(lower.ndim):
        here, there = ((slice(None),) * axis + (part,) for part in (slice(0, -1), slice(1, None)))
        alike[here] &= alike[there].copy() & (lower[here] == lower[there])
    return alike


def _spread(plane: AnyArray, across: Sequence[Neighbours]) -> AnyArray:
    """The lower neighbour of every voxel of a resampled plane, (*across) to (*target)."""
    for axis, near in enumerate(across):
        plane = plane.take(near.lower, axis)
    return plane


def _at(plane: Logits, places: tuple[NDArray[np.intp], ...], across: Sequence[Neighbours]) -> Logits:
    """Linear interpolation of (*across, K) at N places of the resampled plane, (N, K).

    All axes but the last are resampled for whole lines, those with a place on them; the last for the places only.
    """
    line = np.zeros(1, np.intp)
    for axis, (place, near) in enumerate(zip(places[:-1], across[:-1], strict=True)):
        used = np.flatnonzero(np.bincount(place))
        row = np.zeros(len(near.lower), np.intp)
        row[used] = np.arange(len(used))
        weight = near.weight[used].reshape(-1, *(1,) * (plane.ndim - axis - 1))
        plane = _between(plane.take(near.lower[used], axis), plane.take(near.upper[used], axis), weight)
        line = line * len(used) + row[place]
    place, near = places[-1], across[-1]
    voxels = plane.reshape(-1, plane.shape[-1])
    start = line * plane.shape[-2]
    lower, upper = (voxels.take(start + side[place], 0) for side in (near.lower, near.upper))
    return _between(lower, upper, near.weight[place][:, None])


def _between(lower: Logits, upper: Logits, weight: Logits) -> Logits:
    """Linear interpolation, in place of both arrays."""
    upper -= lower
    upper *= weight
    lower += upper
    return lower


def merged(streams: Sequence[Iterator[Slab]], activation: Activation, *, of_logits: bool = False) -> Iterator[Slab]:
    """Slabs of the mean probability of several models, as logits, with the disagreement of the models.

    With `of_logits`, of their mean logits, in half precision as in nnU-Net. `spread` is twice the standard deviation of
    the members' probabilities, the largest over the outputs: 0 where all agree, 1 where one half has probability 1 and
    the other 0.
    """
    for parts in _aligned(streams):
        places = {(type(part.values), str(getattr(part.values, "device", "cpu"))) for part in parts}
        given = [part.values if len(places) == 1 else part.logits for part in parts]
        xp, count = _functions(given[0]), len(given)
        members = [probabilities(logits, activation) for logits in given]
        mean = sum(members[1:], members[0]) / count
        variance = sum((member - mean) ** 2 for member in members) / count
        spread = 2 * xp.amax(xp.sqrt(variance), 0)
        logits = _half_mean(given) if of_logits else logits_of(mean, activation)
        yield Slab(parts[0].axis, parts[0].start, parts[0].stop, logits, spread)


def _half_mean(members: Sequence[Any]) -> Any:
    """The mean of logits of half precision, each sum and the quotient rounded to it, in float32."""
    xp = _functions(members[0])
    total = xp.asarray(members[0], dtype=xp.float16)
    for member in members[1:]:
        total += member
    total /= np.float32(len(members))
    return xp.asarray(total, dtype=xp.float32)


def _aligned(streams: Sequence[Iterator[Slab]]) -> Iterator[list[Slab]]:
    """Parts of the slabs of several streams with the same bounds."""
    current: list[Slab | None] = [next(stream, None) for stream in streams]
    while all(slab is not None for slab in current):
        slabs = [slab for slab in current if slab is not None]
        start, stop = slabs[0].start, min(slab.stop for slab in slabs)
        yield [slab.part(start, stop) for slab in slabs]
        current = [
            slab.part(stop, slab.stop) if slab.stop > stop else next(stream, None)
            for slab, stream in zip(slabs, streams, strict=True)
        ]


_STEPS = 65535
_IN_MEMORY_BYTES = 1 << 28


class Maps:
    """Several maps of one case in 0..1, filled slab by slab; outside the crop each has its value of `outside`.

    With `activation`, what is added are logits, which become probabilities on the grid of the input, as in nnU-Net.
    Stored as 16-bit fixed point, exact to 1/131070, with a scale factor in NIfTI headers; in a temporary file if large.
    """

    def __init__(
        self, preparation: Preparation, outside: Sequence[float], activation: Activation | None = None
    ) -> None:
        self.preparation, self.outside, self.activation = preparation, tuple(outside), activation
        shape = (len(self.outside), *preparation.cropped_shape)
        is_large = 2 * prod(shape) > _IN_MEMORY_BYTES
        # The file has no name, so it is deleted however the process ends.
        self._file = tempfile.TemporaryFile() if is_large else None  # noqa: SIM115  lives as long as the maps
        self._boxes: NDArray[np.uint16] = (
            np.zeros(shape, np.uint16) if self._file is None else np.memmap(self._file, np.uint16, "w+", shape=shape)
        )
        self._resampling: SlabResampling | None = None

    def add(self, planes: NDArray[np.float32], slab: Slab) -> None:
        """The maps (count, *spatial) in 0..1, or the logits, of the voxels of a slab of the prepared grid."""
        shape, axis = self.preparation.resampled_shape, slab.axis
        if shape == self.preparation.cropped_shape:
            self._boxes[(slice(None), *slab.index)] = self._steps(planes)
            return
        way = None if self.activation is None else self.preparation
        self._resampling = self._resampling or SlabResampling(shape, self.preparation.cropped_shape, axis, way)
        planes = self._resampling.add(planes, slab.stop)
        target = np.moveaxis(self._boxes, axis + 1, 1)
        for index, lower, upper, weight in self._resampling.ready(slab.stop):
            found = planes[:, lower] + (planes[:, upper] - planes[:, lower]) * weight
            for across, near in enumerate(self._resampling.across, start=1):
                shares = near.weight.reshape(-1, *(1,) * (found.ndim - across - 1))
                found = _between(found.take(near.lower, across), found.take(near.upper, across), shares)
            if self._resampling.rounds:
                found = found.astype(np.float16).astype(np.float32)
            target[:, index] = self._steps(found)

    def _steps(self, planes: NDArray[np.float32]) -> NDArray[np.float32]:
        shares = planes if self.activation is None else probabilities(planes, self.activation)
        steps: NDArray[np.float32] = np.rint(shares * np.float32(_STEPS))
        return steps

    def write(self, paths: Sequence[Path]) -> None:
        """Write each map to its file on the grid of the input."""
        grid = self.preparation.source_grid
        for path, box, value in zip(paths, self._boxes, self.outside, strict=True):
            whole = np.full(self.preparation.reoriented_shape, round(value * _STEPS), np.uint16)
            whole[self.preparation.crop_slices] = box
            source = _to_source(whole, self.preparation)
            if grid.dims == 2:
                write_image(path, source.astype(np.float32) / _STEPS, grid)
            else:
                write_image(path, source, grid, slope=1 / _STEPS)

    def arrays(self) -> Iterator[NDArray[np.float32]]:
        """Each map in turn, (*source) float32."""
        for box, value in zip(self._boxes, self.outside, strict=True):
            whole = np.full(self.preparation.reoriented_shape, value, np.float32)
            whole[self.preparation.crop_slices] = box / np.float32(_STEPS)
            yield _to_source(whole, self.preparation)


def outside_probabilities(count: int, activation: Activation) -> list[float]:
    """Probability of each output outside the crop: 1 for the background of a softmax, else 0."""
    return [float(activation == "softmax" and position == 0) for position in range(count)]


def uncertainty(slab: Slab, activation: Activation) -> NDArray[np.float32]:
    """Two maps (2, *spatial) in 0..1 of a slab: entropy, and disagreement of the members of an ensemble.

    Softmax: entropy of the class probabilities, divided by its maximum ln K. Sigmoid: largest binary entropy of the
    outputs, divided by ln 2. Without an ensemble the disagreement is 0.
    """
    share = np.clip(probabilities(slab.logits, activation), 1e-7, 1 - 1e-7)
    if activation == "softmax":
        entropy = -(share * np.log(share)).sum(0) / np.log(len(share))
    else:
        entropy = (-(share * np.log(share) + (1 - share) * np.log1p(-share)) / np.log(2)).max(0)
    spread = np.zeros_like(entropy) if slab.spread is None else on_host(slab.spread)
    return np.stack([np.clip(entropy, 0, 1), spread]).astype(np.float32)
