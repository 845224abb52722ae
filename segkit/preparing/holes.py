"""Holes: randomly placed regions of an image that a network learns to fill in.

A *hole* is a mask (*spatial), True where voxels are missing. `HoleMaker` draws one for a training patch or a volume,
with a shape of one of the kinds in `hole_shapes`. `challenge_hole` follows the BraTS local-synthesis challenge
(arXiv 2305.08992): a hole in healthy tissue, where the truth is known, gets the shape of a tumour, often of another
patient. Large tumours get small holes and small ones large holes, so that there is room for both. *Unhealthy* is the
whole tumour, without small components and cavities, and a margin around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy import ndimage

from segkit.config import Config
from segkit.errors import DataError
from segkit.preparing import hole_shapes
from segkit.preparing.hole_shapes import cropped, diameter_of, largest_component, turned, without_cavities
from segkit.shapes import AnyArray, Mask, without_small_components

_LEAST_IN_BRAIN = 0.75  # share of a hole that must lie in the brain (BraTS local synthesis)

_SHAPES, _PLACES_PER_SHAPE = 10, 5  # how many shapes are tried, at how many places each
_SHRINKAGE = 0.82  # how much smaller each further shape is
_ROOM = {"boxes": 1.5, "strokes": 2.0, "blobs": 1.9}  # side of the array in which a shape is drawn, in diameters
_STANDARD_SIDE = 240  # voxels along the first two axes of a BraTS volume, to which the limits of the challenge apply
_FEWEST_VOXELS = 64  # components of a tumour with fewer voxels are left out at any volume size

_MAKERS: Mapping[str, Callable[[Sequence[int], np.random.Generator, float], Mask]] = {
    "boxes": hole_shapes.box_hole,
    "strokes": hole_shapes.stroke_hole,
    "blobs": hole_shapes.blob_hole,
}
_KINDS = (*_MAKERS, "tumours")


class HolesConfig(Config):
    """Frequency of each kind of hole, sizes, and the distance to lesions."""

    boxes: float = Field(default=0.1, ge=0)
    """Relative frequency of boxes."""
    strokes: float = Field(default=0.1, ge=0)
    """Relative frequency of irregular strokes."""
    blobs: float = Field(default=0.5, ge=0)
    """Relative frequency of blobs that look like tumours."""
    tumours: float = Field(default=0.3, ge=0)
    """Relative frequency of the shapes of real tumours, flipped and rotated; 0 if there are none."""
    diameter_range: tuple[float, float] = (11.5, 49.0)
    """Smallest and largest diameter in voxels, of the ball or disc of as many voxels. The default is 800 to 62,000
    voxels in a volume. Real tumours keep their size."""
    largest_share: float = Field(default=0.35, gt=0, le=0.9)
    """Largest hole as a share of the voxels of the patch; larger ones are drawn smaller or shrunk."""
    count_range: tuple[int, int] = (1, 1)
    """Fewest and most holes of a patch; several of them may touch each other."""
    margin_voxels: int = Field(default=5, ge=0)
    """Distance from lesions within which there is no hole, in voxels."""
    min_voxels: int = Field(default=64, ge=1)
    """Fewest voxels of brain in a hole, if there are so many."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not any(getattr(self, kind) for kind in _KINDS):
            raise ValueError("boxes, strokes, blobs and tumours are all 0; one of them must be larger")
        if not 1 <= self.diameter_range[0] <= self.diameter_range[1]:
            raise ValueError(f"diameter_range is {self.diameter_range}; expected two diameters from 1 up, in order")
        if not 1 <= self.count_range[0] <= self.count_range[1]:
            raise ValueError(f"count_range is {self.count_range}; expected two whole numbers from 1 up, in order")
        return self


