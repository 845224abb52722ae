"""Images in memory, of nibabel, SimpleITK, MONAI, numpy and torch, as channels and a grid.

They are recognised by the names of their classes, so that none of these libraries is imported because of this module.
"""

import os
from pathlib import Path
from typing import Any, TypeAlias

import nibabel as nib
import numpy as np

from segkit.errors import DataError
from segkit.reading.files import read_volume
from segkit.reading.itk import LPS_TO_RAS, affine_from_itk, channels_of
from segkit.reading.nifti import nifti_grid, scaled
from segkit.reading.volume import Grid, as_data_errors, is_usable, plain_numbers, short_reason
from segkit.shapes import Affine, AnyArray

ARRAY = "array"
"""The kind of an image without an affine of its own."""

PATH = "path"

_KINDS = {
    "segkit.Volume": "volume",
    "nibabel.SpatialImage": "nibabel",
    "SimpleITK.Image": "SimpleITK",
    "monai.MetaTensor": "MetaTensor",
    "torch.Tensor": ARRAY,
    "numpy.ndarray": ARRAY,
}
"""Kind by package and class; the first one that fits, for a MetaTensor is also a torch tensor."""

_Planes: TypeAlias = tuple[AnyArray, Grid]


def kind_of(item: object) -> str:
    """`PATH`, `ARRAY` (also for a pair of array and affine), the kind of another image, or "" for anything else."""
    if isinstance(item, (str, os.PathLike)):
        return PATH
    if isinstance(item, tuple) and len(item) == 2:
        return ARRAY if kind_of(item[0]) == ARRAY else ""
    names = {f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(item).__mro__}
    return next((kind for name, kind in _KINDS.items() if name in names), "")


def read_channels(item: Any, affine: Any, dims: int, where: str) -> tuple[AnyArray, Grid]:
    """The channels (C, *spatial) of an image or path and their grid; `inference.scans.read_scan` lists the kinds.

    `affine` (4, 4) is that of an array that is not in a pair with its own; pictures (`dims` 2) need none. `where` names
    the image in errors. Raises DataError.
    """
    kind = kind_of(item)
    if kind == PATH:
        volume = read_volume(Path(item))
        return volume.array[None], volume.grid
    if kind == ARRAY:
        array, own = item if isinstance(item, tuple) else (item, None)
        return _array_channels(array, affine if own is None else own, dims, where)
    if kind == "MetaTensor":
        return _meta_tensor_channels(item, dims, where)
    if kind == "nibabel":
        return _nibabel_channels(item, where)
    if kind == "SimpleITK":
        return _sitk_channels(item, dims, where)
    if kind == "volume":
        if item.array.shape != item.grid.shape:
            raise DataError(f"its array has the shape {item.array.shape}, its grid {item.grid.shape}", where=where)
        return plain_numbers(np.asarray(item.array), where)[None], item.grid
    raise DataError(
        f"cannot be read from an object of type {type(item).__name__}",
        where=where,
        expected="a path, a nibabel or SimpleITK image, a MetaTensor, a segkit Volume, or a numpy or torch array",
        remedy="Pass an array with affine=..., or a dict of images by modality name",
    )


def _array_channels(array: Any, affine: Any, dims: int, where: str) -> _Planes:
    try:
        numbers = plain_numbers(_as_numpy(array), where)
    except (TypeError, RuntimeError) as error:
        raise DataError(f"its voxels cannot be read: {short_reason(error)}", where=where) from error
    if numbers.ndim not in (dims, dims + 1) or not numbers.size:
        expected = {2: "a picture, (H, W) or (C, H, W)", 3: "a volume, (D, H, W) or (C, D, H, W)"}
        raise DataError(
            f"is an array of {numbers.ndim} axes ({' x '.join(map(str, numbers.shape))})",
            where=where,
            expected=f"{expected[dims]}, as this model was trained on",
            remedy="Pass one whole image, or choose another model",
        )
    planes = numbers if numbers.ndim > dims else numbers[None]
    if dims == 2:
        return planes, Grid(planes.shape[1:], np.eye(4))
    # Rounded as in a NIfTI file: of axes at 45 degrees the last digit decides which way they are turned.
    rounded = _checked_affine(affine, where).astype(np.float32).astype(np.float64)
    return planes, Grid(planes.shape[1:], rounded)


