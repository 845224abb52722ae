"""Maps of numbers from 0 to 1 on the grid of the input: probabilities and uncertainty.

They are resampled slab by slab like masks, and kept as 16-bit fixed point: half the size of float32, exact to 1/131070,
and read by every NIfTI program through the scale factor of the header. What a case has of them may be larger than
memory, so they are put together in a file of their own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segkit.data.files import write_image
from segkit.data.preprocessing import Preparation
from segkit.data.resampling import resample_plane
from segkit.data.volume import Grid
from segkit.inference.decode import Activation, SlabResampling, probabilities, to_source
from segkit.inference.windows import Slab

_STEPS = 65535
_IN_MEMORY_BYTES = 1 << 28


class Maps:
    """Several maps of one case, filled slab by slab."""

    def __init__(self, preparation: Preparation, count: int) -> None:
        self.preparation = preparation
        shape = (count, *preparation.cropped_shape)
        # Without a name, the file is gone with the process however that ends.
        is_large = 2 * prod(shape) > _IN_MEMORY_BYTES
        self._file = tempfile.TemporaryFile() if is_large else None  # noqa: SIM115  lives as long as the maps
        self._boxes: NDArray[np.uint16] = (
            np.zeros(shape, np.uint16) if self._file is None else np.memmap(self._file, np.uint16, "w+", shape=shape)
        )
        self._resampling: SlabResampling | None = None

    def add(self, planes: NDArray[np.float32], slab: Slab) -> None:
        """The maps (count, *spatial) in 0..1 of the voxels of a slab of the prepared grid."""
        shape, axis = self.preparation.resampled_shape, slab.axis
        if shape == self.preparation.cropped_shape:
            self._boxes[(slice(None), *(slice(None),) * axis, slice(slab.start, slab.stop))] = _fixed(planes)
            return
        if self._resampling is None:
            self._resampling = SlabResampling(shape, self.preparation.cropped_shape, axis)
        planes = self._resampling.add(planes, slab.stop)
        target = np.moveaxis(self._boxes, axis + 1, 1)
        for index, lower, upper, weight in self._resampling.ready(slab.stop):
            for box, plane in zip(target, planes, strict=True):
                between = plane[lower] + (plane[upper] - plane[lower]) * weight
                box[index] = _fixed(resample_plane(between, box.shape[1:]))

    def write(self, paths: Sequence[Path], grid: Grid, outside: Sequence[float]) -> None:
        """Write each map to its file on the input's grid; outside the crop it has its value of `outside`."""
        for path, box, value in zip(paths, self._boxes, outside, strict=True):
            whole = np.full(self.preparation.reoriented_shape, round(value * _STEPS), np.uint16)
            whole[self.preparation.crop_slices] = box
            source = to_source(whole, self.preparation)
            if grid.dims == 2:
                write_image(path, source.astype(np.float32) / _STEPS, grid)
            else:
                write_image(path, source, grid, slope=1 / _STEPS)

    def arrays(self, outside: Sequence[float]) -> Iterator[NDArray[np.float32]]:
        """Each map in turn, (*source) float32."""
        for box, value in zip(self._boxes, outside, strict=True):
            whole = np.full(self.preparation.reoriented_shape, value, np.float32)
            whole[self.preparation.crop_slices] = box / np.float32(_STEPS)
            yield to_source(whole, self.preparation)


def outside_probabilities(count: int, activation: Activation) -> list[float]:
    """Probability of each output where the network did not look: 0 but for the background of a softmax, which is 1."""
    return [float(activation == "softmax" and position == 0) for position in range(count)]


def uncertainty(slab: Slab, activation: Activation) -> NDArray[np.float32]:
    """Two maps (2, *spatial) in 0..1 of a slab: entropy, and disagreement of the members of an ensemble.

    Entropy is that of the class probabilities by its largest value, ln K, for softmax; for sigmoid the largest over
    the outputs of their binary entropy by ln 2. Without an ensemble the disagreement is 0.
    """
    share = np.clip(probabilities(slab.logits, activation), 1e-7, 1 - 1e-7)
    if activation == "softmax":
        entropy = -(share * np.log(share)).sum(0) / np.log(len(share))
    else:
        entropy = (-(share * np.log(share) + (1 - share) * np.log1p(-share)) / np.log(2)).max(0)
    spread = np.zeros_like(entropy) if slab.spread is None else slab.spread
    return np.stack([np.clip(entropy, 0, 1), spread]).astype(np.float32)


def _fixed(planes: NDArray[np.float32]) -> NDArray[np.uint16]:
    fixed: NDArray[np.uint16] = np.rint(planes * np.float32(_STEPS)).astype(np.uint16)
    return fixed
