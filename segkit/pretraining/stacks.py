"""Stacks: the images of one case side by side, and their positions in the case."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from segkit.config import Config
from segkit.errors import DataError, RequestError
from segkit.preparing.preprocessing import PreparedCase
from segkit.shapes import AnyArray, Image

_EQUAL = 0.99
"""Spacings are equal within this factor: headers round."""


class ImagesConfig(Config):
    """Which images are taken from the cases, and which of them come together."""

    channels: Literal["auto", "each", "all"] = "auto"
    """each: every modality gives images of its own, of one channel; all: an image has all modalities as channels;
    auto: all for pictures (red, green and blue belong together), each for volumes."""
    slice_axis: int | None = Field(default=None, ge=0, le=2)
    """Axis across which volumes are cut into slices; None is the axis with the largest spacing of each case, and the
    last (axial) of equal ones."""
    empty_below: float = Field(default=0.2, ge=0, lt=1)
    """Slices and crops with fewer voxels that are not 0 than this share of the fullest one of their stack are left
    out; where the normalisation leaves no voxel 0, none are."""
    slice_step_mm: float = Field(default=0.0, ge=0)
    """Least distance between neighbouring slices of a group; 0 takes slices as they follow each other."""
    neighbours: int = Field(default=8, ge=1)
    """How many images of a group are side by side in one subject."""
    balance: float = Field(default=0.5, ge=0, le=1)
    """Power of its number of images with which a source is drawn: 1 draws all images equally often, 0 all sources; in
    between images of small sources come more often."""
    crop_size: int | tuple[int, int, int] | None = None
    """Voxels of the crops of volumes that networks for volumes learn from; None is the size of the views."""
    crop_overlap: float = Field(default=0.75, ge=0, lt=1)
    """Share of its length that a crop has in common with the next one along an axis."""

    def require_room_in(self, nodes: int) -> None:
        """Raise RequestError if a group of so many images cannot hold the neighbours."""
        if self.neighbours > nodes:
            raise RequestError(
                f"a group of {nodes} images cannot hold {self.neighbours} neighbours",
                remedy="Lower images.neighbours, or take larger groups",
            )


@dataclass(frozen=True)
class Stack:
    """The images of one case and one modality (or all modalities)."""

    source: int
    case: int
    channels: tuple[int, int]
    """The first one and the one after the last."""
    axis: int | None
    """The axis of the slices; None for crops and pictures."""
    starts: NDArray[np.int32] = field(repr=False)
    """(images, axes of the case): the first voxel of each image."""
    extent: tuple[int, ...]
    """Voxels of an image along each axis of the case, 1 across slices."""
    spacing_mm: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def image_spacing_mm(self) -> tuple[float, ...]:
        """Spacing of the axes that the images have."""
        return tuple(mm for axis, mm in enumerate(self.spacing_mm) if axis != self.axis)

    def read(self, case: PreparedCase, number: int) -> Image:
        """A copy of image `number`, (C, *spatial)."""
        ends = self.starts[number] + self.extent
        region = tuple(slice(first, last) for first, last in zip(self.starts[number], ends, strict=True))
        image = np.array(case.image[(slice(*self.channels), *region)], np.float32, order="C")
        return image if self.axis is None else image.squeeze(self.axis + 1)

    def place_mm(self, number: int) -> float:
        """Position along the axis of the slices; of crops that of the middle along axis 0; of pictures 0."""
        if len(self.spacing_mm) == 2:
            return 0.0
        axis = self.axis or 0
        return float((self.starts[number][axis] + (self.extent[axis] - 1) / 2) * self.spacing_mm[axis])

    def slices_per_step(self, step_mm: float) -> int:
        """Distance in slices to the next one of a group; 1 for crops and pictures."""
        return 1 if self.axis is None else max(1, math.ceil(step_mm / self.spacing_mm[self.axis] - 1e-6))

    def neighbours(self, count: int, step: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """Numbers of `count` images side by side: slices `step` apart, or the crops that are nearest to one of them."""
        if self.axis is not None:
            start = int(generator.integers(len(self) - step * (count - 1)))
            return np.arange(start, start + step * count, step)
        middle = self.starts[generator.integers(len(self))]
        distance = np.linalg.norm((self.starts - middle) * self.spacing_mm, axis=1)
        return np.argsort(distance, kind="stable")[:count]


def stacks_of(
    source: int, number: int, case: PreparedCase, size: tuple[int, ...], images: ImagesConfig
) -> Iterator[Stack]:
    """The stacks of case `number` of a source: one for each modality, or one for all; empty ones are left out.

    Raises:
        DataError: the case is a picture, and views have three axes.
    """
    shape, spacing_mm = case.image.shape[1:], case.preparation.spacing_mm
    if len(shape) < len(size):
        remedy = "Choose a network for images, which learns from both"
        raise DataError("is a picture", where=case.id, expected="a volume", remedy=remedy)
    is_picture = len(shape) == 2
    is_joint = images.channels == "all" or (images.channels == "auto" and is_picture)
    count = len(case.image)
    for channels in [(0, count)] if is_joint else [(channel, channel + 1) for channel in range(count)]:
        axis = None
        if is_picture:
            extent, starts = shape, np.zeros((1, 2), np.int32)
        else:
            is_filled: NDArray[np.bool_] = (case.image[slice(*channels)] != 0).any(axis=0)
            if len(size) == 2:
                axis = coarsest_axis(spacing_mm) if images.slice_axis is None else images.slice_axis
                extent, starts = _slices(is_filled, axis, images.empty_below)
            else:
                extent, starts = _crops(is_filled, images.crop_size or size, images.crop_overlap, images.empty_below)
        if len(starts):
            yield Stack(source, number, channels, axis, starts, extent, spacing_mm)


def coarsest_axis(spacing_mm: Sequence[float]) -> int:
    """The axis with the largest spacing, the last of equal ones."""
    return max(axis for axis, mm in enumerate(spacing_mm) if mm >= _EQUAL * max(spacing_mm))


def _slices(is_filled: NDArray[np.bool_], axis: int, empty_below: float) -> tuple[tuple[int, ...], NDArray[np.int32]]:
    """Extent of a slice, and the starts of those that are full enough."""
    counts = np.count_nonzero(is_filled, axis=tuple(other for other in range(3) if other != axis))
    numbers = _full_enough(counts, empty_below)
    starts = np.zeros((len(numbers), 3), np.int32)
    starts[:, axis] = numbers
    return tuple(1 if at == axis else length for at, length in enumerate(is_filled.shape)), starts


def _crops(
    is_filled: NDArray[np.bool_], size: int | Sequence[int], overlap: float, empty_below: float
) -> tuple[tuple[int, ...], NDArray[np.int32]]:
    """Extent of a crop, and the starts of those that are full enough; a crop takes all of an axis that is shorter."""
    wanted = [size] * 3 if isinstance(size, int) else size
    extent = tuple(min(length, voxels) for length, voxels in zip(is_filled.shape, wanted, strict=True))
    along = []
    for length, voxels in zip(is_filled.shape, extent, strict=True):
        steps = math.ceil((length - voxels) / max(1, round(voxels * (1 - overlap))))
        along.append(np.unique(np.linspace(0, length - voxels, steps + 1).round().astype(np.int32)))
    starts = np.stack(np.meshgrid(*along, indexing="ij"), axis=-1).reshape(-1, 3)
    # Voxels in each crop, by cumulative sums.
    sums = np.pad(is_filled, ((1, 0), (1, 0), (1, 0))).astype(np.int32)
    for axis in range(3):
        np.cumsum(sums, axis=axis, out=sums)
    counts = np.zeros(len(starts), np.int64)
    for corner in itertools.product((0, 1), repeat=3):
        places = (starts + np.array(corner) * extent).T
        counts += (-1) ** (3 - sum(corner)) * sums[tuple(places)].astype(np.int64)
    return extent, starts[_full_enough(counts, empty_below)]


def _full_enough(counts: AnyArray, empty_below: float) -> NDArray[np.int64]:
    return np.flatnonzero((counts > 0) & (counts >= empty_below * counts.max()))
