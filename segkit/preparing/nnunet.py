"""Preparation of a case as nnU-Net 2 does it, equal in every bit.

nnU-Net's arrays have the axes z, y, x of the file, then `transpose_forward`. Sums of float32 depend on the order of
memory: nnU-Net takes mean and deviation over a cropped, transposed view of the whole array, and so does this module.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, TypeAlias

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage

from segkit.config import Config
from segkit.errors import DataError
from segkit.metrics.overlap import box_of
from segkit.preparing.preprocessing import LoadedCase, Preparation, PreparedCase
from segkit.preparing.resampling import nearest_neighbours
from segkit.reading.files import suffix_of
from segkit.reading.geometry import reorientation_to
from segkit.reading.itk import ITK_SUFFIXES, image_spacing
from segkit.reading.nifti import NIFTI_SUFFIXES
from segkit.reading.volume import Grid
from segkit.shapes import AnyArray, Image, LabelMap

Floats: TypeAlias = NDArray[np.floating[Any]]

_SMALLEST = 1e-8
"""Least divisor of a normalisation."""
_PICTURE_MM = (999.0, 1.0, 1.0)
"""Spacing of pictures in nnU-Net, whose first axis has one voxel."""
_UNIT_BITS, _MILLIMETRES = 7, (0, 2)
"""Of the units code of NIfTI; 0, unknown, is taken for mm."""
_BRIGHTEST = 255.0
_MOST_VOXELS = 2**31
_SLAB_BYTES = 2**26
_SPLINE_PAD = 12
"""Voxels by which scipy extends an array at every face before a spline filter."""


class ResamplingConfig(Config):
    """One `resampling_fn` of the plans with its arguments."""

    function: Literal["resample_data_or_seg_to_shape", "resample_torch_fornnunet", "no_resampling_hack"]
    order: int = Field(default=3, ge=0, le=5)
    force_separate_z: bool | None = None
    separate_z_anisotropy_threshold: float = 3.0

    def coarse_axis(self, old_mm: Sequence[float], new_mm: Sequence[float]) -> int | None:
        """The axis whose slices are resampled one by one; None: all axes are resampled together."""
        chosen = None
        for spacing_mm in (old_mm, new_mm):
            is_coarse = max(spacing_mm) / min(spacing_mm) > self.separate_z_anisotropy_threshold
            if chosen is None and (is_coarse if self.force_separate_z is None else self.force_separate_z):
                chosen = [axis for axis, mm in enumerate(spacing_mm) if max(spacing_mm) / mm == 1]
        return chosen[0] if chosen is not None and len(chosen) == 1 else None


class NnUnetConfig(Config):
    """How nnU-Net prepares a case; names are those of its plans, axes are those after `transpose_forward`."""

    reader: str
    transpose_forward: tuple[int, ...]
    normalization_schemes: tuple[str, ...]
    use_mask_for_norm: tuple[bool, ...]
    intensities: tuple[tuple[float, float, float, float], ...] = ()
    """Mean, standard deviation, 0.5 and 99.5 percentile of the foreground of each channel, for CTNormalization."""
    data: ResamplingConfig
    seg: ResamplingConfig
    probabilities: ResamplingConfig
    previous_stage: str | None = None
    """The configuration whose masks are further channels."""
    previous_labels: tuple[int, ...] = ()
    """The label values of these channels."""


def prepare_as_nnunet(
    loaded: LoadedCase,
    config: NnUnetConfig,
    orientation: str,
    target_mm: Sequence[float],
    previous: LabelMap | None = None,
    *,
    in_slabs: bool = False,
) -> PreparedCase:
    """Transpose, crop, normalise and resample one case; `previous` is the mask (*source) of the previous stage.

    `orientation` and `target_mm` (of 2 values for networks of slices) are those of the model card. `in_slabs` resamples
    with less memory (see `resample_in_slabs`).

    Raises:
        DataError: all voxels are 0, resampling would give more than 2 ** 31 voxels, or colours are not from 0 to 255.
    """
    grid, is_picture = loaded.grid, loaded.grid.dims == 2
    image = _transposed(loaded.image, grid, config, orientation)
    if np.may_share_memory(image, loaded.image):
        image = image.copy()
    inside = ndimage.binary_fill_holes(np.any(image != 0, 0))
    box = box_of(inside)
    if box is None:
        raise DataError("all voxels are 0", where=grid.source or loaded.id, expected="an image")
    inside, cropped = inside[box], image[(slice(None), *box)]
    seg = None if previous is None else _transposed(previous[None], grid, config, orientation)[0][box].astype(np.int16)
    if seg is not None:
        seg[(seg == 0) & ~inside] = -1
        inside = seg >= 0
    for channel, plane in enumerate(cropped):
        _normalise(plane, channel, config, inside)
    old_mm = axis_spacing(grid, orientation, config.reader)
    new_mm = old_mm[: 3 - len(target_mm)] + tuple(target_mm)
    shape = nnunet_shape(cropped.shape[1:], old_mm, new_mm)
    if not 0 < prod(shape) <= _MOST_VOXELS:
        found, remedy = f"resampling gives {shape} voxels", "Check the spacing in the header"
        raise DataError(found, where=grid.source or loaded.id, expected="a usual spacing", remedy=remedy)
    data = _resample(cropped, shape, config.data, config.data.coarse_axis(old_mm, new_mm), in_slabs=in_slabs)
    if seg is not None:
        seg = _resample_labels(seg, data.shape[1:], config.seg, config.seg.coarse_axis(old_mm, new_mm))
        data = np.concatenate([data, [seg == value for value in config.previous_labels]], dtype=np.float32)
    nearest = config.probabilities.coarse_axis(new_mm, old_mm)
    start, stop = (tuple(int(getattr(side, end)) for side in box) for end in ("start", "stop"))
    if is_picture:
        data, start, stop, nearest = data[:, 0], start[1:], stop[1:], None
    preparation = Preparation(
        grid,
        reorientation_to(grid, orientation),
        (start, stop),
        data.shape[1:],
        new_mm[-grid.dims :],
        nearest_axis=nearest,
        rounds_to_half=config.probabilities.function != "resample_torch_fornnunet",
    )
    return PreparedCase(loaded.id, np.ascontiguousarray(data, np.float32), None, preparation)


def nnunet_shape(shape: Sequence[int], old_mm: Sequence[float], new_mm: Sequence[float]) -> tuple[int, ...]:
    """Voxels per axis after resampling, rounded as nnU-Net does, half to even."""
    return tuple(round(old / new * size) for size, old, new in zip(shape, old_mm, new_mm, strict=True))


def axis_spacing(grid: Grid, orientation: str, reader: str) -> tuple[float, ...]:
    """Voxel spacing in mm of nnU-Net's three axes as its reader takes it from the header, pixdim in a NIfTI file.

    Norms of the affine differ at least in the last bits, which can change a rounded shape; nibabel computes pixdim from
    them when it reorients.
    """
    if grid.dims == 2:
        return _PICTURE_MM
    stated: Sequence[float] = grid.spacing_mm
    if grid.source is not None and grid.source.is_file():
        if suffix_of(grid.source) in NIFTI_SUFFIXES:
            pixdim = nib.load(grid.source).header.get_zooms()[:3]
            stated = pixdim if min(pixdim) > 0 and grid.xyzt_units & _UNIT_BITS in _MILLIMETRES else stated
        elif suffix_of(grid.source) in ITK_SUFFIXES:
            stated = image_spacing(grid.source)
    if reader == "NibabelIOWithReorient" and grid.orientation != "RAS":
        stated = [float(np.float32(mm)) for mm in grid.spacing_mm]
    stated = [float(mm) for mm in stated]
    if len(stated) == 2:  # a file of two axes
        stated.append(_PICTURE_MM[0] * max(stated))
    return tuple(stated[axis] for axis in reorientation_to(grid, orientation).axes)


def _transposed(image: AnyArray, grid: Grid, config: NnUnetConfig, orientation: str) -> AnyArray:
    """(C, *source) as nnU-Net's array: contiguous in the axes of its reader, seen through `transpose_forward`."""
    if grid.dims == 2:
        return image[:, None]
    read = "".join(orientation[config.transpose_forward.index(axis)] for axis in range(3))
    turn = reorientation_to(grid, read)
    if config.reader == "NibabelIOWithReorient":  # voxels stay in the order of the file: only their axes are exchanged
        flipped = tuple(3 - axis for axis, is_flipped in zip(turn.axes, turn.flips, strict=True) if is_flipped)
        stored = np.ascontiguousarray(np.flip(image.transpose(0, 3, 2, 1), flipped))
        turned = stored.transpose(0, *(3 - axis for axis in turn.axes))
    else:
        turned = turn.apply(image)
    return turned.transpose(0, *(1 + axis for axis in config.transpose_forward))


