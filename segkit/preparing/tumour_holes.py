"""Healthy holes by the procedure of the BraTS local-synthesis challenge (arXiv 2305.08992).

In every brain a hole in healthy tissue gets the shape of a tumour, often that of another patient: there the truth is
known, so there a synthesis can be scored. Large tumours get small holes and the other way round, so that there is room
for both. "Tumour" is the whole tumour without its specks and cavities; *unhealthy* is that and a margin around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segkit.errors import DataError
from segkit.preparing.hole_shapes import components, turned, without_specks
from segkit.preparing.holes import LEAST_IN_BRAIN, grow
from segkit.shapes import Mask

_STANDARD_SIDE = 240
"""Voxels along the first two axes of a BraTS volume, for which the limits below were made."""

_FEWEST_VOXELS = 64
"""What is smaller is a speck at any size, and no hole to score."""


@dataclass(frozen=True)
class ChallengeRules:
    """The limits of the procedure; the defaults are those of the challenge, for voxels of 1 mm."""

    smallest_voxels: int = 800
    """Connected parts of a tumour with fewer voxels are left out."""
    margin_voxels: float = 5.0
    """How far the unhealthy region reaches beyond the tumour, and how far a hole stays from that region."""
    rank_window: float = 0.05
    """How far the rank of a hole's size may be from the wanted one, either way, as a share of the pool."""
    attempts: int = 500
    """How many shapes and places are tried in one brain."""

    def scaled_to(self, side: int) -> ChallengeRules:
        """The same limits for volumes that show a whole head in `side` voxels instead of 240, such as phantoms."""
        factor = side / _STANDARD_SIDE
        smallest = max(_FEWEST_VOXELS, round(self.smallest_voxels * factor**3))
        return replace(self, smallest_voxels=smallest, margin_voxels=max(1.0, self.margin_voxels * factor))


@dataclass(frozen=True)
class TumourShape:
    """One connected part of a tumour, cropped, and its size as a share of its brain's voxels."""

    mask: Mask
    share: float


def whole_tumour(tumour: Mask, rules: ChallengeRules | None = None) -> Mask:
    """A tumour (*spatial), all its tissues together, without small parts and with its cavities."""
    return without_specks(tumour, (rules or ChallengeRules()).smallest_voxels)


def unhealthy_region(tumour: Mask, rules: ChallengeRules | None = None) -> Mask:
    """The whole tumour (*spatial) and the margin around it: the hole of which no truth is known."""
    rules = rules or ChallengeRules()
    return grow(whole_tumour(tumour, rules), rules.margin_voxels)


def tumour_components(tumour: Mask, brain: Mask, rules: ChallengeRules | None = None) -> list[TumourShape]:
    """The connected parts of a tumour (*spatial), largest first; both masks are of one patient.

    Raises:
        DataError: the brain is empty.
    """
    size = np.count_nonzero(brain)
    if not size:
        raise DataError("the brain is empty", expected="a mask with True where the image is not 0")
    return [TumourShape(part, float(part.sum() / size)) for part in components(whole_tumour(tumour, rules))]


def inverse_ranks(shares: Sequence[float], share: float, window: float) -> range:
    """The ranks, smallest first, of the sizes in `shares` (ascending) that go with a tumour of size `share`.

    The tumour that would be the k-th smallest goes with the k-th largest, give or take `window` times the number of
    sizes.
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
    rules: ChallengeRules | None = None,
) -> Mask:
    """A hole in healthy tissue of a whole brain.

    A shape whose size has the inverse rank of this tumour's (any shape, where there is no tumour) is flipped and turned
    and laid about the one of two random points of the brain that is farther from the unhealthy region. It is accepted
    where it lies inside the volume, at least three quarters of it in the brain and all of it at least the margin away
    from the unhealthy region; else shape and place are drawn anew.

    Args:
        brain: (*spatial), see `holes.brain_mask`.
        tumour: (*spatial), all tissues of the tumour together; it may be empty.
        pool: the shapes of all patients, see `tumour_components`.
        generator: decides everything.
        rules: the limits; None for those of the challenge.

    Raises:
        DataError: the pool is empty, the tumour leaves no room, or nothing was accepted in all attempts.
    """
    rules = rules or ChallengeRules()
    if not pool:
        raise DataError(
            f"there is no tumour of {rules.smallest_voxels} or more voxels to give holes their shape",
            remedy="Give references with tumours, or a smaller limit",
        )
    unhealthy = unhealthy_region(tumour, rules)
    distance = _distance_to(unhealthy)
    candidates = np.flatnonzero(brain & (distance > rules.margin_voxels))
    if not candidates.size:
        raise DataError(
            f"no voxel of the brain lies farther than {rules.margin_voxels:g} voxels from the tumour and its margin",
            expected="healthy tissue to lay a hole in",
            remedy="Leave this case out",
        )
    ordered = sorted(pool, key=lambda shape: shape.share)
    size = np.count_nonzero(whole_tumour(tumour, rules)) / np.count_nonzero(brain)
    ranks = inverse_ranks([shape.share for shape in ordered], size, rules.rank_window) if size else range(len(ordered))
    for _ in range(rules.attempts):
        shape = turned(ordered[ranks[int(generator.integers(len(ranks)))]].mask, generator)
        points = candidates[generator.integers(candidates.size, size=2)]
        point = points[np.argmax(distance.ravel()[points])]
        hole = _laid(shape, np.unravel_index(point, brain.shape), brain, distance, rules)
        if hole is not None:
            return hole
    raise DataError(
        f"no place for a healthy hole was found in {rules.attempts} attempts",
        expected=f"room for a tumour's shape at least {rules.margin_voxels:g} voxels from the tumour and its margin",
        remedy="Leave this case out, or give more tumours of other sizes",
    )


def _distance_to(region: Mask) -> NDArray[np.float64]:
    """Distance of every voxel (*spatial) from a region, in voxels; infinite where there is no region."""
    if not region.any():
        return np.full(region.shape, np.inf)
    distance: NDArray[np.float64] = ndimage.distance_transform_edt(~region)
    return distance


def _laid(
    shape: Mask,
    centre: Sequence[np.intp],
    brain: Mask,
    distance: NDArray[np.float64],
    rules: ChallengeRules,
) -> Mask | None:
    """The shape about a voxel of the volume; None where it must not be."""
    first = [int(place) - extent // 2 for place, extent in zip(centre, shape.shape, strict=True)]
    last = [start + extent for start, extent in zip(first, shape.shape, strict=True)]
    if min(first) < 0 or any(stop > size for stop, size in zip(last, brain.shape, strict=True)):
        return None
    box = tuple(slice(start, stop) for start, stop in zip(first, last, strict=True))
    if np.count_nonzero(shape & brain[box]) < LEAST_IN_BRAIN * np.count_nonzero(shape):
        return None
    if distance[box][shape].min() < rules.margin_voxels:
        return None
    hole = np.zeros(brain.shape, np.bool_)
    hole[box] = shape
    return hole
