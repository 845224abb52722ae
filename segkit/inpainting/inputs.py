"""The input channels of an inpainting network: the image with its hole filled roughly, the hole, the mirrored image.

A *hole* is a boolean array (*spatial), True where the image is to be filled. A smooth fill takes an image
(C, *spatial), 2D or 3D, ignores what it holds in the hole, and returns a copy in which all other voxels are the same
bit for bit. Each channel is filled by itself, without regard to spacing. At the edge the image continues as if
mirrored.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage, sparse
from scipy.sparse.linalg import LaplacianNd, LinearOperator

from segkit.checkpoint.card import Context, Fill
from segkit.errors import DataError
from segkit.shapes import AnyArray, Image, Mask

DETAIL_SHARE = 0.25
"""Share of the mirrored detail in the fill "mirrored-detail".

In four scans of BraTS 2018 the best share by least squares was 0.4 for holes of 30 voxels in diameter, where it
explains 5 % of the squared error of the fill, and 0 for holes of 10 and 18 voxels.
"""
_REACH_VOXELS = 2  # reach of the equation of a voxel: twice that of the Laplacian
_RESIDUAL = 1e-8  # residual, relative to the known voxels' share, at which the solution counts as found
_ROUGH_RESIDUAL = 1e-3  # the same for a fill that a network starts from
_STEPS_PER_VOXEL = 10  # most steps for each voxel of a hole


def needs_mirror(context: Context, fill: Fill) -> bool:
    """Whether a network with these inputs sees the mirrored image."""
    return context == "mirror" or fill == "mirrored-detail"


def stack_inputs(
    image: Image,
    missing: NDArray[np.bool_],
    context: Context,
    mirrored: tuple[Image, NDArray[np.bool_]] | None = None,
    fill: Fill = "biharmonic",
) -> Image:
    """The channels in order: the image with a `fill`; the hole; the mirrored image; where that is known; float32.

    `image` is (C, *spatial), normalised, its values in the hole `missing` (*spatial) ignored; `mirrored` the result of
    `mirror_of`. Context none gives the image alone, hole image and hole, mirror all, (2 C + 2, *spatial).
    """
    if mirrored is None and needs_mirror(context, fill):
        raise ValueError("the mirrored image is required and was not given")
    filled = np.where(missing, np.float32(0), image) if fill == "constant" else rough_fill(image, missing)
    if mirrored is not None and fill == "mirrored-detail":
        filled = add_detail(filled, missing, *mirrored)
    channels: list[AnyArray] = [filled]
    if context != "none":
        channels.append(missing[None])
    if mirrored is not None and context == "mirror":
        channels += [mirrored[0], mirrored[1][None]]
    return np.concatenate(channels, dtype=np.float32)


def add_detail(
    filled: Image, hole: Mask, mirrored: Image, is_known: NDArray[np.bool_], share: float = DETAIL_SHARE
) -> Image:
    """A rough fill (C, *spatial) with a share of what the same fill of the mirrored image would lose in the hole.

    The detail is 0 at the rim and where the mirrored image is not known (`mirror_of`). With a share of 1 this is the
    mirrored image, moved to the known values and slopes at the rim. The result is in the range of the fill.
    """
    if hole.all():
        return filled
    other = np.where(is_known, mirrored, filled)
    spatial = tuple(range(1, filled.ndim))
    detailed = filled + np.float32(share) * (other - rough_fill(other, hole))
    return np.clip(detailed, filled.min(spatial, keepdims=True), filled.max(spatial, keepdims=True))


def rough_fill(image: Image, hole: Mask) -> Image:
    """Nearly the biharmonic fill of (C, *spatial), in a fraction of its time; 0 if no voxel is known.

    It is within the range of the known voxels of each channel: the input of a network in a hole.
    """
    if hole.all():
        return np.zeros_like(image)
    filled = smooth_fill(image, hole, 2, _ROUGH_RESIDUAL)
    for channel in filled:
        known = channel[~hole]
        channel[hole] = np.clip(channel[hole], known.min(), known.max())
    return filled


def smooth_fill(image: Image, hole: Mask, power: int, residual: float = _RESIDUAL) -> Image:
    """Fill with the solution of the Laplace (`power` 1) or biharmonic (2) equation, the known voxels beside it given.

    The first, a soap film, stays within their range. The second, a thin plate, minimises the sum of squared Laplacians
    and also keeps the slope at the rim. The `image` is (C, *spatial) float32, the hole (*spatial); the solution counts
    as found at a `residual` relative to the known voxels' share.

    Raises:
        DataError: the shapes differ, nothing is known, or a known voxel is not finite.
    """
    filled = copy_to_fill(image, hole)
    for box, part in _independent_parts(hole):
        matrix, from_known = _equations(part, power)
        roughly = _box_inverse(part, power)
        for channel in filled:
            known = np.where(hole[box], 0, channel[box]).astype(np.float64)
            channel[box][part] = _solve(matrix, from_known @ known.ravel(), roughly, residual)
    return filled


def _independent_parts(hole: Mask) -> Iterator[tuple[tuple[slice, ...], Mask]]:
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


def copy_to_fill(image: Image, hole: Mask) -> Image:
    """A copy of the image, after the checks of every fill."""
    if image.shape[1:] != hole.shape:
        raise DataError(f"the hole has the shape {hole.shape}", expected=f"{image.shape[1:]}, as the image has")
    if hole.all():
        raise DataError("the hole is the whole image", expected="known voxels to fill it from")
    if not np.isfinite(image[:, ~hole]).all():
        raise DataError("a known voxel is not a finite number", remedy="Make it part of the hole")
    return image.copy()