def _normalise(plane: NDArray[np.float32], channel: int, config: NnUnetConfig, inside: NDArray[np.bool_]) -> None:
    """Normalise one channel (*cropped) in place; statistics over the mask (*cropped) where the plans say so."""
    scheme = config.normalization_schemes[channel]
    if scheme == "CTNormalization":
        mean, std, low, high = config.intensities[channel]
        np.clip(plane, low, high, out=plane)
        plane -= mean
        plane /= max(std, _SMALLEST)
    elif scheme == "RescaleTo01Normalization":
        plane -= plane.min()
        plane /= max(plane.max(), _SMALLEST)
    elif scheme == "RGBTo01Normalization":
        if plane.min() < 0 or plane.max() > _BRIGHTEST:
            found = f"the values of channel {channel} are {plane.min():g} to {plane.max():g}"
            raise DataError(found, expected="colours from 0 to 255", remedy="Save the picture with 8 bits per colour")
        plane /= _BRIGHTEST
    elif scheme == "ZScoreNormalization" and config.use_mask_for_norm[channel]:
        values = plane[inside]
        plane[inside] = (values - values.mean()) / max(values.std(), _SMALLEST)
    elif scheme == "ZScoreNormalization":
        mean, std = plane.mean(), plane.std()
        plane -= mean
        plane /= max(std, _SMALLEST)


