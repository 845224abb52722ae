"""Groups of unlabelled images for pre-training.

A *source* is the prepared cases of one data folder. An *image* is a slice of a volume, a crop of a volume (networks for
volumes), or a picture. A *stack* is all images of one case and one modality that lie side by side. A *group* is some
images of one source, many of them neighbours in one subject, which look alike.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch.utils.data import Dataset

from segkit.config import Config
from segkit.errors import DataError, RequestError
from segkit.preparing.plan_rules import choose_slice_axis
from segkit.preparing.preprocessing import PreparedCase, crop_box
from segkit.preparing.transforms import IMAGE, run, share_random_state
from segkit.pretraining.views import ViewsConfig, view_transforms
from segkit.shapes import AnyArray, Image


class ImagesConfig(Config):
    """Which images are taken from the cases, and which of them come together."""

    channels: Literal["auto", "each", "all"] = "auto"
    """each: every modality gives images of its own, of one channel; all: an image has all modalities as channels;
    auto: all for pictures (red, green and blue belong together), each for volumes."""
    slice_axis: int | None = Field(default=None, ge=0, le=2)
    """Axis across which volumes are cut into slices; None is the axis that training chooses for 2D networks: of the
    median case of a source the coarsest, of equal ones the shortest."""
    empty_below: float = Field(default=0.2, ge=0, lt=1)
    """Slices and crops with fewer voxels that are not 0 than this share of the fullest one of their stack are left
    out; where the normalisation leaves no voxel 0, none are."""
    slice_step_mm: float = Field(default=3.0, ge=0)
    """Least distance between neighbouring slices of a group, and of crops along each axis (our choice: slices 1 mm
    apart are nearly equal); slices are closer where a stack has not enough for that; 0 takes them as they follow."""
    neighbours: int = Field(default=8, ge=1)
    """How many images of a group are side by side in one subject: half of 16 is our choice."""
    balance: float = Field(default=0.5, ge=0, le=1)
    """Power of its number of images with which a source is drawn: 1 draws all images equally often, 0 all sources; in
    between images of small sources come more often."""
    crop_size: int | tuple[int, int, int] | None = None
    """Voxels of the crops of volumes that networks for volumes learn from; None is the size of the views."""
    crop_overlap: float = Field(default=0.25, ge=0, lt=1)
    """Largest share of its length that a crop has in common with the next one along an axis. With more, views of two
    crops overlap as much as two views of one, and which is the right one is undecided."""

    def require_room_in(self, nodes: int) -> None:
        """Raise RequestError if a group of so many images cannot hold the neighbours."""
        if self.neighbours > nodes:
            found = f"a group of {nodes} images cannot hold {self.neighbours} neighbours"
            raise RequestError(found, remedy="Lower images.neighbours, or take larger groups")


@dataclass(frozen=True)
class Stack:
    """The images of one case and one modality (or all modalities)."""

    source: int
    case: int
    channels: tuple[int, int]  # the first one and the one after the last
    axis: int | None  # the axis of the slices; None for crops and pictures
    starts: NDArray[np.int32] = field(repr=False)  # (images, axes of the case): the first voxel of each image
    extent: tuple[int, ...]  # voxels of an image along each axis of the case, 1 across slices
    spacing_mm: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def image_axes(self) -> list[int]:
        """The axes of the case that the images have."""
        return [axis for axis in range(len(self.spacing_mm)) if axis != self.axis]

    @property
    def image_spacing_mm(self) -> tuple[float, ...]:
        """Spacing of the axes that the images have."""
        return tuple(self.spacing_mm[axis] for axis in self.image_axes)

    def origin_mm(self, number: int) -> NDArray[np.float64]:
        """Position of the first voxel of an image in its case, along the axes that it has."""
        return np.asarray((self.starts[number] * self.spacing_mm)[self.image_axes], np.float64)

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

    def slices_per_step(self, images: ImagesConfig) -> int:
        """Distance in slices to the next one of a group; 1 for crops and pictures."""
        if self.axis is None or images.neighbours == 1:
            return 1
        wanted = math.ceil(images.slice_step_mm / self.spacing_mm[self.axis] - 1e-6)
        return max(1, min(wanted, (len(self) - 1) // (images.neighbours - 1)))

    def neighbours(self, count: int, step: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """Numbers of `count` images side by side: slices `step` apart, or the crops that are nearest to one of them."""
        if self.axis is not None:
            start = int(generator.integers(len(self) - step * (count - 1)))
            return np.arange(start, start + step * count, step)
        middle = self.starts[generator.integers(len(self))]
        distance = np.linalg.norm((self.starts - middle) * self.spacing_mm, axis=1)
        return np.argsort(distance, kind="stable")[:count]


def stacks_of(
    source: int, number: int, case: PreparedCase, size: tuple[int, ...], images: ImagesConfig, slice_axis: int | None
) -> Iterator[Stack]:
    """The stacks of case `number` of a source: one for each modality, or one for all; empty ones are left out.

    Volumes are cut into slices across `slice_axis`, or into crops if it is None.

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
        axis = None if is_picture else slice_axis
        if is_picture:
            extent, starts = shape, np.zeros((1, 2), np.int32)
        else:
            is_filled: NDArray[np.bool_] = (case.image[slice(*channels)] != 0).any(axis=0)
            if axis is None:
                extent, starts = _crops(is_filled, images.crop_size or size, spacing_mm, images)
            else:
                extent, starts = _slices(is_filled, axis, images.empty_below)
        if len(starts):
            yield Stack(source, number, channels, axis, starts, extent, spacing_mm)


