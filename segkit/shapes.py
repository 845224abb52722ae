"""The one axis order, and names for the arrays that follow it.

Everywhere in segkit a tensor of images is (B, C, D, H, W) and an array of one case is (C, D, H, W): batch, channel,
then the three voxel axes in the order in which nibabel gives them, so D is the first voxel axis of the NIfTI array.
After orientation to RAS, D grows to the patient's right, H to the front, W to the top. Two-dimensional data drop D:
(B, C, H, W) and (C, H, W), with H the rows and W the columns of the picture.

Affines are 4 x 4, float64, from voxel indices to millimetres in RAS+ world space (the NIfTI convention).
Spacings are in millimetres in the order of the voxel axes.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Image: TypeAlias = NDArray[np.float32]
"""Intensities, (C, D, H, W) or (C, H, W), float32."""

LabelMap: TypeAlias = NDArray[np.uint8]
"""Label values of a scheme, (D, H, W) or (H, W), uint8, 0 = background."""

Mask: TypeAlias = NDArray[np.bool_]
"""True where something is present, (D, H, W) or (H, W)."""

Masks: TypeAlias = NDArray[np.bool_]
"""One boolean plane per output, (K, D, H, W) or (K, H, W)."""

Affine: TypeAlias = NDArray[np.float64]
"""Voxel indices to millimetres in RAS+ world space, (4, 4)."""

AnyArray: TypeAlias = NDArray[Any]


def overlap(
    start: Sequence[int], size: Sequence[int], other_start: Sequence[int], other_size: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The overlap of two boxes, as an index into the first and an index into the second; empty if there is none."""
    own, other = [], []
    for first, length, other_first, other_length in zip(start, size, other_start, other_size, strict=True):
        low = max(first, other_first)
        high = max(low, min(first + length, other_first + other_length))
        own.append(slice(low - first, high - first))
        other.append(slice(low - other_first, high - other_first))
    return tuple(own), tuple(other)


def zeros_and_ones(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A mask as integers, without a copy: cc3d 4.1.1 numbers booleans wrongly where voxels touch at corners."""
    return mask.view(np.uint8)


def connectivity(dims: int) -> int:
    """Neighbours of a voxel in cc3d's terms, those at corners included: 26 in a volume, 8 in a picture."""
    return 26 if dims == 3 else 8


def label_components(mask: Mask) -> AnyArray:
    """The connected components of a mask (*spatial), numbered from 1; voxels that touch at a corner are connected."""
    import cc3d  # only some of the code that imports this module needs it

    labels: AnyArray = cc3d.connected_components(zeros_and_ones(mask), connectivity=connectivity(mask.ndim))
    return labels


def without_small_components(mask: Mask, smallest: int) -> Mask:
    """A mask (*spatial) without its connected components of fewer than `smallest` voxels."""
    import cc3d

    kept: Mask = cc3d.dust(zeros_and_ones(mask), threshold=smallest, connectivity=connectivity(mask.ndim)) > 0
    return kept
