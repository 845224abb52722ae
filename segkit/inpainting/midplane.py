"""The midplane of a head, at which its left half is the mirror image of its right half, and mirroring at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize

from segkit.shapes import AnyArray, Image

_LARGEST_SHIFT = 0.15  # of the plane from the centre of the head, as a share of the array's length
_STEP_MM = 2.0  # between the shifts tried first
_BLURS_MM = (6.0, 2.0)  # standard deviations with which the head and its mirror image are compared, one after the other
_WIDE = 5  # half the width, in these deviations, of the mean that is subtracted
_LEVER_MM = 50.0  # a tilt is sought as the shift that it makes at this distance
_TOLERANCE_MM = 0.01
_COMPARED_VOXELS = 10_000
_ALMOST_ALL = 0.999  # of the weight of known voxels

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Midplane:
    """The plane whose sides are mirror images: voxel i (three coordinates) lies opposite `matrix` @ i + `offset`."""

    matrix: NDArray[np.float64]
    offset: Vector

    @classmethod
    def through(cls, voxel: Vector, tilts: Sequence[float] | Vector, spacing_mm: Sequence[float]) -> Midplane:
        """The plane through a voxel with the normal (1, *tilts) in mm; tilts of 0 mirror the first axis."""
        normal = np.array([1.0, *tilts]) / np.linalg.norm([1.0, *tilts])
        matrix = np.eye(3) - 2 * np.outer(normal / spacing_mm, normal * spacing_mm)
        return cls(matrix, voxel - matrix @ voxel)

    def opposite(self, voxels: AnyArray) -> Vector:
        """The places (3, N), in voxels, opposite to places (3, N)."""
        return np.asarray(self.matrix @ voxels + self.offset[:, None])


def find_midplane(image: Image, spacing_mm: Sequence[float]) -> Midplane:
    """The midplane of a head (C, D, H, W) whose D runs from left to right, finer than a voxel, with two tilts.

    The structure of the blurred image, and its outline, agree best with their mirror images. Voxels that are 0 are
    background or missing.
    """
    tissue = (image != 0).any(0)
    inside = np.flatnonzero(tissue)
    if not inside.size:
        return Midplane.through((np.array(tissue.shape) - 1) / 2, (0, 0), spacing_mm)
    if inside.size > _COMPARED_VOXELS:
        inside = np.sort(np.random.default_rng(0).choice(inside, _COMPARED_VOXELS, replace=False))
    points = np.array(np.unravel_index(inside, tissue.shape), np.float64)
    centre, width_mm = points.mean(1), len(tissue) * spacing_mm[0]
    scan = image.mean(0, dtype=np.float32)
    low, middle, high = np.percentile(scan.ravel()[inside], [2, 50, 98])
    scan = np.where(tissue, np.clip(scan, low, high) - middle, 0).astype(np.float32)

    def plane_at(place: Vector) -> Midplane:
        return Midplane.through(centre + np.array([place[0] / spacing_mm[0], 0, 0]), place[1:] / _LEVER_MM, spacing_mm)

    def disagreement(place: Vector, structure: Image, outline: Image) -> float:
        here = structure.ravel()[inside]
        opposite = plane_at(place).opposite(points)
        there, is_inside = (ndimage.map_coordinates(one, opposite, order=1) for one in (structure, outline))
        norms = np.linalg.norm(here) * np.linalg.norm(there)
        return -float(here @ there / max(norms, 1e-12) + is_inside.mean())

    shifts = np.arange(0, _LARGEST_SHIFT * width_mm, _STEP_MM)
    places = [np.array([shift, 0, 0]) for shift in (*shifts, *-shifts)]
    for blur_mm in _BLURS_MM:
        sigma = [blur_mm / side for side in spacing_mm]
        structure, outline = (ndimage.gaussian_filter(one, sigma) for one in (scan, tissue.astype(np.float32)))
        # Without a bias field or the mass of a tumour, which would turn the plane.
        structure -= ndimage.uniform_filter(scan, [1 + 2 * round(_WIDE * side) for side in sigma], mode="constant")
        compared = [disagreement(place, structure, outline) for place in places]
        best = places[int(np.argmin(compared))]
        simplex = best + np.vstack((np.zeros(3), blur_mm * np.eye(3)))
        options = {"initial_simplex": simplex, "xatol": _TOLERANCE_MM, "fatol": np.inf}
        found = optimize.minimize(disagreement, best, (structure, outline), method="Nelder-Mead", options=options)
        places = [np.asarray(found.x)]
    return plane_at(places[0])


def mirror_of(
    image: Image, missing: NDArray[np.bool_], midplane: Midplane, start: Sequence[int], size: Sequence[int]
) -> tuple[Image, NDArray[np.bool_]]:
    """The mirrored image (C, *size) in a box from voxel `start` on, which may reach outside, and where it is known.

    Linear between the voxels of `image` (C, D, H, W); 0 and not known where one of them is background or `missing`
    (D, H, W).
    """
    ends = ((first, first + length - 1) for first, length in zip(start, size, strict=True))
    corners = midplane.opposite(np.array(list(product(*ends))).T)
    shape = np.array(missing.shape)
    low = np.clip(np.floor(corners.min(1)).astype(int), 0, shape - 1)
    high = np.clip(np.ceil(corners.max(1)).astype(int) + 1, low + 1, shape)
    there = tuple(map(slice, low, high))
    offset = midplane.matrix @ np.array(start) + midplane.offset - low

    def mirrored(part: Image) -> Image:
        return np.asarray(ndimage.affine_transform(part, midplane.matrix, offset, tuple(size), np.float32, order=1))

    part = image[(slice(None), *there)]
    is_known = mirrored(((part != 0).any(0) & ~missing[there]).astype(np.float32)) > _ALMOST_ALL
    return np.stack([np.where(is_known, mirrored(channel), np.float32(0)) for channel in part]), is_known