def slice_axis_of(cases: Sequence[PreparedCase]) -> int:
    """The axis across which training slices the median of these volumes for a 2D network."""
    shapes, spacings = zip(*((case.image.shape[1:], case.preparation.spacing_mm) for case in cases), strict=True)
    shape = np.ceil(np.median(np.array(shapes), axis=0)).astype(int)
    return choose_slice_axis(tuple(shape.tolist()), tuple(np.median(np.array(spacings), axis=0).tolist()))


def _slices(is_filled: NDArray[np.bool_], axis: int, empty_below: float) -> tuple[tuple[int, ...], NDArray[np.int32]]:
    counts = np.count_nonzero(is_filled, axis=tuple(other for other in range(3) if other != axis))
    numbers = _full_enough(counts, empty_below)
    starts = np.zeros((len(numbers), 3), np.int32)
    starts[:, axis] = numbers
    return tuple(1 if at == axis else length for at, length in enumerate(is_filled.shape)), starts


def _crops(
    is_filled: NDArray[np.bool_], size: int | Sequence[int], spacing_mm: Sequence[float], images: ImagesConfig
) -> tuple[tuple[int, ...], NDArray[np.int32]]:
    """Extent of a crop, and the starts of those that are full enough; a crop takes all of an axis that is shorter.

    Along an axis there are as many as the overlap and the distance allow, evenly spread; a single one is in the middle.
    """
    wanted = [size] * 3 if isinstance(size, int) else size
    extent = tuple(min(length, voxels) for length, voxels in zip(is_filled.shape, wanted, strict=True))
    along = []
    for length, voxels, mm in zip(is_filled.shape, extent, spacing_mm, strict=True):
        least = max(
            1, math.ceil(voxels * (1 - images.crop_overlap) - 1e-6), math.ceil(images.slice_step_mm / mm - 1e-6)
        )
        room, steps = length - voxels, (length - voxels) // least
        along.append(np.array([room // 2]) if steps == 0 else np.arange(steps + 1) * room // steps)
    starts = np.stack(np.meshgrid(*along, indexing="ij"), axis=-1).reshape(-1, 3).astype(np.int32)
    # Voxels in each crop, by cumulative sums.
    sums = np.pad(is_filled, ((1, 0), (1, 0), (1, 0))).astype(np.int32)
    for axis in range(3):
        np.cumsum(sums, axis=axis, out=sums)
    counts = np.zeros(len(starts), np.int64)
    for corner in itertools.product((0, 1), repeat=3):
        places = (starts + np.array(corner) * extent).T
        counts += (-1) ** (3 - sum(corner)) * sums[tuple(places)].astype(np.int64)
    return extent, starts[_full_enough(counts, images.empty_below)]


def _full_enough(counts: AnyArray, empty_below: float) -> NDArray[np.int64]:
    return np.flatnonzero((counts > 0) & (counts >= empty_below * counts.max()))


@dataclass(frozen=True)
class Source:
    """Prepared cases of one data folder; `patients` names the patient of each, `name` is for messages."""

    name: str
    cases: Sequence[PreparedCase] = field(repr=False)
    patients: Sequence[str] = field(repr=False)


class GroupDataset(Dataset[dict[str, torch.Tensor]]):
    """Groups of `nodes` images, all of one source, each image in one or two random views.

    Item i depends on (seed, i) only, so any number of workers gives the same items.

    The first `neighbours` images of a group are neighbours in one subject. The others come from other patients of the
    source; if it has none, from other stacks of the patient (another modality or time point), else from elsewhere in
    the stack. No image comes twice. Pictures have no neighbours: instead come the pictures of the same patient (the
    other eye), as far as there are any, and all others come from other patients.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        size: Sequence[int],
        images: ImagesConfig,
        views: ViewsConfig,
        *,
        nodes: int = 16,
        view_count: int = 2,
        seed: int,
        length: int,
    ) -> None:
        """Find the images, for which every case is read once.

        `size` are the voxels of a view per axis: two axes make slices of volumes, three make crops. `nodes` are the
        images of a group, `view_count` the views of each image (1 or 2), `length` the number of groups.

        Raises:
            RequestError: a group has fewer images than neighbours.
            DataError: a source is too small for a group, or its images differ in axes or channels.
        """
        images.require_room_in(nodes)
        self.sources = tuple(sources)
        self.size = tuple(size)
        self.images = images
        self.transforms = view_transforms(views, size)
        self._random = np.random.RandomState(0)
        share_random_state(self.transforms, self._random)
        self.nodes = nodes
        self.view_count = view_count
        self.seed = seed
        self.length = length
        self.stacks: list[Stack] = []
        self._pools: list[_Pool] = []
        for number, source in enumerate(self.sources):
            if len(source.patients) != len(source.cases):
                raise DataError(f"{len(source.patients)} patients for {len(source.cases)} cases", where=source.name)
            axis = None
            if len(self.size) == 2:
                axis = slice_axis_of(source.cases) if images.slice_axis is None else images.slice_axis
            of_cases = (
                stacks_of(number, place, case, self.size, images, axis) for place, case in enumerate(source.cases)
            )
            stacks = list(itertools.chain.from_iterable(of_cases))
            self._pools.append(_Pool.of(source, stacks, len(self.stacks), images, nodes))
            self.stacks += stacks
        _refuse_different_channels(self.sources, self.stacks)
        weights = np.array([pool.counts.sum() for pool in self._pools], np.float64) ** images.balance
        self._chances = weights / weights.sum()

    @property
    def image_counts(self) -> dict[str, int]:
        """How many images each source has."""
        return {source.name: int(pool.counts.sum()) for source, pool in zip(self.sources, self._pools, strict=True)}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Group `index` of N images.

        "first" (N, C, *size) and "first_frame" (N, dims, dims + 1), float32, the same as "second" where there are two
        views; the numbers "stack" and "source", (N,) int64; "place" (N,) and "origin" (N, dims) float32, mm (`Stack`).
        """
        if not 0 <= index < self.length:
            raise IndexError(index)
        members = self.members(index)
        self._random.seed(np.random.SeedSequence((self.seed, 1, index)).generate_state(4))
        cases: dict[tuple[int, int], PreparedCase] = {}
        views: list[list[dict[str, torch.Tensor]]] = []
        for stack_number, image_number in members:
            stack = self.stacks[stack_number]
            key = stack.source, stack.case
            if key not in cases:
                cases[key] = self.sources[stack.source].cases[stack.case]
            image = stack.read(cases[key], image_number)
            shown = {IMAGE: image, "spacing_mm": stack.image_spacing_mm, "content": crop_box(image, "nonzero")}
            views.append([run(self.transforms, shown) for _ in range(self.view_count)])
        item = {
            "stack": torch.tensor([stack for stack, _ in members]),
            "source": torch.tensor([self.stacks[stack].source for stack, _ in members]),
            "place": torch.tensor([self.stacks[stack].place_mm(image) for stack, image in members]),
            "origin": torch.tensor(np.array([self.stacks[stack].origin_mm(image) for stack, image in members])).float(),
        }
        for name, of_each in zip(("first", "second"), zip(*views, strict=True), strict=False):
            item[name] = torch.stack([view[IMAGE] for view in of_each])
            item[f"{name}_frame"] = torch.stack([view["frame"] for view in of_each])
        return item

    def members(self, index: int) -> list[tuple[int, int]]:
        """The images of group `index`: number of the stack, and of the image in it; the neighbours come first."""
        generator = np.random.default_rng((self.seed, 0, index))
        pool = self._pools[generator.choice(len(self._pools), p=self._chances)]
        anchor = int(generator.choice(pool.anchors))
        stack = self.stacks[pool.first + anchor]
        step = stack.slices_per_step(self.images)
        run = stack.neighbours(self.images.neighbours, step, generator)
        chosen = [(anchor, int(image)) for image in run]
        is_same_patient = pool.patients == pool.patients[anchor]
        is_other_stack = np.arange(len(pool.counts)) != anchor
        if len(stack.spacing_mm) == 2:  # pictures
            pictures = pool.draw(is_same_patient & is_other_stack, self.images.neighbours - 1, generator)
            chosen += pictures
            is_other_stack[[picture for picture, _ in pictures]] = False
        for is_allowed in (~is_same_patient, is_same_patient & is_other_stack):
            chosen += pool.draw(is_allowed, self.nodes - len(chosen), generator)
        # What is still missing comes from the stack itself: first from where slices keep their distance.
        left = np.setdiff1d(np.arange(len(stack)), run)
        keeps_distance = (left - run[0]) % step == 0
        for numbers in (left[keeps_distance], left[~keeps_distance]):
            count = min(self.nodes - len(chosen), len(numbers))
            chosen += [(anchor, int(image)) for image in generator.choice(numbers, count, replace=False)]
        return [(pool.first + stack_number, image) for stack_number, image in chosen]


@dataclass(frozen=True)
class _Pool:
    """The stacks of one source: number of the first, then per stack its patient and its images; those to start from."""

    first: int
    patients: NDArray[np.int64]
    counts: NDArray[np.int64]
    anchors: NDArray[np.int64]

    @classmethod
    def of(cls, source: Source, stacks: Sequence[Stack], first: int, images: ImagesConfig, nodes: int) -> _Pool:
        counts = np.array([len(stack) for stack in stacks], np.int64)
        if counts.sum() < nodes:
            found, expected = f"has {counts.sum()} images", f"at least the {nodes} of one group"
            remedy = "Add cases, leave it out, lower images.empty_below or images.crop_size, or make groups smaller"
            raise DataError(found, where=source.name, expected=expected, remedy=remedy)
        _, patients = np.unique(np.array(source.patients), return_inverse=True)
        steps = np.array([stack.slices_per_step(images) for stack in stacks])
        lengths = (images.neighbours - 1) * steps + 1
        is_picture = np.array([len(stack.spacing_mm) == 2 for stack in stacks])
        anchors = np.flatnonzero((counts >= lengths) | is_picture)
        if not anchors.size:
            found = f"no case has {images.neighbours} neighbouring images; the most in one stack is {counts.max()}"
            remedy = "Lower images.neighbours or images.empty_below, or leave it out"
            raise DataError(found, where=source.name, remedy=remedy)
        return cls(first, patients[[stack.case for stack in stacks]], counts, anchors)

    def draw(self, is_allowed: NDArray[np.bool_], count: int, generator: np.random.Generator) -> list[tuple[int, int]]:
        """Up to `count` different images of the allowed stacks: number of the stack, and of the image in it."""
        stacks = np.flatnonzero(is_allowed)
        ends = np.cumsum(self.counts[stacks])
        if not len(stacks):
            return []
        total = int(ends[-1])
        drawn: NDArray[np.int64] = generator.choice(total, min(count, total), replace=False)
        which = np.searchsorted(ends, drawn, side="right")
        return [
            (int(stacks[place]), int(number - ends[place] + self.counts[stacks[place]]))
            for number, place in zip(drawn, which, strict=True)
        ]


def _refuse_different_channels(sources: Sequence[Source], stacks: Sequence[Stack]) -> None:
    found = {stack.channels[1] - stack.channels[0]: stack for stack in reversed(stacks)}
    if len(found) > 1:
        names = [f"{count} in {sources[stack.source].name}" for count, stack in sorted(found.items())]
        remedy = "Set images.channels to each, which makes every channel an image of its own, or leave a source out"
        raise DataError(f"images have different numbers of channels: {', '.join(names)}", remedy=remedy)
