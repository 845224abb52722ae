"""The midline of a head: where its left half is the mirror image of its right half.

What an inpainting network is shown: the image with its hole filled roughly, and what else it was built to see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from segkit.inpainting.fill import rough_fill
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


Context = Literal["none", "hole", "mirror"]


def stack_inputs(
    image: Image, missing: NDArray[np.bool_], context: Context, mirrored: tuple[Image, NDArray[np.bool_]] | None = None
) -> Image:
    """The channels in their order: the image, filled roughly, what is missing, the mirrored image, where that is known.

    Args:
        image: (C, *spatial), normalised; what it holds where it is missing is not shown.
        missing: (*spatial).
        context: none: the image alone; hole: also what is missing; mirror: all of it.
        mirrored: of the same shapes as image and missing, as `mirror_of` gives them; for "mirror" only.

    Returns:
        (C, ...), (C + 1, ...) or (2 C + 2, *spatial) float32.
    """
    channels: list[AnyArray] = [rough_fill(image, missing)]
    if context != "none":
        channels.append(missing[None])
    if context == "mirror":
        if mirrored is None:
            raise ValueError("the mirrored image is wanted and was not given")
        channels += [mirrored[0], mirrored[1][None]]
    return np.concatenate(channels, dtype=np.float32)


def mirror_of(image: Image, missing: NDArray[np.bool_], midline: Midline) -> tuple[Image, NDArray[np.bool_]]:
    """The image (C, D, H, W) mirrored, 0 where the opposite voxel is missing or background, and where it is not."""
    is_known = midline.mirrored((image != 0).any(0) & ~missing)
    return np.where(is_known, midline.mirrored(image), np.float32(0)), is_known