def _resample(
    image: Image, shape: tuple[int, ...], config: ResamplingConfig, axis: int | None, *, in_slabs: bool
) -> Image:
    """(C, *cropped) float32 resampled to (C, *shape), slice by slice along `axis`."""
    if image.shape[1:] == shape or config.function == "no_resampling_hack":
        return image
    if config.function == "resample_torch_fornnunet":
        return _resample_by_torch(image, shape, axis)
    result = np.empty((len(image), *shape), np.float32)
    for source, target in zip(image, result, strict=True):
        if in_slabs and axis is None and config.order > 1:
            resample_in_slabs(source, target, config.order)
        else:
            _zoom(source, target, config.order, axis)
    return result


def _zoom(plane: Floats, target: Floats, order: int, axis: int | None) -> None:
    """Spline resampling, clipped to the range of the input: `skimage.transform.resize` with mode edge.

    With `axis`, each slice by itself, then the nearest slices. scipy computes in float64, whatever it reads and writes.
    """
    if axis is None:
        factors = [1 / (old / new) for old, new in zip(plane.shape, target.shape, strict=True)]
        ndimage.zoom(plane, factors, output=target, order=order, mode="nearest", grid_mode=True)
        np.clip(target, plane.min(), plane.max(), out=target)
        return
    slices, targets = np.moveaxis(plane, axis, 0), np.moveaxis(target, axis, 0)
    nearest = nearest_neighbours(len(slices), len(targets), np.float64).lower
    for index, place in enumerate(nearest):
        if index and place == nearest[index - 1]:
            targets[index] = targets[index - 1]
        else:
            _zoom(slices[place], targets[index], order, None)


