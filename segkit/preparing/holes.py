"""Holes: where an image is to be made up, drawn at random away from what must not be learnt.

A *hole* is a boolean array (*spatial), True where voxels are missing. `HoleMaker` draws one for a patch or a volume, of
one of the kinds of `hole_shapes`; `holes_tumour` follows the procedure of the BraTS local-synthesis challenge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy import ndimage

from segkit.config import Config
from segkit.preparing.hole_shapes import (
    blob_hole,
    box_hole,
    cropped,
    diameter_of,
    largest_component,
    stroke_hole,
    turned,
    without_cavities,
)
from segkit.shapes import AnyArray, Mask

LEAST_IN_BRAIN = 0.75
"""Share of a hole that must lie in the brain (BraTS local synthesis)."""

_SHAPES = 10
_PLACES_PER_SHAPE = 5
_SHRINKAGE = 0.82
"""How many shapes are tried, at how many places each, and how much smaller each further one is."""
_ROOM = {"boxes": 1.5, "strokes": 2.0, "blobs": 1.9}
"""Side of the array in which a shape is drawn, in diameters: strokes sprawl."""

_MAKERS: Mapping[str, Callable[[Sequence[int], np.random.Generator, float], Mask]] = {
    "boxes": box_hole,
    "strokes": stroke_hole,
    "blobs": blob_hole,
}
_KINDS = (*_MAKERS, "tumours")


class HolesConfig(Config):
    """How often holes are of which kind, how large they are, and how far from lesions they stay."""

    boxes: float = Field(default=0.1, ge=0)
    """Relative frequency of boxes."""
    strokes: float = Field(default=0.1, ge=0)
    """Relative frequency of irregular strokes."""
    blobs: float = Field(default=0.5, ge=0)
    """Relative frequency of blobs that look like tumours."""
    tumours: float = Field(default=0.3, ge=0)
    """Relative frequency of the shapes of real tumours, flipped and turned; without any the others take their part."""
    diameter_range: tuple[float, float] = (11.5, 49.0)
    """Smallest and largest size in voxels: the diameter of the ball, or disc, of as many voxels. The default is 800 to
    62,000 voxels in a volume. Real tumours keep their size."""
    largest_share: float = Field(default=0.35, gt=0, le=0.9)
    """Largest hole as a share of the voxels of the patch; larger ones are drawn, or made, smaller."""
    count_range: tuple[int, int] = (1, 1)
    """Fewest and most holes of a patch; several of them may touch each other."""
    margin_voxels: int = Field(default=5, ge=0)
    """Distance from lesions within which nothing is made up, in voxels."""
    min_voxels: int = Field(default=64, ge=1)
    """Fewest voxels of brain in a hole, as far as there are so many."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not any(getattr(self, kind) for kind in _KINDS):
            raise ValueError("boxes, strokes, blobs and tumours are all 0; one of them must be above")
        if not 1 <= self.diameter_range[0] <= self.diameter_range[1]:
            raise ValueError(f"diameter_range is {self.diameter_range}; expected two diameters from 1 up, in order")
        if not 1 <= self.count_range[0] <= self.count_range[1]:
            raise ValueError(f"count_range is {self.count_range}; expected two whole numbers from 1 up, in order")
        return self


