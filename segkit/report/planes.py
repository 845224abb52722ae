"""What a picture of a case shows: planes of the volume, grey levels, and the colour of each label."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segkit.labels import LabelScheme, outputs_of
from segkit.reading.geometry import reorientation_to, reoriented_grid
from segkit.reading.volume import Grid
from segkit.shapes import AnyArray, LabelMap

COLOURS = ("#56B4E9", "#D55E00", "#F0E442", "#CC79A7", "#009E73", "#E69F00", "#0072B2")
"""Okabe & Ito's palette, distinct in every common colour blindness; reordered for contrast on grey."""

MASK_OPACITY = 0.55

_BACKGROUNDS = ("t2f", "t1c", "t2w", "t1n", "green")
"""The whole tumour shows best on FLAIR, and of colour pictures the green channel has the most contrast."""


def background_of(modalities: Iterable[str]) -> str:
    """The image to draw masks over."""
    names = list(modalities)
    return next((name for name in _BACKGROUNDS if name in names), names[0])


def label_colours(scheme: LabelScheme | None) -> dict[int, tuple[str, str]]:
    """Label value -> name and colour, the same in every picture; a region has the colour of the tissue it paints.

    Without a scheme a label is named by its value.
    """
    if scheme is None:
        return {value: unnamed_label(value) for value in range(1, 256)}
    painted = [output.label for output in outputs_of(scheme) if output.label]
    names = {value: tissue for tissue, value in scheme.values.items()}
    values = list(dict.fromkeys([*painted, *names]))
    return {value: (names[value], COLOURS[position % len(COLOURS)]) for position, value in enumerate(values)}


def unnamed_label(value: int) -> tuple[str, str]:
    """Name and colour of a label value that no scheme names."""
    return f"label {value}", COLOURS[(value - 1) % len(COLOURS)]


@dataclass(frozen=True)
class View:
    """One plane ready to be shown: rows from top to bottom, columns from left to right."""

    title: str
    image: AnyArray
    masks: tuple[LabelMap, ...]
    aspect: float
    letters: tuple[str, str, str, str]
    """What lies left, right, top and bottom of the picture; empty for pictures without anatomy."""
    maps: tuple[AnyArray, ...] = ()
    """Other arrays of the same plane, such as the uncertainty."""


def views_of(image: AnyArray, masks: Sequence[LabelMap], grid: Grid, maps: Sequence[AnyArray] = ()) -> list[View]:
    """The planes in which a case is shown: axial, coronal and sagittal of a volume, or the whole of a picture.

    Each plane is the one that shows most of all structures of the masks, cropped to what the image shows, in
    radiological orientation.

    Args:
        image: (D, H, W) or (H, W) intensities on `grid`.
        masks: Label maps on the same grid.
        grid: Where the voxels lie.
        maps: Other arrays on the same grid, which have no say in which plane is shown.
    """
    if grid.dims == 2:
        rows_mm, columns_mm = grid.spacing_mm
        return [View("", image, tuple(masks), rows_mm / columns_mm, ("", "", "", ""), tuple(maps))]
    return _planes(image, masks, grid, maps)


def _planes(image: AnyArray, masks: Sequence[LabelMap], grid: Grid, maps: Sequence[AnyArray]) -> list[View]:
    way = reorientation_to(grid, "RAS")
    spacing = reoriented_grid(grid, way).spacing_mm
    upright = [way.apply(array) for array in (image, *masks, *maps)]
    box = content_box(upright[0])
    upright = [array[box] for array in upright]
    views = []
    for title, axis, letters in (
        ("axial", 2, ("R", "L", "A", "P")),
        ("coronal", 1, ("R", "L", "S", "I")),
        ("sagittal", 0, ("A", "P", "S", "I")),
    ):
        index = _richest_slice(upright[1 : 1 + len(masks)], axis) if masks else upright[0].shape[axis] // 2
        # The remaining two axes grow to the right or front, then to the front or top: the second becomes the rows,
        # top first, and the first becomes the columns, right or front first.
        shown = [array.take(index, axis).T[::-1, ::-1] for array in upright]
        columns_mm, rows_mm = (spacing[other] for other in range(3) if other != axis)
        own, others = tuple(shown[1 : 1 + len(masks)]), tuple(shown[1 + len(masks) :])
        views.append(View(title, shown[0], own, rows_mm / columns_mm, letters, others))
    return views


def content_box(image: AnyArray) -> tuple[slice, ...]:
    """The box of what differs from the corner voxel, or the whole volume where nothing does."""
    return extent(image != image.flat[0])


def extent(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    """The box of what is True, or the whole array where nothing is."""
    box = []
    for axis, length in enumerate(mask.shape):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        (hits,) = np.nonzero(mask.any(axis=others))
        box.append(slice(int(hits[0]), int(hits[-1]) + 1) if len(hits) else slice(0, length))
    return tuple(box)


def _richest_slice(masks: Sequence[LabelMap], axis: int) -> int:
    """The slice along `axis` that shows most of all structures, each measured against its own largest slice."""
    others = tuple(other for other in range(masks[0].ndim) if other != axis)
    richness = np.zeros(masks[0].shape[axis])
    for mask in masks:
        for value in present_labels(mask):
            areas = np.count_nonzero(mask == value, axis=others)
            richness += areas / areas.max()
    return int(richness.argmax()) if richness.any() else masks[0].shape[axis] // 2


def present_labels(mask: LabelMap) -> list[int]:
    """The label values that occur, without the background."""
    return [int(value) for value in np.unique(mask) if value]


def intensity_window(image: AnyArray) -> tuple[float, float]:
    """Black and white level: the 1st and 99.5th percentile of what is not background."""
    content = image[image != image.flat[0]]
    if not content.size:
        return 0.0, 1.0
    low, high = np.percentile(content, (1.0, 99.5))
    return float(low), float(max(high, low + 1e-6))