class HoleMaker:
    """Draws holes; they depend on the arguments and the generator only.

    `shapes` are masks (*spatial) of tumours, with as many axes as the images; empty ones are left out.
    """

    def __init__(self, config: HolesConfig, shapes: Sequence[Mask] = ()) -> None:
        self.config = config
        self.shapes = tuple(cropped(shape) for shape in shapes if shape.any())
        self._kinds = _KINDS if self.shapes else tuple(_MAKERS)
        chances = np.array([getattr(config, kind) for kind in self._kinds], np.float64)
        if not chances.any():  # only tumours are wanted, and there are none
            self._kinds, chances = ("blobs",), np.ones(1)
        self._chances = chances / chances.sum()

    def draw(self, brain: Mask, allowed: Mask, generator: np.random.Generator) -> Mask:
        """The hole of a patch or a volume: one, or `count_range` of them together.

        `brain` is where the image shows tissue, `allowed` where the truth is known: brain and background without
        lesions and `margin_voxels` around them (see `grow`). The hole is True only where `allowed`. All are (*spatial).

        At least three quarters of a shape lie in the brain, and at least `min_voxels` of them are allowed. If no place
        is found, smaller shapes are tried, and finally a small box around an allowed voxel. The hole is empty only if
        nothing is allowed.
        """
        fewest, most = self.config.count_range
        hole = self._draw_one(brain, allowed, generator)
        for _ in range(int(generator.integers(fewest, most + 1)) - 1 if most > 1 else 0):
            hole |= self._draw_one(brain, allowed & ~hole, generator)
        return hole

    def _draw_one(self, brain: Mask, allowed: Mask, generator: np.random.Generator) -> Mask:
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
                side = max(3, int(np.ceil(_ROOM[kind] * smaller * diameter)))
                room = [min(count, side) for count in brain.shape]
                shape = cropped(_MAKERS[kind](room, generator, smaller * diameter))
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
        """The shape centred on a random candidate (flat indices), moved inside; None if too little of it is usable."""
        centre = np.unravel_index(candidates[generator.integers(candidates.size)], brain.shape)
        box: tuple[slice, ...] = ()
        part: tuple[slice, ...] = ()
        for middle, extent, size in zip(centre, shape.shape, brain.shape, strict=True):
            used = min(extent, size)
            first = min(max(int(middle) - used // 2, 0), size - used)
            box += (slice(first, first + used),)
            part += (slice((extent - used) // 2, (extent - used) // 2 + used),)
        in_brain = shape[part] & brain[box]
        if np.count_nonzero(in_brain) < _LEAST_IN_BRAIN * np.count_nonzero(shape):
            return None
        if np.count_nonzero(in_brain & allowed[box]) < self.config.min_voxels:
            return None
        hole = np.zeros(brain.shape, np.bool_)
        hole[box] = shape[part] & allowed[box]
        return hole

    def _small_box(self, allowed: Mask, candidates: NDArray[np.intp], generator: np.random.Generator) -> Mask:
        """The allowed part of a box of at least `min_voxels` centred on a random candidate (flat indices)."""
        hole = np.zeros(allowed.shape, np.bool_)
        if candidates.size:
            side = int(np.ceil(self.config.min_voxels ** (1 / allowed.ndim)))
            centre = np.unravel_index(candidates[generator.integers(candidates.size)], allowed.shape)
            box = tuple(slice(max(0, int(place) - side // 2), int(place) - side // 2 + side) for place in centre)
            hole[box] = allowed[box]
        return hole


def grow(mask: Mask, distance: float, spacing_mm: Sequence[float] | None = None) -> Mask:
    """A mask (*spatial) with all voxels within a distance of them, in mm if a spacing is given, else in voxels."""
    if distance <= 0 or not mask.any():
        return mask.copy()
    (box,) = ndimage.find_objects(mask.view(np.uint8))
    reach = [int(np.ceil(distance / side)) for side in spacing_mm or (1.0,) * mask.ndim]
    near = tuple(slice(max(0, one.start - more), one.stop + more) for one, more in zip(box, reach, strict=True))
    grown = np.zeros_like(mask)
    grown[near] = ndimage.distance_transform_edt(~mask[near], sampling=spacing_mm) <= distance
    return grown


def brain_mask(image: AnyArray) -> Mask:
    """The brain of a skull-stripped image (*spatial): the largest component that is not 0, with its cavities filled."""
    tissue = np.asarray(image != 0)
    return without_cavities(largest_component(tissue)) if tissue.any() else tissue


@dataclass(frozen=True)
class ChallengeRules:
    """The limits of the procedure; the defaults are those of the challenge, for voxels of 1 mm."""

    smallest_voxels: int = 800  # components of a tumour with fewer voxels are left out
    margin_voxels: float = 5.0  # width of the margin around the tumour, and smallest distance of a hole from the margin
    rank_window: float = 0.05
    """Largest difference from the wanted rank of a hole's size, either way, as a share of the pool."""
    attempts: int = 500  # number of shapes and places that are tried in one brain

    def scaled_to(self, side: int) -> ChallengeRules:
        """The same limits for volumes that show a whole head in `side` voxels instead of 240."""
        factor = side / _STANDARD_SIDE
        smallest = max(_FEWEST_VOXELS, round(self.smallest_voxels * factor**3))
        return replace(self, smallest_voxels=smallest, margin_voxels=max(1.0, self.margin_voxels * factor))


CHALLENGE_RULES = ChallengeRules()


@dataclass(frozen=True)
class TumourShape:
    """One component of a tumour, cropped, and its size as a share of the voxels of the brain."""

    mask: Mask
    share: float


def whole_tumour(tumour: Mask, rules: ChallengeRules = CHALLENGE_RULES) -> Mask:
    """A tumour (*spatial), all its tissues together, without small components and with its cavities filled."""
    return without_cavities(without_small_components(tumour, rules.smallest_voxels))


def unhealthy_region(tumour: Mask, rules: ChallengeRules = CHALLENGE_RULES) -> Mask:
    """The whole tumour (*spatial) and the margin around it: the hole whose healthy tissue is unknown."""
    return grow(whole_tumour(tumour, rules), rules.margin_voxels)


def tumour_components(tumour: Mask, brain: Mask, rules: ChallengeRules = CHALLENGE_RULES) -> list[TumourShape]:
    """The components of a tumour (*spatial), largest first; both masks are of one patient.

    Raises:
        DataError: the brain is empty.
    """
    size = np.count_nonzero(brain)
    if not size:
        raise DataError("the brain is empty", expected="a mask with True where the image is not 0")
    return [TumourShape(part, float(part.sum() / size)) for part in hole_shapes.components(whole_tumour(tumour, rules))]


def inverse_ranks(shares: Sequence[float], share: float, window: float) -> range:
    """Ranks in `shares` (ascending) of the hole sizes for a tumour of size `share`.

    The k-th smallest tumour gets the k-th largest size, plus or minus `window` times the number of sizes.
    """
    count = len(shares)
    wanted = min(max(count - 1 - int(np.searchsorted(shares, share)), 0), count - 1)
    reach = math.floor(window * count)
    return range(max(0, wanted - reach), min(count, wanted + reach + 1))


def challenge_hole(
    brain: Mask,
    tumour: Mask,
    pool: Sequence[TumourShape],
    generator: np.random.Generator,
    rules: ChallengeRules = CHALLENGE_RULES,
) -> Mask:
    """A hole in healthy tissue of a whole brain.

    A shape whose size has the inverse rank of this tumour (any shape, if there is no tumour) is flipped, rotated and
    centred on that of two random points of the brain which is farther from the unhealthy region. It is accepted if it
    lies inside the volume, at least three quarters of it in the brain and all of it at least the margin away from the
    unhealthy region; otherwise shape and place are drawn again.

    `brain` and `tumour` (all its tissues; it may be empty) are (*spatial); `pool` are shapes of all patients.

    Raises:
        DataError: the pool is empty, the tumour leaves no room, or nothing was accepted in all attempts.
    """
    if not pool:
        found = f"there is no tumour of {rules.smallest_voxels} or more voxels whose shape holes can have"
        raise DataError(found, remedy="Give references with tumours, or a smaller limit")
    unhealthy = unhealthy_region(tumour, rules)
    distance = ndimage.distance_transform_edt(~unhealthy) if unhealthy.any() else np.full(unhealthy.shape, np.inf)
    candidates = np.flatnonzero(brain & (distance > rules.margin_voxels))
    room = f"{rules.margin_voxels:g} voxels from the tumour and its margin"
    if not candidates.size:
        found = f"no voxel of the brain lies farther than {room}"
        raise DataError(found, expected="healthy tissue for a hole", remedy="Leave this case out")
    ordered = sorted(pool, key=lambda shape: shape.share)
    size = np.count_nonzero(whole_tumour(tumour, rules)) / np.count_nonzero(brain)
    ranks = inverse_ranks([shape.share for shape in ordered], size, rules.rank_window) if size else range(len(ordered))
    for _ in range(rules.attempts):
        shape = turned(ordered[ranks[int(generator.integers(len(ranks)))]].mask, generator)
        points = candidates[generator.integers(candidates.size, size=2)]
        point = points[np.argmax(distance.ravel()[points])]
        hole = _place_hole(shape, np.unravel_index(point, brain.shape), brain, distance, rules)
        if hole is not None:
            return hole
    found, remedy = f"no place for a healthy hole was found in {rules.attempts} attempts", "Leave this case out"
    expected = f"room for a tumour's shape at least {room}"
    raise DataError(found, expected=expected, remedy=f"{remedy}, or give more tumours of other sizes")


def _place_hole(
    shape: Mask, centre: Sequence[np.intp], brain: Mask, distance: NDArray[np.float64], rules: ChallengeRules
) -> Mask | None:
    first = [int(place) - extent // 2 for place, extent in zip(centre, shape.shape, strict=True)]
    box = tuple(slice(start, start + extent) for start, extent in zip(first, shape.shape, strict=True))
    if min(first) < 0 or any(side.stop > size for side, size in zip(box, brain.shape, strict=True)):
        return None
    if np.count_nonzero(shape & brain[box]) < _LEAST_IN_BRAIN * np.count_nonzero(shape):
        return None
    if distance[box][shape].min() < rules.margin_voxels:
        return None
    hole = np.zeros(brain.shape, np.bool_)
    hole[box] = shape
    return hole