class HoleMaker:
    """Draws holes; what it draws depends on its arguments and on the generator only.

    `shapes` are masks of tumours, (*spatial) each, of as many axes as the images; empty ones are left out.
    """

    def __init__(self, config: HolesConfig, shapes: Sequence[Mask] = ()) -> None:
        self.config = config
        self.shapes = tuple(cropped(shape) for shape in shapes if shape.any())
        kinds = _KINDS if self.shapes else tuple(_MAKERS)
        chances = np.array([getattr(config, kind) for kind in kinds], np.float64)
        if not chances.any():  # nothing but tumours was asked for, and there are none
            kinds, chances = ("blobs",), np.ones(1)
        self._kinds = kinds
        self._chances = chances / chances.sum()

    def draw(self, brain: Mask, allowed: Mask, generator: np.random.Generator) -> Mask:
        """The hole of a patch or a volume: one, or `count_range` of them together.

        Args:
            brain: (*spatial), where the image shows tissue.
            allowed: (*spatial), where the truth is known and may be learnt: brain and background, but neither lesions
                nor `margin_voxels` around them (see `grow`).
            generator: decides everything.

        Returns:
            (*spatial), True only where `allowed`. At least three quarters of the shape lie in the brain, and
            `min_voxels` of what is left of it, after a number of attempts with ever smaller shapes; then it is a small
            box about an allowed voxel. Empty only where nothing is allowed.
        """
        fewest, most = self.config.count_range
        hole = self._one(brain, allowed, generator)
        for _ in range(int(generator.integers(fewest, most + 1)) - 1 if most > 1 else 0):
            hole |= self._one(brain, allowed & ~hole, generator)
        return hole

    def _one(self, brain: Mask, allowed: Mask, generator: np.random.Generator) -> Mask:
        candidates = np.flatnonzero(brain & allowed)
        if not candidates.size:
            return self._small_box(allowed, np.flatnonzero(allowed), generator)
        kind = self._kinds[int(generator.choice(len(self._kinds), p=self._chances))]
        limit = diameter_of(self.config.largest_share * brain.size, brain.ndim)
        low, high = (min(limit, diameter) for diameter in self.config.diameter_range)
        diameter = generator.uniform(low, high)
        source = self.shapes[generator.integers(len(self.shapes))] if kind == "tumours" else None
        for attempt in range(_SHAPES):
            smaller = _SHRINKAGE**attempt
            if source is None:
                shape = _made(kind, smaller * diameter, brain.shape, generator)
            else:
                shape = turned(source, generator, smaller * min(1.0, limit / diameter_of(source.sum(), source.ndim)))
            for _ in range(_PLACES_PER_SHAPE):
                hole = self._placed(shape, candidates, brain, allowed, generator)
                if hole is not None:
                    return hole
        return self._small_box(allowed, candidates, generator)

    def _placed(
        self, shape: Mask, candidates: NDArray[np.intp], brain: Mask, allowed: Mask, generator: np.random.Generator
    ) -> Mask | None:
        """The shape about one of the candidates (flat indices), moved inside where it fits; None if it must not be."""
        centre = np.unravel_index(candidates[generator.integers(candidates.size)], brain.shape)
        where, part = [], []
        for middle, extent, size in zip(centre, shape.shape, brain.shape, strict=True):
            used = min(extent, size)
            first = min(max(int(middle) - used // 2, 0), size - used)
            where.append(slice(first, first + used))
            part.append(slice((extent - used) // 2, (extent - used) // 2 + used))
        box = tuple(where)
        in_brain = shape[tuple(part)] & brain[box]
        if np.count_nonzero(in_brain) < LEAST_IN_BRAIN * np.count_nonzero(shape):
            return None
        if np.count_nonzero(in_brain & allowed[box]) < self.config.min_voxels:
            return None
        hole = np.zeros(brain.shape, np.bool_)
        hole[box] = shape[tuple(part)] & allowed[box]
        return hole

    def _small_box(self, allowed: Mask, candidates: NDArray[np.intp], generator: np.random.Generator) -> Mask:
        """The allowed part of a box of at least `min_voxels` about one of the candidates, flat indices; or nothing."""
        hole = np.zeros(allowed.shape, np.bool_)
        if candidates.size:
            side = int(np.ceil(self.config.min_voxels ** (1 / allowed.ndim)))
            centre = np.unravel_index(candidates[generator.integers(candidates.size)], allowed.shape)
            box = tuple(slice(max(0, int(place) - side // 2), int(place) - side // 2 + side) for place in centre)
            hole[box] = allowed[box]
        return hole


def grow(mask: Mask, distance: float, spacing_mm: Sequence[float] | None = None) -> Mask:
    """A mask (*spatial) with everything within a distance of it, between voxel centres.

    The distance is in voxels or, where `spacing_mm` tells their sides, in mm.
    """
    if distance <= 0 or not mask.any():
        return mask.copy()
    (box,) = ndimage.find_objects(mask.view(np.uint8))
    reach = [int(np.ceil(distance / side)) for side in spacing_mm or (1.0,) * mask.ndim]
    near = tuple(slice(max(0, one.start - more), one.stop + more) for one, more in zip(box, reach, strict=True))
    grown = np.zeros_like(mask)
    grown[near] = ndimage.distance_transform_edt(~mask[near], sampling=spacing_mm) <= distance
    return grown


def brain_mask(image: AnyArray) -> Mask:
    """The brain of a skull-stripped image (*spatial): the largest connected part that is not 0, with its cavities."""
    tissue = np.asarray(image != 0)
    return without_cavities(largest_component(tissue)) if tissue.any() else tissue


def _made(kind: str, diameter: float, shape: Sequence[int], generator: np.random.Generator) -> Mask:
    """A shape of a kind, cropped, drawn in no more room than it takes and the patch has."""
    room = [min(count, max(3, int(np.ceil(_ROOM[kind] * diameter)))) for count in shape]
    return cropped(_MAKERS[kind](room, generator, diameter))
