"""NRRD and MetaImage files through SimpleITK, with ITK's LPS world turned into the RAS world of segkit's affines.

Both formats may name another file that holds the voxels. Of these only a .mhd with one file beside it is read:
otherwise a file from elsewhere could show the content of any file on this machine.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segkit.errors import DataError, on_one_line
from segkit.reading.case import is_file_name
from segkit.reading.geometry import format_size
from segkit.reading.volume import (
    Grid,
    ImageHeader,
    as_data_errors,
    damaged,
    is_usable,
    pick_channel,
    plain_numbers,
    refuse_implausible,
    require_file,
)
from segkit.shapes import Affine, AnyArray

ITK_SUFFIXES = (".nrrd", ".mha", ".mhd")

_IMAGE_IO = {".nrrd": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
_LONGEST_HEADER_BYTES = 1 << 20
_NRRD_POINTER = re.compile(rb"^\s*data[ \t]*file[ \t]*:(?!=)", re.IGNORECASE | re.MULTILINE)
_META_AXES = re.compile(rb"^\s*NDims\s*[=:][ \t]*([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
_META_POINTER = re.compile(rb"^\s*ElementDataFile\s*[=:][ \t]*([^\r\n]*)", re.IGNORECASE | re.MULTILINE)

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""ITK's world grows to the patient's Left and Posterior, NIfTI's to the Right and Anterior; up is up in both."""


def open_itk(path: Path) -> ImageHeader:
    """The header of an NRRD or MetaImage file; components of a voxel or a fourth axis are its channels.

    The layers of a segmentation of 3D Slicer, which has several where segments overlap, are joined to one label map.
    """
    import SimpleITK

    require_file(path)
    with as_data_errors(path):
        stored_bytes = voxel_file(path).stat().st_size
        reader = image_reader(path, _IMAGE_IO[path.suffix.lower()])
        reader.ReadImageInformation()
        shape = reader.GetSize()
        components = reader.GetNumberOfComponents()
        refuse_implausible(
            path,
            (*shape, components),
            bytes_per_voxel=int(SimpleITK.Image(1, 1, 1, reader.GetPixelID()).GetSizeOfPixelComponent()),
            stored_bytes=stored_bytes,
            is_compressed=True,  # or not: only the format's own keys say so
        )
        affine = affine_from_itk(reader.GetOrigin(), reader.GetSpacing(), reader.GetDirection())
        if not is_usable(affine):
            found = f"the header gives voxels of {format_size(reader.GetSpacing()[:3])}, or axes that are parallel"
            raise DataError(found, where=path, expected="a voxel size in mm", remedy="Export the image again")
        if len(shape) > 4 or (len(shape) == 4 and shape[3] > 1 < components):
            raise DataError(f"the image has axes {shape} and {components} values per voxel", where=path)
        segments = _segments(reader) if len(shape) == 3 and components > 1 else {}
    spatial = (*shape[:3], 1)[:3]
    channels = components * (shape[3] if len(shape) == 4 else 1)
    segments = _segments(reader) if len(shape) == 3 and components > 1 else {}
    listed = ", ".join(f"{value} {name}" for value, (_, _, name) in segments.items())
    notes = (
        (f"the layers of the segmentation are joined, later segments over earlier ones: {listed}",) if segments else ()
    )

    def read(channel: int | None) -> AnyArray:
        if segments:
            with as_data_errors(path):
                layers = SimpleITK.GetArrayFromImage(image_reader(path, _IMAGE_IO[".nrrd"]).Execute()).T
            joined = np.zeros(spatial, np.uint8 if max(segments) <= 255 else np.uint16)
            for value, (layer, stored, _) in segments.items():
                joined[layers[layer] == stored] = value
            return joined
        picked = pick_channel(path, channels, channel)
        with as_data_errors(path):
            voxels = SimpleITK.GetArrayFromImage(image_reader(path, _IMAGE_IO[path.suffix.lower()]).Execute())
        return plain_numbers(channels_of(voxels, spatial, components)[picked], path)

    return ImageHeader(Grid(spatial, affine, source=path, notes=notes), 1 if segments else channels, read)


def _segments(reader: Any) -> dict[int, tuple[int, int, str]]:
    """Label -> layer, stored value and name of each segment, in the order of 3D Slicer; empty for other files.

    The labels are the stored values, or 1, 2, 3 ... where two layers use the same value.
    """
    found: list[tuple[int, int, str]] = []
    keys = [f"Segment0_{name}" for name in ("Layer", "LabelValue", "Name")]
    while all(reader.HasMetaDataKey(key) for key in keys):
        layer, value, name = (reader.GetMetaData(key) for key in keys)
        found.append((int(layer), int(value), on_one_line(name)))
        keys = [f"Segment{len(found)}_{key.partition('_')[2]}" for key in keys]
    values = [value for _, value, _ in found]
    labels = values if len(set(values)) == len(values) else range(1, len(values) + 1)
    return dict(zip(labels, found, strict=True))


