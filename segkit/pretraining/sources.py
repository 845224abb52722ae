"""Groups of unlabelled images for pre-training.

A *source* is the prepared cases of one data folder. An *image* is a slice of a volume, a crop of a volume (networks for
volumes), or a picture. A *stack* is all images of one case and one modality that lie side by side (`stacks.py`). A
*group* is some images of one source, many of them neighbours in one subject, which look alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from segkit.errors import DataError, RequestError
from segkit.preparing.preprocessing import PreparedCase, crop_box
from segkit.pretraining.stacks import ImagesConfig, Stack, stacks_of
from segkit.pretraining.views import View, ViewsConfig, draw_view


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
        self.views = views
        self.nodes = nodes
        self.view_count = view_count
        self.seed = seed
        self.length = length
        self.stacks: list[Stack] = []
        self._pools: list[_Pool] = []
        for number, source in enumerate(self.sources):
            if len(source.patients) != len(source.cases):
                raise DataError(f"{len(source.patients)} patients for {len(source.cases)} cases", where=source.name)
            of_cases = (stacks_of(number, place, case, self.size, images) for place, case in enumerate(source.cases))
            stacks = list(itertools.chain.from_iterable(of_cases))
            self._pools.append(_Pool.of(source, stacks, len(self.stacks), images, nodes))
            self.stacks += stacks
        self.channels = _common_channels(self.sources, self.stacks)
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
        views; the numbers "stack" and "source", (N,) int64; "place" (N,) float32, mm (see `Stack`).
        """
        if not 0 <= index < self.length:
            raise IndexError(index)
        members = self.members(index)
        generator = np.random.default_rng((self.seed, 1, index))
        cases: dict[tuple[int, int], PreparedCase] = {}
        views: list[list[View]] = []
        for stack_number, image_number in members:
            stack = self.stacks[stack_number]
            key = stack.source, stack.case
            if key not in cases:
                cases[key] = self.sources[stack.source].cases[stack.case]
            image = stack.read(cases[key], image_number)
            draw = (image, stack.image_spacing_mm, self.size, self.views, generator, crop_box(image, "nonzero"))
            views.append([draw_view(*draw) for _ in range(self.view_count)])
        item = {
            "stack": torch.tensor([stack for stack, _ in members]),
            "source": torch.tensor([self.stacks[stack].source for stack, _ in members]),
            "place": torch.tensor([self.stacks[stack].place_mm(image) for stack, image in members]),
        }
        for name, of_each in zip(("first", "second"), zip(*views, strict=True), strict=False):
            item[name] = torch.stack([view.image for view in of_each])
            item[f"{name}_frame"] = torch.stack([view.frame for view in of_each])
        return item

    def members(self, index: int) -> list[tuple[int, int]]:
        """The images of group `index`: number of the stack, and of the image in it; the neighbours come first."""
        generator = np.random.default_rng((self.seed, 0, index))
        pool = self._pools[generator.choice(len(self._pools), p=self._chances)]
        anchor = int(generator.choice(pool.anchors))
        stack = self.stacks[pool.first + anchor]
        step = stack.slices_per_step(self.images.slice_step_mm)
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
            raise DataError(
                f"has {counts.sum()} images",
                where=source.name,
                expected=f"at least the {nodes} of one group",
                remedy="Add cases, leave it out, lower images.empty_below or images.crop_size, or make groups smaller",
            )
        _, patients = np.unique(np.array(source.patients), return_inverse=True)
        steps = np.array([stack.slices_per_step(images.slice_step_mm) for stack in stacks])
        lengths = (images.neighbours - 1) * steps + 1
        is_picture = np.array([len(stack.spacing_mm) == 2 for stack in stacks])
        anchors = np.flatnonzero((counts >= lengths) | is_picture)
        if not anchors.size:
            raise DataError(
                f"no case has {images.neighbours} neighbouring images; the most in one stack is {counts.max()}",
                where=source.name,
                remedy="Lower images.neighbours, images.slice_step_mm or images.empty_below, or leave it out",
            )
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


def _common_channels(sources: Sequence[Source], stacks: Sequence[Stack]) -> int:
    found: dict[int, Stack] = {}
    for stack in stacks:
        found.setdefault(stack.channels[1] - stack.channels[0], stack)
    if len(found) > 1:
        names = [f"{count} in {sources[stack.source].name}" for count, stack in sorted(found.items())]
        raise DataError(
            f"images have different numbers of channels: {', '.join(names)}",
            remedy="Set images.channels to each, which makes every channel an image of its own, or leave a source out",
        )
    if not found:
        raise RequestError("there is no source of images", remedy="Name at least one data folder")
    return next(iter(found))
