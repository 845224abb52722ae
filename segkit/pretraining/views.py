"""Random views of one image, each with its *frame*: the affine from the view's voxels to the image.

A view is a random box of the image, resampled to a fixed size, mirrored, with changed intensities.
Its frame maps voxel indices of the view (0-based, at voxel centres) to mm in the image it was cut from, whose first
voxel has its centre at 0 mm. The frames of two views show which of their feature cells are at the same place.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose, RandomizableTransform
from numpy.typing import NDArray
from pydantic import Field, ValidationInfo, field_validator
from torch.nn import functional

from segkit.config import Config
from segkit.preparing.augmentation import IntensityConfig, Range, intensity_transforms
from segkit.preparing.preprocessing import crop_box
from segkit.preparing.transforms import IMAGE
from segkit.shapes import AnyArray

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""First voxel and the one after the last, per axis."""

_POOL = {2: functional.avg_pool2d, 3: functional.avg_pool3d}


class ViewIntensityConfig(IntensityConfig):
    """Changes of intensities for views: stronger than in training, so that grey values alone identify no image."""

    noise_probability: float = Field(default=0.3, ge=0, le=1)
    """Probability of Gaussian noise."""
    blur_probability: float = Field(default=0.5, ge=0, le=1)
    """Probability of Gaussian blurring."""
    brightness_probability: float = Field(default=0.8, ge=0, le=1)
    """Probability of multiplying by a factor; with the contrast the counterpart of colour jitter."""
    brightness_range: Range = (0.6, 1.4)
    """The factor of the brightness change."""
    contrast_probability: float = Field(default=0.8, ge=0, le=1)
    """Probability of stretching intensities about their mean, within the range they had."""
    contrast_range: Range = (0.6, 1.4)
    """The factor of the contrast change."""


class ViewsConfig(Config):
    """How views are cut from an image and changed."""

    size: int | tuple[int, ...] | None = None
    """Voxels of a view per axis, or one number for all axes; None is decided by the run."""
    scale_range: Range = (0.6, 1.0)
    """Share of the area or volume of the image's content (the box of voxels that are not 0) that a view shows; a view
    that would leave the content shows less, in the same shape. LVM-Med's is not published; ours makes the two views of
    an image overlap."""
    aspect_range: Range = (0.75, 4 / 3)
    """Stretch of each axis relative to the last one."""
    mirror_axes: tuple[int, ...] | None = None
    """Axes of the view that are mirrored, each with probability 0.5; None means all of them (our choice: LVM-Med
    mirrors pictures from left to right)."""
    intensities: ViewIntensityConfig = Field(default_factory=ViewIntensityConfig)
    """Changes of intensities, drawn for each view and modality."""

    @field_validator("scale_range", "aspect_range")
    @classmethod
    def _is_a_range(cls, value: Range, info: ValidationInfo) -> Range:
        if not 0 < value[0] <= value[1]:
            raise ValueError("two positive numbers are needed, the smaller one first")
        if info.field_name == "scale_range" and value[1] > 1:
            raise ValueError("a view cannot show more than all of the content, which is 1")
        return value


def view_transforms(config: ViewsConfig, size: Sequence[int]) -> Compose:
    """From {"image": (C, *spatial), "spacing_mm": of its axes, possibly "content": Box} to a random view of it.

    Returned are "image" (C, *size) float32 and "frame" (dims, dims + 1) float32, voxel indices of the view to mm in its
    image. The size of the view is `size`, in voxels; that of `config` is ignored.
    """
    return Compose([RandViewd(config, size), intensity_transforms(config.intensities, len(size))])