def channels_of(voxels: AnyArray, spatial: tuple[int, ...], components: int) -> AnyArray:
    """(C, *spatial) of an array of ITK, ([time,] z, y, x [, component]): components or points in time are channels."""
    # The transpose is ([component,] x, y, z [, time]).
    planes = voxels.T.reshape(components, *spatial, -1, order="F")
    return planes[..., 0] if components > 1 else np.moveaxis(planes[0], -1, 0)


def save_itk(path: Path, array: AnyArray, grid: Grid) -> None:
    """Write (D, H, W); DataError for a sheared affine, which ITK cannot hold."""
    import SimpleITK

    SimpleITK.WriteImage(itk_image(array, grid, path), str(path), useCompression=True)


def itk_image(array: AnyArray, grid: Grid, where: Path | str | None = None) -> Any:
    """(D, H, W) as a SimpleITK image, in LPS; DataError for a sheared affine, which ITK cannot hold."""
    import SimpleITK

    to_lps = LPS_TO_RAS @ grid.affine
    spacing = np.linalg.norm(to_lps[:3, :3], axis=0)
    direction = to_lps[:3, :3] / spacing
    if not np.allclose(direction.T @ direction, np.eye(3), atol=1e-4):
        raise DataError("its axes are not at right angles", where=where, remedy="Write it as .nii.gz")
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(to_lps[:3, 3].tolist())
    image.SetDirection(direction.ravel().tolist())
    return image


def image_reader(path: Path, image_io: str) -> Any:
    """A SimpleITK reader of the named format alone, whatever the content of the file looks like."""
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO(image_io)
    reader.SetFileName(str(path))
    return reader


def image_spacing(path: Path) -> tuple[float, ...]:
    """The voxel spacing in mm of a NRRD or MetaImage file that `open_itk` accepts, as its header states it."""
    reader = image_reader(path, _IMAGE_IO[path.suffix.lower()])
    reader.ReadImageInformation()
    return tuple(reader.GetSpacing()[:3])


def affine_from_itk(origin: Sequence[float], spacing: Sequence[float], direction: Sequence[float]) -> Affine:
    """The RAS affine (4, 4) of ITK's origin (n), spacing (n) and row-major direction (n x n), for 2, 3 or 4 axes."""
    axes = len(origin)
    used = min(axes, 3)
    affine = np.eye(4)
    affine[:used, :used] = (np.reshape(direction, (axes, axes)) * spacing)[:used, :used]
    affine[:used, 3] = origin[:used]
    return LPS_TO_RAS @ affine


def voxel_file(path: Path) -> Path:
    """The file that holds the voxels: the file itself, or the one beside it that a .mhd names. Raises DataError."""
    with path.open("rb") as stream:
        header = stream.read(_LONGEST_HEADER_BYTES)
    expected = "voxels in the file itself, or of a .mhd in one file beside it"
    if path.suffix.lower() == ".nrrd":
        if not header.startswith(b"NRRD"):
            raise damaged(path, "the file does not begin like an NRRD file")
        end = re.search(rb"\r?\n\r?\n", header)
        if _NRRD_POINTER.search(header[: end.start() if end else None]):
            raise DataError("its header says that the voxels lie in another file", where=path, expected=expected)
        return path
    pointer = _META_POINTER.search(header)
    if pointer is None:
        raise damaged(path, "the file does not begin like a MetaImage")
    axes = [match[1].strip() for match in _META_AXES.finditer(header[: pointer.start()])]
    if len(axes) != 1 or axes[0] not in (b"2", b"3", b"4"):  # the library crashes on more than ten
        raise DataError("the header does not give the number of axes", where=path, expected="NDims = 3")
    named = pointer[1].decode("utf-8", "replace").strip()
    if named.upper() == "LOCAL":
        return path
    if path.suffix.lower() == ".mha" or not is_file_name(named) or "%" in named or named.upper().startswith("LIST"):
        raise DataError(f"its header says that the voxels lie in {named!r}", where=path, expected=expected)
    data = path.parent / named
    if not data.is_file():
        remedy = "Copy the .mhd file together with its data file"
        raise DataError(f"its voxels should lie beside it in {named!r}, which is missing", where=path, remedy=remedy)
    return data
