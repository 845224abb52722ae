"""The midline of a head: where its left half is the mirror image of its right half."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from segkit.shapes import AnyArray, Image

_LARGEST_SHIFT = 0.15
"""Of the midline from the middle of the array, as a share of its length."""
_STEP = 2
"""Every how many voxels along the other axes are compared."""


@dataclass(frozen=True)
class Midline:
    """Voxel i along the first spatial axis lies opposite voxel `total` - i; an odd total is between two voxels."""

    total: int

    def mirrored(self, array: AnyArray) -> AnyArray:
        """(..., D, H, W) mirrored; 0 where the opposite voxel lies outside the array."""
        length = array.shape[-3]
        first, last = max(0, self.total - length + 1), min(length - 1, self.total)
        result = np.zeros_like(array)
        opposite = array[..., self.total - last : self.total - first + 1, :, :]
        result[..., first : last + 1, :, :] = opposite[..., ::-1, :, :]
        return result


def find_midline(image: Image) -> Midline:
    """The midline of (C, D, H, W) whose D runs from left to right, by the largest correlation with its mirror image.

    Voxels that are 0 are background or missing; the volume is taken as upright, as registered heads are.
    """
    plane = image.mean(0, dtype=np.float32)[:, ::_STEP, ::_STEP]
    is_known = (plane != 0).astype(np.float32)
    plane = np.where(plane != 0, plane - plane[plane != 0].mean(), 0) if plane.any() else plane
    length = len(plane)
    reach = int(_LARGEST_SHIFT * length)
    best, best_agreement = length - 1, -np.inf
    for total in sorted(range(length - 1 - 2 * reach, length + 2 * reach), key=lambda one: abs(one - length + 1)):
        first, last = max(0, total - length + 1), min(length - 1, total)
        here, there = slice(first, last + 1), slice(total - last, total - first + 1)
        # Agreement of the outline, then of what is inside it; each voxel counts once with its opposite.
        both = float(np.vdot(is_known[here], is_known[there][::-1])) / max(float(is_known.sum()), 1.0)
        inside = float(np.vdot(plane[here], plane[there][::-1])) / max(float(np.vdot(plane, plane)), 1e-12)
        if both + inside > best_agreement:
            best, best_agreement = total, both + inside
    return Midline(best)