def resampling_bytes(old: Sequence[int], config: ResamplingConfig, axis: int | None, *, in_slabs: bool) -> int:
    """Memory of the copies that resampling of one channel (*old) makes, slice by slice along `axis`."""
    if config.function != "resample_data_or_seg_to_shape" or config.order < 2:
        return 0
    if in_slabs or axis is not None:
        return 2 * _SLAB_BYTES
    return (4 + 8) * prod(length + 2 * _SPLINE_PAD for length in old)


def resample_in_slabs(plane: Floats, target: Floats, order: int) -> None:
    """Spline resampling without copies of the whole: `target` (*new) has the values of `_zoom` but for rounding.

    scipy needs copies in float32 and float64 of the whole, extended at every face. A spline is a product of one linear
    map per axis: each can be a matrix, and a slab along the last axis needs no others.
    """
    first, second, last = (
        np.stack([_zoomed_line(line, new, order) for line in np.eye(old)], 1)
        for old, new in zip(plane.shape, target.shape, strict=True)
    )
    lines = plane.shape[0] * max(plane.shape[1], target.shape[1]) + target.shape[0] * target.shape[1]
    step = max(1, _SLAB_BYTES // (3 * 8 * lines))
    for start in range(0, target.shape[2], step):
        columns = last[start : start + step].T
        slab = np.stack([second @ (one @ columns) for one in plane])  # (old, new, step), float64
        target[..., start : start + step] = np.tensordot(first, slab, 1)
    np.clip(target, plane.min(), plane.max(), out=target)


def _zoomed_line(line: Floats, size: int, order: int) -> Floats:
    zoomed: Floats = ndimage.zoom(line, 1 / (len(line) / size), order=order, mode="nearest", grid_mode=True)
    return zoomed


def _resample_by_torch(image: Image, shape: tuple[int, ...], axis: int | None) -> Image:
    import torch
    from torch.nn.functional import interpolate

    data = torch.from_numpy(np.ascontiguousarray(image))
    if axis is None:
        return np.asarray(interpolate(data[None], shape, mode="trilinear")[0])
    across = shape[:axis] + shape[axis + 1 :]
    slices = data.movedim(axis + 1, 1).flatten(0, 1)[None]  # (1, C * slices, *across)
    moved = interpolate(slices, across, mode="bilinear")[0].reshape(len(image), -1, *across)
    return np.asarray(interpolate(moved.movedim(1, axis + 1)[None], shape, mode="nearest-exact")[0])


def _resample_labels(
    labels: NDArray[np.int16], shape: tuple[int, ...], config: ResamplingConfig, axis: int | None
) -> NDArray[np.int16]:
    """Each value's mask is resampled linearly and the largest wins.

    On a tie it is the value of the nearest voxel, in torch, whose shares are in half precision, the lowest.
    """
    if labels.shape == shape:
        return labels
    is_torch = config.function == "resample_torch_fornnunet"
    best, winner = np.full(shape, -1, np.float64), np.zeros(shape, np.int16)
    nearest, of_nearest = np.zeros(shape), np.full(shape, -2, np.float64)
    if not is_torch:
        _zoom(labels.astype(np.float64), nearest, 0, axis)
    for value in np.unique(labels):
        mask, share = labels == value, np.empty(shape)
        if is_torch:
            share[...] = _resample_by_torch(mask[None] * np.float32(1000), shape, axis)[0].astype(np.float16)
        else:
            _zoom(mask.astype(np.float64), share, 1, axis)
            np.copyto(of_nearest, share, where=nearest == value)
        np.copyto(winner, value, where=share > best)
        np.maximum(best, share, out=best)
    return np.where(of_nearest == best, nearest, winner).astype(np.int16)
