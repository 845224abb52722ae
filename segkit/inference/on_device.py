"""Blending and decoding on a GPU: the rows of `sliding_window` and the painting of `decode`, written on tensors.

The host starts the work of a whole case and waits once, for the label map, one byte per voxel. Logits are copied to the
host only if someone reads `Slab.logits`. Where the logits of a row have no room on the GPU, the same code adds them up
on the CPU.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segkit.errors import free_memory_of, is_memory_error
from segkit.inference.backends import TorchBackend
from segkit.inference.decode import Activation, SlabResampling, not_a_number
from segkit.inference.sliding_window import Rows, Slab, WindowPlan, mirrored
from segkit.preparing.preprocessing import Preparation
from segkit.process_memory import available_memory_gb
from segkit.shapes import Image, LabelMap

_GIB = 1024**3
_VOXELS_AT_ONCE = 128**3
"""Voxels of the windows of a batch, at least one window: fewer leave a GPU idle."""
_PART_VALUES = 2**25
"""Logits that are resampled at a time."""
_BYTES_OF_PARTS = 6 * 4 * _PART_VALUES
"""Of a slab, and of what its resampling holds at the same time."""

_log = logging.getLogger(__name__)


class DeviceRows(Rows):
    """Rows of windows whose image, network and sums are on the device of a torch backend."""

    def __init__(self, backend: TorchBackend, plan: WindowPlan, mirror_axes: Sequence[int]) -> None:
        super().__init__(backend, plan, ())
        self.device = backend.device
        self.logits_of: Any = mirrored(backend.compute, mirror_axes, torch.flip)
        self.at_once = max(1, _VOXELS_AT_ONCE // prod(plan.window))

    def compute(self, image: Image, places: Sequence[tuple[int, ...]]) -> None:
        """Add the logits of the windows of a padded image (C, *padded) that start at these places, in batches."""
        torch.backends.cudnn.benchmark = True  # windows have one size, for which cuDNN times its kernels once
        axis = self.plan.axis
        start = places[0][axis]
        row = image[(slice(None), *(slice(None),) * axis, slice(start, start + self.plan.window[axis]))]
        there = torch.from_numpy(np.array(row)).to(self.device)
        if self.sums is None and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # that of a window is read in `_allocate`
        while places:
            some = places[: self.at_once]
            try:
                batch = self.logits_of(torch.stack([there[(slice(None), *self.box(place))] for place in some]))
            except Exception as error:
                if len(some) == 1 or not is_memory_error(error):
                    raise
                free_memory_of(error)
                self.at_once = 1
                continue
            for place, logits in zip(some, batch, strict=True):
                self.add(place, logits)
            places = places[len(some) :]

    def add(self, place: Sequence[int], logits: Tensor) -> None:
        """Add the logits (K, *window) of the window that starts at `place`."""
        if self.sums is None:
            self._allocate(logits)
        box = self.box(place)
        self.sums[(slice(None), *box)] += logits.to(self.sums.device) * self.weight
        self.weights[box] += self.weight

    def _allocate(self, logits: Tensor) -> None:
        """Sums on the device of the logits if they have room beside a window and parts of slabs, else on the CPU."""
        self.weight, self.weights = torch.from_numpy(self.weight), torch.from_numpy(self.weights)
        shape, device = (len(logits), *self.shape), logits.device
        needed = prod(shape) * self.weight.element_size() + _BYTES_OF_PARTS
        if device.type == "cuda":
            needed += torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        if needed / _GIB > (free_gb := available_memory_gb(device)):
            sentence = "logits of %.1f GB have no room in %.1f GB that are free on %s: the CPU adds them up"
            _log.info(sentence, needed / _GIB, free_gb, device)
            device = torch.device("cpu")
        self.weight, self.weights = self.weight.to(device), self.weights.to(device)
        self.sums = torch.zeros(shape, dtype=self.weight.dtype, device=device)

    def in_float32(self, logits: Tensor) -> Tensor:
        """The logits themselves, or a copy of those of half precision."""
        return logits.float()


def paint(
    slabs: Iterable[Slab],
    box: LabelMap,
    shape: tuple[int, ...],
    activation: Activation,
    values: NDArray[np.uint8],
    preparation: Preparation | None,
) -> None:
    """Paint slabs of tensors, of a prepared grid of that shape, into `box` (*cropped), as `decode` does.

    Raises:
        CheckpointError: the logits contain NaN.
    """
    labels, is_nan = painted(slabs, box.shape, shape, activation, values, preparation)
    box[...] = labels.cpu().numpy()
    if is_nan:
        raise not_a_number()


def painted(
    slabs: Iterable[Slab],
    cropped: tuple[int, ...],
    shape: tuple[int, ...],
    activation: Activation,
    values: NDArray[np.uint8],
    preparation: Preparation | None,
) -> tuple[Tensor, Tensor]:
    """Labels (*cropped) uint8 of at least one slab, and whether a logit is NaN, both still on the device."""
    resampling: _Resampling | None = None
    labels = table = is_nan = torch.empty(0)
    for slab in slabs:
        logits: Tensor = slab.values
        if not labels.numel():
            labels = torch.zeros(cropped, dtype=torch.uint8, device=logits.device)
            table = torch.from_numpy(values).to(logits.device)
            is_nan = torch.zeros((), dtype=torch.bool, device=logits.device)
        is_nan |= logits.amin().isnan()
        if shape == cropped:
            labels[slab.index] = _labels(logits, activation, table)
            continue
        resampling = resampling or _Resampling(shape, cropped, slab.axis, preparation)
        for first, planes in resampling.resampled(slab):
            labels.movedim(slab.axis, 0)[first : first + planes.shape[1]] = _labels(planes, activation, table)
    return labels, is_nan


def _labels(logits: Tensor, activation: Activation, values: Tensor) -> Tensor:
    """Labels (*spatial) uint8 of logits (K, *spatial)."""
    if activation == "softmax":
        return values[logits.argmax(0)]
    labels = torch.zeros_like(logits[0], dtype=torch.uint8)
    for plane, value in zip(logits, values, strict=True):
        labels = torch.where(plane > 0, value, labels)
    return labels


class _Resampling(SlabResampling):
    """Linear resampling of slabs of tensors as they arrive, of every voxel."""

    def resampled(self, slab: Slab) -> Iterator[tuple[int, Tensor]]:
        """New planes (K, n, *across) of the target, with the index of the first."""
        logits: Tensor = slab.values.movedim(self.axis + 1, 1)
        if self._kept is not None:
            logits = torch.cat([self._kept, logits], 1)
        self._kept: Any = logits[:, -1:].clone()
        self._first = slab.stop - logits.shape[1]
        ready = [index for index, *_ in self.ready(slab.stop)]
        values = len(logits) * prod(len(near.lower) for near in self.across)
        at_once = max(1, _PART_VALUES // values)
        for start in range(0, len(ready), at_once):
            some = ready[start : start + at_once]
            planes = logits
            for axis, near in enumerate((self.along, *self.across), 1):
                used = some if axis == 1 else slice(None)
                first = self._first if axis == 1 else 0
                lower, upper, weight = (
                    torch.from_numpy(one).to(logits.device)
                    for one in (near.lower[used] - first, near.upper[used] - first, near.weight[used])
                )
                low, high = planes.index_select(axis, lower), planes.index_select(axis, upper)
                planes = low + (high - low) * weight.view(-1, *(1,) * (planes.dim() - axis - 1))
            yield some[0], planes.half() if self.rounds else planes
