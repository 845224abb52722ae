"""Fills that need no network: what a trained one has to beat, see `benchmarks/inpainting.py`.

Images are (C, *spatial) float32, background exactly 0, holes (*spatial); see `segkit.inpainting.inputs`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segkit.errors import DataError
from segkit.inpainting.inputs import copy_to_fill, smooth_fill
from segkit.shapes import Image, Mask

_SHELL_VOXELS = 2
"""Thickness of the shell around a hole in which a mirrored image is compared with the image."""


def mean_fill(image: Image, hole: Mask) -> Image:
    """Fill with each channel's mean over the known voxels that are not 0, or with 0 where there is none.

    Args:
        image: Intensities (C, *spatial), float32, background exactly 0.
        hole: Where to fill, (*spatial).

    Raises:
        DataError: If the shapes differ, nothing is known, or a known voxel is not finite.
    """
    filled = copy_to_fill(image, hole)
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
    """Each voxel becomes the mean of its face neighbours, so the fill stays between the lowest and highest of them."""
    return smooth_fill(image, hole, 1)


def biharmonic_fill(image: Image, hole: Mask) -> Image:
    """The sum of squared Laplacians over the image is least; it may leave the range of the known voxels beside it."""
    return smooth_fill(image, hole, 2)


FILLS: dict[str, Callable[[Image, Mask], Image]] = {
    "mean": mean_fill,
    "harmonic": harmonic_fill,
    "biharmonic": biharmonic_fill,
}
"""Fills that need nothing but an image and its hole."""


def _tissue_means(image: Image, known: Mask) -> NDArray[np.float64]:
    tissue = known & (image != 0)
    counts = tissue.reshape(len(image), -1).sum(axis=1)
    sums = np.where(tissue, image, 0).reshape(len(image), -1).sum(axis=1, dtype=np.float64)
    means: NDArray[np.float64] = sums / np.maximum(counts, 1)
    return means
