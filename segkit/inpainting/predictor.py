"""Filling of holes by a trained network.

A hole is filled in windows. With torch, each separate hole is one window with its surroundings, if it is not too large;
a graph has windows of one size. Larger holes are filled from the border inwards; filled voxels are known to the next
window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path
from typing import Any, TypeVar

import cc3d
import numpy as np
from numpy.typing import NDArray

from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.run_folder import load_card
from segkit.errors import DataError, RequestError
from segkit.inference.backend_loading import open_backend
from segkit.inference.backends import Backend
from segkit.inpainting.inputs import needs_mirror, stack_inputs
from segkit.inpainting.midplane import find_midplane, mirror_of
from segkit.preparing.preprocessing import crop_box, deviation_of_tissue
from segkit.preparing.resampling import resample_image, resampled_shape
from segkit.reading.geometry import reorientation_to, reoriented_grid
from segkit.reading.volume import Grid
from segkit.shapes import Image, label_components, overlap

_SURROUNDINGS = 16  # fewest voxels around a hole in a window of free size
_SLICE_AXIS = 2

Hole = NDArray[np.bool_]
_Item = TypeVar("_Item", bound=np.generic)


@dataclass(frozen=True)
class InpaintingPredictor:
    """An inpainting network with its card."""

    backend: Backend
    card: ModelCard
    largest_window: int = 160**3
    """Voxels of the largest window of free size; a network of usual width needs about a gigabyte for it."""

    @classmethod
    def load(
        cls, run: Path, device: str = "auto", backend: str = "auto", threads: int | None = None
    ) -> InpaintingPredictor:
        """The network of a run folder of `segkit pretrain --method inpainting`, or of its export.

        `threads` are those of a CPU; None is one for each core.

        Raises:
            CheckpointError: the model is missing or damaged.
            RequestError: it does not fill holes, or the backend cannot compute it.
        """
        card = load_card(run)
        if card.task != "inpainting":
            found, expected = f"this is a {card.task} model", "a model of `segkit pretrain --method inpainting`"
            raise RequestError(f"{found}, which fills no holes", where=run, expected=expected)
        if card.export is None and backend == "auto":
            backend = "torch"  # for windows of any size
        return cls(open_backend(run, card, device, backend, card.patch_size, threads=threads), card)

    def with_smaller_window(self) -> InpaintingPredictor | None:
        """The same with a largest window of half the voxels, for less memory; None if all have the size of a patch."""
        if self.backend.name != "torch" or self.largest_window <= prod(self.card.patch_size):
            return None
        return replace(self, largest_window=self.largest_window // 2)

    def fill(self, image: Image, hole: Hole, grid: Grid) -> Image:
        """A copy of an image with its hole filled; all other voxels stay the same, bit for bit.

        `image` is (C, *spatial) float32, the modalities of the card in the orientation of the file, its values in the
        `hole` (*spatial) ignored.

        Raises:
            DataError: the hole covers all of a modality.
        """
        if image.shape != (len(self.card.modalities), *hole.shape) or hole.shape != grid.shape:
            shapes = f"an image of {image.shape} with a hole of {hole.shape} on a grid of {grid.shape}"
            raise DataError(shapes, expected=f"({len(self.card.modalities)}, *grid) and the grid's own shape")
        if not hole.any():
            return image.copy()
        turn = reorientation_to(grid, self.card.preprocessing.orientation)
        missing = turn.apply(hole)
        known = np.where(missing, np.float32(0), turn.apply(image))
        start, stop = crop_box(np.concatenate((known, missing[None])), "nonzero")
        box = (slice(None), *(slice(first, last) for first, last in zip(start, stop, strict=True)))
        if not known.any(tuple(range(1, known.ndim))).all():
            raise DataError("the hole covers all of the image", remedy="Check that the mask is not inverted")
        normalised: Image = np.empty((len(known), *missing[box[1:]].shape), np.float32)
        for plane, scaled in zip(known, normalised, strict=True):
            np.divide(plane[box[1:]], deviation_of_tissue(plane), out=scaled)
        found = self._fill_at_spacing(normalised, missing[box[1:]], reoriented_grid(grid, turn).spacing_mm)
        for plane, filled in zip(known, found, strict=True):
            # Filled voxels stay within the range of the known ones.
            values = np.clip(filled * deviation_of_tissue(plane), plane.min(), plane.max())
            np.copyto(plane[box[1:]], values, where=missing[box[1:]])
        return np.where(hole, turn.undo(known), image)

    def _fill_at_spacing(self, image: Image, missing: Hole, spacing_mm: Sequence[float]) -> Image:
        shape = image.shape[1:]
        target = resampled_shape(shape, spacing_mm, self.card.preprocessing.spacing_mm)
        if target == shape:
            return self._fill_prepared(image, missing, spacing_mm)
        share = resample_image(missing[None].astype(np.float32), target)[0]
        spacing_mm = [mm * old / new for mm, old, new in zip(spacing_mm, shape, target, strict=True)]
        found = self._fill_prepared(resample_image(image, target) * (share == 0), share > 0, spacing_mm)
        return resample_image(found, shape)

    def _fill_prepared(self, image: Image, missing: Hole, spacing_mm: Sequence[float]) -> Image:
        filled, left, card = image.copy(), missing.copy(), self.card
        midplane = find_midplane(image, spacing_mm) if needs_mirror(card.context, card.fill) else None
        for window in self._windows(missing):
            left_here = window.cut(left)
            decided = left_here & window.inner()
            if not decided.any():
                continue
            mirrored = None if midplane is None else mirror_of(filled, left, midplane, window.start, window.size)
            stacked = stack_inputs(window.cut(filled), left_here, card.context, mirrored, card.fill)
            is_slice = stacked.ndim - 1 > card.dims
            found = self.backend((stacked[..., 0] if is_slice else stacked)[None])[0]
            window.paste(found[..., None] if is_slice else found, filled, decided)
            window.paste(np.zeros_like(left_here), left, decided)
        return filled

    def _windows(self, missing: Hole) -> Iterator[_Window]:
        """Windows that together cover the hole; they may reach outside."""
        patch, divisor, boxes = self.card.patch_size, self.card.divisor, boxes_of(missing)
        if missing.ndim > len(patch):
            patch, divisor = ((*of_plane[:_SLICE_AXIS], 1, *of_plane[_SLICE_AXIS:]) for of_plane in (patch, divisor))
            boxes = [
                replace(box, start=(*box.start[:_SLICE_AXIS], int(place)))
                for place in np.flatnonzero(missing.any((0, 1)))
                for box in boxes_of(missing[..., place : place + 1])
            ]
        for box in boxes:
            sides = tuple(
                least if least == 1 else max(least, ceil((length + 2 * _SURROUNDINGS) / step) * step)
                for length, least, step in zip(box.size, patch, divisor, strict=True)
            )
            if prod(sides) <= self.largest_window and self.backend.name == "torch":
                starts = zip(box.start, box.size, sides, strict=True)
                yield _Window(tuple(s + (length - side) // 2 for s, length, side in starts), sides, (0,) * len(sides))
            else:
                yield from _inwards(box, patch)


@dataclass(frozen=True)
class Box:
    """First voxel and size along each axis; outside of the array it reads 0 and writes nothing."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    def cut(self, array: NDArray[_Item]) -> NDArray[_Item]:
        """(..., *size) of (..., *spatial)."""
        result: NDArray[_Item] = np.zeros((*array.shape[: array.ndim - len(self.size)], *self.size), array.dtype)
        there, here = self._overlap(array.shape)
        result[here] = array[there]
        return result

    def paste(self, values: NDArray[_Item], array: NDArray[_Item], where: NDArray[np.bool_]) -> None:
        """Write values (..., *size) into (..., *spatial) where a mask (*size) is True."""
        there, here = self._overlap(array.shape)
        np.copyto(array[there], values[here], where=where[here[1:]])

    def _overlap(self, shape: Sequence[int]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        axes = len(self.size)
        here, there = overlap(self.start, self.size, (0,) * axes, shape[len(shape) - axes :])
        return (..., *there), (..., *here)


def boxes_of(hole: NDArray[np.bool_]) -> list[Box]:
    """The bounding boxes of the separate parts of (*spatial); touching boxes are merged."""
    slices = [found for found in cc3d.statistics(label_components(hole))["bounding_boxes"][1:] if found is not None]
    open_ = [[(int(one.start), int(one.stop)) for one in found][: hole.ndim] for found in slices]
    done: list[Box] = []
    while open_:
        box = open_.pop()
        near = [other for other in open_ if _touch(box, other)]
        if near:
            open_ = [other for other in open_ if other not in near]
            together = zip(box, *near, strict=True)
            open_.append([(min(first for first, _ in axis), max(last for _, last in axis)) for axis in together])
        else:
            done.append(Box(tuple(first for first, _ in box), tuple(last - first for first, last in box)))
    return done


def _touch(first: Sequence[tuple[int, int]], second: Sequence[tuple[int, int]]) -> bool:
    return all(a[0] <= b[1] and b[0] <= a[1] for a, b in zip(first, second, strict=True))


@dataclass(frozen=True)
class _Window(Box):
    """A window, and the width of its border, voxels per axis, where its output is not kept."""

    margin: tuple[int, ...]

    def inner(self) -> Hole:
        """Where its output is kept, (*size)."""
        is_inner = np.zeros(self.size, bool)
        is_inner[tuple(slice(less, length - less) for less, length in zip(self.margin, self.size, strict=True))] = True
        return is_inner


def _inwards(box: Box, size: Sequence[int]) -> Iterator[_Window]:
    """Windows of one size over a box, those at its border first; the middle halves of several of them tile it."""
    starts, margins = [], []
    for first, extent, length in zip(box.start, box.size, size, strict=True):
        count = 1 if extent <= length - 2 * min(_SURROUNDINGS, length // 4) else ceil(2 * extent / length)
        low, high = first - length // 4, first + extent + length // 4 - length
        starts.append(np.linspace(low, high, count) if count > 1 else np.array([first + (extent - length) / 2]))
        margins.append(length // 4 if count > 1 else 0)
    grid = np.stack(np.meshgrid(*starts, indexing="ij"), -1).reshape(-1, len(size))
    order = np.argsort(-np.abs(grid - grid.mean(0)).max(1), kind="stable")
    for place in grid[order]:
        yield _Window(tuple(int(np.floor(one)) for one in place), tuple(size), tuple(margins))
