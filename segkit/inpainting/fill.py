"""Fills that need no network: what a trained one has to beat.

A *hole* is a boolean array (*spatial), True where the image is to be made up. Every fill takes an image (C, *spatial),
2D or 3D, ignores what it holds in the hole, and returns a copy in which the voxels of the hole are made up and all
others are the same bit for bit. Each channel is filled by itself.

Harmonic and biharmonic fills continue the known voxels smoothly: the first is a soap film, the solution of Laplace's
equation; the second, which minimises the sum of squared Laplacians, a thin plate that also keeps the slope at the rim.
Spacing is not taken into account. At the edge of the image both go on as if it were mirrored there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage, sparse
from scipy.sparse.linalg import LaplacianNd, LinearOperator

from segkit.errors import DataError
from segkit.shapes import Image, Mask

_SHELL_VOXELS = 2
"""Thickness of the shell around a hole in which a mirrored image is compared with the image."""
_REACH_VOXELS = 2
"""How far from a hole's voxel its equation looks: twice the Laplacian's reach."""
_RESIDUAL = 1e-8
"""Residual, relative to the known voxels' share, at which the solution counts as found."""
_ROUGH_RESIDUAL = 1e-3
"""The same for a fill that a network goes on from."""
_STEPS_PER_VOXEL = 10
"""After so many steps for each voxel of a hole the solution is left as it is."""

Box = tuple[slice, ...]


def mean_fill(image: Image, hole: Mask) -> Image:
    """Fill with each channel's mean over the known voxels that are not 0, or with 0 where there is none.

    Args:
        image: Intensities (C, *spatial), float32, background exactly 0.
        hole: Where to fill, (*spatial).

    Raises:
        DataError: If the shapes differ, nothing is known, or a known voxel is not finite.
    """
    filled = _to_fill(image, hole)
    filled[:, hole] = _tissue_means(image, ~hole)[:, None]
    return filled


def mirror_fill(image: Image, hole: Mask, mirrored: Image, mirrored_is_known: Mask) -> Image:
    """Fill with the other hemisphere where it is known, and with the mean of `mean_fill` elsewhere.

    The mirrored tissue is shifted by one offset per channel, so that its mean over a shell of two voxels around the
    hole agrees with the image's (tissue of both only; no offset where there is none). Mirrored background stays 0.

    Args:
        image: Intensities (C, *spatial), float32, background exactly 0.
        hole: Where to fill, (*spatial).
        mirrored: The image mirrored at the midline, (C, *spatial).
        mirrored_is_known: Where `mirrored` shows known voxels, (*spatial).

    Raises:
        DataError: If the shapes differ, nothing is known, or a known voxel is not finite.
    """
    if mirrored.shape != image.shape or mirrored_is_known.shape != hole.shape:
        raise DataError(
            f"the mirrored image has the shape {mirrored.shape} and its mask {mirrored_is_known.shape}",
            expected=f"{image.shape} and {hole.shape}",
        )
    filled = mean_fill(image, hole)
    known_twice = mirrored_is_known & ~hole
    shell = ndimage.binary_dilation(hole, iterations=_SHELL_VOXELS) & known_twice
    for channel, other in zip(filled, mirrored, strict=True):
        compared = shell & (channel != 0) & (other != 0)
        offset = float(np.mean(channel[compared] - other[compared], dtype=np.float64)) if compared.any() else 0.0
        source = hole & mirrored_is_known
        channel[source] = np.where(other[source] != 0, other[source] + offset, 0)
    return filled


def harmonic_fill(image: Image, hole: Mask) -> Image:
    """Fill with the solution of Laplace's equation whose boundary values are the known voxels beside the hole.

    Each voxel becomes the mean of its face neighbours, so the fill stays between the lowest and highest of them.

    Args:
        image: Intensities (C, *spatial), float32.
        hole: Where to fill, (*spatial).

    Raises:
        DataError: If the shapes differ, nothing is known, or a known voxel is not finite.
    """
    return _fill_smoothly(image, hole, 1, _RESIDUAL)


def biharmonic_fill(image: Image, hole: Mask) -> Image:
    """Fill such that the sum of squared Laplacians over the image is least; it may leave the range of its rim.

    Args:
        image: Intensities (C, *spatial), float32.
        hole: Where to fill, (*spatial).

    Raises:
        DataError: If the shapes differ, nothing is known, or a known voxel is not finite.
    """
    return _fill_smoothly(image, hole, 2, _RESIDUAL)


FILLS: dict[str, Callable[[Image, Mask], Image]] = {
    "mean": mean_fill,
    "harmonic": harmonic_fill,
    "biharmonic": biharmonic_fill,
}
"""Fills that need nothing but an image and its hole."""


def rough_fill(image: Image, hole: Mask) -> Image:
    """Nearly the biharmonic fill, in a fraction of its time, within the range of the known voxels of each channel.

    What a network is shown in a hole and goes on from; 0 where nothing is known.

    Args:
        image: Intensities (C, *spatial), float32.
        hole: Where to fill, (*spatial).
    """
    if hole.all():
        return np.zeros_like(image)
    filled = _fill_smoothly(image, hole, 2, _ROUGH_RESIDUAL)
    for channel in filled:
        known = channel[~hole]
        channel[hole] = np.clip(channel[hole], known.min(), known.max())
    return filled