def _as_numpy(array: Any) -> AnyArray:
    """A torch tensor of any device, or anything that numpy takes, as an array."""
    if not hasattr(array, "detach"):
        return np.asarray(array)
    tensor = array.detach().cpu()
    numbers: AnyArray = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
    return numbers


def _checked_affine(affine: Any, where: str) -> Affine:
    expected = "the affine (4, 4) from voxel indices to millimetres in RAS+ world space"
    if affine is None:
        remedy = "Pass affine=..., or the pair (array, affine)"
        raise DataError("is an array without an affine", where=where, expected=expected, remedy=remedy)
    try:
        matrix = np.array(_as_numpy(affine), np.float64)
    except (TypeError, ValueError, RuntimeError):
        matrix = np.zeros(0)
    if matrix.shape != (4, 4) or not np.allclose(matrix[3], [0, 0, 0, 1]) or not is_usable(matrix):
        found = f"has an affine that cannot be used ({' '.join(str(affine).split())[:200]})"
        remedy = "Its last row is 0 0 0 1, and no axis has length 0"
        raise DataError(found, where=where, expected=expected, remedy=remedy)
    return matrix


def _meta_tensor_channels(tensor: Any, dims: int, where: str) -> _Planes:
    if tensor.pending_operations:
        remedy = "Apply them first, with `monai.transforms.lazy.functional.apply_pending`"
        raise DataError("has transforms that were not applied yet", where=where, remedy=remedy)
    affine = _as_numpy(tensor.affine)
    if str(tensor.meta.get("space", "")) in ("LPS", "left-posterior-superior") and affine.shape == (4, 4):
        affine = LPS_TO_RAS @ affine
    return _array_channels(tensor, affine, dims, where)


def _nibabel_channels(image: Any, where: str) -> _Planes:
    shape, data = image.shape, image.dataobj
    if len(shape) < 2 or sum(length > 1 for length in shape[3:]) > 1:
        raise DataError(f"is an image of {len(shape)} axes", where=where, expected="3 axes, or 4 with channels")
    spatial = (*shape[:3], 1)[:3]
    file = Path(image.get_filename() or where)
    with as_data_errors(file):
        if isinstance(data, nib.arrayproxy.ArrayProxy):  # as `nifti` reads the file: scaled in float32
            array = scaled(plain_numbers(data.get_unscaled(), where), float(data.slope), float(data.inter))
        else:
            array = plain_numbers(np.asarray(data), where)
        is_nifti = hasattr(image.header, "get_sform")
        grid = (
            nifti_grid(file, image.header, spatial) if is_nifti else Grid(spatial, _checked_affine(image.affine, where))
        )
    return np.moveaxis(array.reshape(*spatial, -1), -1, 0), grid


def _sitk_channels(image: Any, dims: int, where: str) -> _Planes:
    import SimpleITK

    shape, components = image.GetSize(), image.GetNumberOfComponentsPerPixel()
    try:
        voxels = SimpleITK.GetArrayFromImage(image)
    except (TypeError, RuntimeError) as error:
        raise DataError(f"its voxels cannot be read: {short_reason(error)}", where=where) from error
    if len(shape) == 2:  # rows and columns, as in a picture
        return _array_channels(voxels if components == 1 else np.moveaxis(voxels, -1, 0), None, dims, where)
    if len(shape) > 4 or (len(shape) == 4 and components > 1):
        found = f"is an image of {len(shape)} axes with {components} values per voxel"
        raise DataError(found, where=where, expected="3 axes, or 4 with channels")
    affine = affine_from_itk(image.GetOrigin(), image.GetSpacing(), image.GetDirection())
    return channels_of(plain_numbers(voxels, where), shape[:3], components), Grid(shape[:3], affine)