class RandViewd(RandomizableTransform):  # type: ignore[misc]
    """Cuts a random box, resampled once, linearly, with its frame.

    If a view has less than half the image's resolution, whole blocks of voxels are averaged first, against aliasing.
    The image may be memory-mapped; only the part that is shown is read. `content` is the box of voxels that are not 0.
    """

    def __init__(self, config: ViewsConfig, size: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.size = tuple(size)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The view and its frame."""
        image, spacing_mm = data[IMAGE], data["spacing_mm"]
        content = data.get("content") or crop_box(image, "nonzero")
        matrix, offset = _draw_placement(content, self.size, self.config, self.R)
        frame = np.concatenate([matrix, offset[:, None]], axis=1) * np.asarray(spacing_mm, np.float64)[:, None]
        view = _resample(image, matrix, offset, self.size)
        return {IMAGE: view, "frame": torch.from_numpy(frame).float()}


def cell_positions(frame: torch.Tensor, view_shape: Sequence[int], map_shape: Sequence[int]) -> torch.Tensor:
    """Centres of the cells of a feature map, in mm in the image that its view was cut from: (B, cells, dims), C order.

    A cell covers `view_shape / map_shape` voxels of the view along each axis; `frame` is (B, dims, dims + 1).
    """
    along = [
        (torch.arange(cells, dtype=frame.dtype, device=frame.device) + 0.5) * (voxels / cells) - 0.5
        for voxels, cells in zip(view_shape, map_shape, strict=True)
    ]
    voxel = torch.stack(torch.meshgrid(*along, indexing="ij"), dim=-1).flatten(0, -2)  # (cells, dims)
    return voxel @ frame[:, :, :-1].mT + frame[:, None, :, -1]


def _draw_placement(
    content: Box, size: Sequence[int], config: ViewsConfig, random: np.random.RandomState
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Matrix (dims, dims) and offset (dims,) from voxel indices of the view to those of the image."""
    dims = len(size)
    start, stop = (np.array(corner, np.float64) for corner in content)
    voxels = np.array(size, np.float64)
    least, most = config.aspect_range
    stretch = np.exp([*random.uniform(math.log(least), math.log(most), dims - 1), 0.0])
    extent = voxels * stretch  # in voxels of the image, up to a factor: a view keeps the proportions of its voxels
    share = random.uniform(*config.scale_range)
    extent *= (share * (stop - start).prod() / extent.prod()) ** (1 / dims)
    extent *= min(1.0, ((stop - start) / extent).min())
    middle = start + extent / 2 + random.random(dims) * (stop - start - extent) - 0.5
    is_mirrored = random.random(dims) < 0.5
    allowed = range(dims) if config.mirror_axes is None else config.mirror_axes
    sign = [-1.0 if axis in allowed and is_mirrored[axis] else 1.0 for axis in range(dims)]
    matrix = np.diag(sign * extent / voxels)
    return matrix, middle - matrix @ ((voxels - 1) / 2)


def _resample(
    image: AnyArray, matrix: NDArray[np.float64], offset: NDArray[np.float64], size: Sequence[int]
) -> torch.Tensor:
    """The values of (C, *spatial) at `matrix @ voxel + offset`, (C, *size); the outermost reach to the image's edge."""
    shape = np.array(image.shape[1:])
    block = np.maximum(1, np.floor(np.linalg.norm(matrix, axis=1))).astype(int)
    middle = offset + matrix @ ((np.array(size, np.float64) - 1) / 2)
    reach = np.abs(matrix) @ (np.array(size, np.float64) / 2) + block + 1
    start = np.clip(np.floor(middle - reach), 0, shape - 1).astype(int)
    stop = np.clip(np.ceil(middle + reach) + 1, start + 1, shape).astype(int)
    block = np.minimum(block, stop - start)
    stop = start + (stop - start) // block * block
    region = tuple(slice(first, last) for first, last in zip(start, stop, strict=True))
    part = torch.from_numpy(np.array(image[(slice(None), *region)], np.float32, order="C"))[None]
    if (block > 1).any():
        part = _POOL[len(size)](part, block.tolist())
    # From indices of the image to those of the averaged part, whose voxel 0 has its centre amid the first block.
    matrix = matrix / block[:, None]
    offset = (offset - start - (block - 1) / 2) / block
    # `grid_sample` counts from -1 to 1 between the outer edges and takes the last axis first.
    voxels = np.meshgrid(*(np.arange(length, dtype=np.float32) for length in size), indexing="ij", sparse=True)
    grid = np.empty((1, *size, len(size)), np.float32)
    for axis, length in enumerate(part.shape[2:]):
        steps = zip(matrix[axis], voxels, strict=True)
        place = sum((float(step) * voxel for step, voxel in steps), float(offset[axis]))
        grid[..., -1 - axis] = (2 * place + 1) / length - 1
    return functional.grid_sample(
        part, torch.from_numpy(grid), mode="bilinear", padding_mode="border", align_corners=False
    )[0]
