"""NRRD and MetaImage files through SimpleITK, with ITK's LPS world turned into the RAS world of our affines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from segkit.data.headers import (
    ImageHeader,
    explained,
    is_usable,
    pick_channel,
    plain_numbers,
    refuse_implausible,
    require_file,
)
from segkit.data.volume import Grid
from segkit.errors import DataError
from segkit.shapes import Affine, AnyArray

ITK_SUFFIXES = (".nrrd", ".mha", ".mhd")

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""ITK's world grows to the patient's Left and Posterior, NIfTI's to the Right and Anterior; up is up in both."""


def open_itk(path: Path) -> ImageHeader:
    """The header of an NRRD or MetaImage file; components of a voxel or a fourth axis are its channels."""
    import SimpleITK

    size = require_file(path)
    with explained(path):
        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        shape = reader.GetSize()
        components = reader.GetNumberOfComponents()
        refuse_implausible(
            path,
            (*shape, components),
            bytes_per_voxel=_bytes_per_voxel(reader.GetPixelID()),
            stored_bytes=_stored_bytes(path, size),
            is_compressed=True,  # or not: the header says so only in the format's own words
        )
        affine = affine_from_itk(reader.GetOrigin(), reader.GetSpacing(), reader.GetDirection())
        if len(shape) > 4 or (len(shape) == 4 and shape[3] > 1 < components) or not is_usable(affine):
            raise DataError(f"the image has axes {shape} and {components} values per voxel", where=path)
    spatial = (*shape[:3], 1)[:3]
    channels = components * (shape[3] if len(shape) == 4 else 1)

    def read(channel: int | None) -> AnyArray:
        picked = pick_channel(path, channels, channel)
        with explained(path):
            voxels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
        # ITK gives ([time,] z, y, x [, component]), so that the transpose is ([component,] x, y, z [, time]).
        planes = voxels.T.reshape(components, *spatial, -1, order="F")  # (component, D, H, W, time)
        component, time = (picked, 0) if components > 1 else (0, picked)
        return plain_numbers(planes[component, ..., time], path)

    return ImageHeader(Grid(spatial, affine, source=path), channels, read)


def save_itk(path: Path, array: AnyArray, grid: Grid) -> None:
    """Writes (D, H, W); ITK knows no shears, so that a sheared affine is an error."""
    import SimpleITK

    to_lps = LPS_TO_RAS @ grid.affine
    spacing = np.linalg.norm(to_lps[:3, :3], axis=0)
    direction = to_lps[:3, :3] / spacing
    if not np.allclose(direction.T @ direction, np.eye(3), atol=1e-4):
        raise DataError("its axes are not at right angles", where=path, remedy="Write it as .nii.gz")
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(to_lps[:3, 3].tolist())
    image.SetDirection(direction.ravel().tolist())
    SimpleITK.WriteImage(image, str(path), useCompression=True)


def affine_from_itk(origin: Sequence[float], spacing: Sequence[float], direction: Sequence[float]) -> Affine:
    """The RAS affine (4, 4) of ITK's origin (n), spacing (n) and row-major direction (n x n), for 2, 3 or 4 axes."""
    axes = len(origin)
    used = min(axes, 3)
    affine = np.eye(4)
    affine[:used, :used] = (np.reshape(direction, (axes, axes)) * spacing)[:used, :used]
    affine[:used, 3] = origin[:used]
    return LPS_TO_RAS @ affine


def _bytes_per_voxel(pixel_id: int) -> int:
    import SimpleITK

    return int(SimpleITK.Image(1, 1, 1, pixel_id).GetSizeOfPixelComponent())


def _stored_bytes(path: Path, size: int) -> int:
    """The bytes that hold the voxels: for .mhd those of the file that its last line names."""
    if path.suffix.lower() != ".mhd":
        return size
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    named = next((line.partition("=")[2].strip() for line in lines if line.startswith("ElementDataFile")), "LOCAL")
    if named == "LOCAL":
        return size
    data = path.parent / named
    if not data.is_file():
        raise DataError(
            f"its voxels should lie beside it in {named!r}, which is missing",
            where=path,
            remedy="Copy the .mhd file together with its data file",
        )
    return data.stat().st_size