def _fill_smoothly(image: Image, hole: Mask, power: int, residual: float) -> Image:
    filled = _to_fill(image, hole)
    for box, part in _independent_parts(hole):
        matrix, from_known = _equations(part, power)
        roughly = _box_inverse(part, power)
        for channel in filled:
            known = np.where(hole[box], 0, channel[box]).astype(np.float64)
            channel[box][part] = _solve(matrix, from_known @ known.ravel(), roughly, residual)
    return filled


def _independent_parts(hole: Mask) -> Iterator[tuple[Box, Mask]]:
    """The hole in parts that no equation joins, each in its box with the known voxels that it needs."""
    faces = ndimage.generate_binary_structure(hole.ndim, 1)
    parts, _ = ndimage.label(ndimage.binary_dilation(hole, faces), faces)  # neighbours of neighbours share an equation
    parts[~hole] = 0
    for number, tight in enumerate(ndimage.find_objects(parts), start=1):
        box = tuple(slice(max(s.start - _REACH_VOXELS, 0), s.stop + _REACH_VOXELS) for s in tight)
        yield box, parts[box] == number


def _equations(part: Mask, power: int) -> tuple[sparse.csr_array, sparse.csr_array]:
    """The symmetric positive matrix of a hole's voxels, and the matrix that makes its right side of the known ones."""
    axes = tuple(size for size in part.shape if size > 1)  # scipy gives a lone voxel neighbours
    grid = LaplacianNd(axes, boundary_conditions="neumann", dtype=np.float64)
    laplacian = sparse.csr_array(grid.tosparse())
    rows = -laplacian[part.ravel()] if power == 1 else laplacian[part.ravel()] @ laplacian
    return rows[:, part.ravel()], -rows


def _solve(
    matrix: sparse.csr_array, right: NDArray[np.float64], inverse: LinearOperator, residual: float
) -> NDArray[np.float64]:
    """The solution by preconditioned conjugate gradients (Hestenes and Stiefel 1952; Saad 2003, algorithm 9.1).

    scipy's own sums by BLAS, which rounds otherwise with another number of threads, and nodes of a cluster have other
    numbers.
    """
    solution, rest = np.zeros_like(right), right.copy()
    enough = residual**2 * _product(right, right)
    direction, before = np.zeros_like(right), 1.0
    for _ in range(_STEPS_PER_VOXEL * len(right)):
        if _product(rest, rest) <= enough:
            break
        corrected = inverse.matvec(rest)
        now = _product(rest, corrected)
        direction = corrected + now / before * direction
        image = matrix @ direction
        step = now / _product(direction, image)
        solution += step * direction
        rest -= step * image
        before = now
    return solution


def _product(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """The inner product; einsum, not BLAS: the same bits with any number of threads."""
    return float(np.einsum("i,i->", one, other))


def _box_inverse(part: Mask, power: int) -> LinearOperator:
    """The inverse of the same equations for a hole that is a whole box, by sine transforms.

    It saves nine of ten steps of the biharmonic fill of a large hole; the solution does not depend on it.
    """
    (tight,) = ndimage.find_objects(part.astype(np.uint8))
    part = part[tight]
    shape = [fft.next_fast_len(size + 1, real=True) - 1 for size in part.shape]
    angles = np.ix_(*(np.arange(1, size + 1) * np.pi / (size + 1) for size in shape))
    factors = sum(2 - 2 * np.cos(angle) for angle in angles) ** -power
    inside = np.zeros(shape, np.bool_)
    inside[tuple(map(slice, part.shape))] = part

    def apply(right: NDArray[np.float64]) -> NDArray[np.float64]:
        values = np.zeros(shape)
        values[inside] = right.ravel()
        spectrum = fft.dstn(values, type=1, overwrite_x=True) * factors
        return np.asarray(fft.idstn(spectrum, type=1, overwrite_x=True)[inside])

    return LinearOperator((len(inside[inside]),) * 2, matvec=apply, dtype=np.float64)


def _tissue_means(image: Image, known: Mask) -> NDArray[np.float64]:
    tissue = known & (image != 0)
    counts = tissue.reshape(len(image), -1).sum(axis=1)
    sums = np.where(tissue, image, 0).reshape(len(image), -1).sum(axis=1, dtype=np.float64)
    means: NDArray[np.float64] = sums / np.maximum(counts, 1)
    return means


def _to_fill(image: Image, hole: Mask) -> Image:
    """A copy of the image, after checks that hold for every fill."""
    if image.shape[1:] != hole.shape:
        raise DataError(f"the hole has the shape {hole.shape}", expected=f"{image.shape[1:]}, as the image has")
    if hole.all():
        raise DataError("the hole is the whole image", expected="known voxels to fill it from")
    if not np.isfinite(image[:, ~hole]).all():
        raise DataError("a known voxel is not a finite number", remedy="Make it part of the hole")
    return image.copy()
