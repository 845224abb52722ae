"""What an inpainting network is shown: the image with its hole filled roughly, and what else it was built to see."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from segkit.data.symmetry import Midline
from segkit.inpainting.fill import rough_fill
from segkit.shapes import AnyArray, Image

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
