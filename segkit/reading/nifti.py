"""NIfTI-1, NIfTI-2 and FreeSurfer MGH files through nibabel's headers.

The voxels are read here and not by nibabel's proxies for three reasons: a gzip stream is read to its end, which
verifies its checksum; one channel of a 4D file needs the memory of one channel; scaling is done plane by plane, in
float64 as elsewhere, and gives float32.
"""

import gzip
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from segkit.errors import DataError
from segkit.reading.geometry import format_size
from segkit.reading.volume import (
    Grid,
    ImageHeader,
    as_data_errors,
    damaged,
    in_type,
    is_usable,
    pick_channel,
    plain_numbers,
    refuse_implausible,
    require_file,
)
from segkit.shapes import Affine, AnyArray

NIFTI_SUFFIXES = (".nii.gz", ".nii")
MGH_SUFFIXES = (".mgz", ".mgh")

_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 24
_MOST_BYTES_AROUND = 1 << 26
"""Before and behind the voxels: header extensions hold a few MB at most, and gzip packs gigabytes into one."""
_FROM_DICOM = "Convert the scan again from its DICOM files, or restore the header from another file of its case"
_LARGEST_DRIFT = 1e-3
"""Accepted difference between two voxel sizes, as a share: headers hold float32 or a few decimals."""
_FREE_TEXT = ("descrip", "aux_file", "intent_name", "db_name", "data_type", "unused_str")
_LONGEST_QUATERNION = 1.001
"""A unit quaternion that was rounded may be a little longer than 1; nibabel allows single precision and no more."""
_MM_PER_UNIT = {1: 1000.0, 3: 0.001}
"""Spatial unit codes of NIfTI (nifti1.h): 1 metre, 2 millimetre, 3 micrometre; 0, unknown, is taken for mm."""


@dataclass(frozen=True)
class _Storage:
    """Where the voxels of a file lie: `spatial` (D, H, W) in Fortran order, one channel after the other."""

    path: Path
    spatial: tuple[int, ...]
    channels: int
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    is_compressed: bool

    def read(self, channel: int | None) -> AnyArray:
        """One channel, (D, H, W)."""
        return scaled(plain_numbers(self.stored(channel), self.path), self.slope, self.intercept)

    def stored(self, channel: int | None) -> AnyArray:
        """One channel, (D, H, W), in the type and byte order of the file, before the scale factors."""
        picked = pick_channel(self.path, self.channels, channel)
        voxels = np.empty(math.prod(self.spatial), self.dtype)
        with as_data_errors(self.path), _opened(self.path, self.is_compressed) as stream:
            stream.seek(self.offset + picked * voxels.nbytes)
            _fill(stream, voxels.view(np.uint8), self.path)
            _read_to_end(stream, (self.channels - picked - 1) * voxels.nbytes, self.path)
        return voxels.reshape(self.spatial, order="F")


def scaled(array: AnyArray, slope: float, intercept: float) -> AnyArray:
    """Stored values after the scale factors of the header, in float32; the array itself where there are none."""
    if (slope, intercept) == (1.0, 0.0):
        return array
    result = np.empty_like(array, np.float32)
    for source, target in zip(array.T, result.T, strict=True):  # float64 of the whole would take much memory
        target[...] = source * np.float64(slope) + intercept
    return result


def open_nifti(path: Path) -> ImageHeader:
    """The header of a NIfTI file; trailing axes of length 1 dropped, 2D images given a third axis of length 1."""
    header, storage, notes = _read_nifti_header(path)
    step = abs(storage.slope) if storage.dtype.kind in "iu" and storage.slope % 1 else 0.0
    return ImageHeader(nifti_grid(path, header, storage.spatial, notes), storage.channels, storage.read, step)


def open_mgh(path: Path) -> ImageHeader:
    """The header of a FreeSurfer .mgh or .mgz file."""
    require_file(path)
    with as_data_errors(path):
        # nibabel's own reader would first seek past as many voxels as the header claims.
        block, is_compressed = _read_beginning(path, nib.freesurfer.mghformat.header_dtype.itemsize)
        header = nib.freesurfer.mghformat.MGHHeader(block)
        storage = _storage(path, header, is_compressed)
        affine = np.asarray(header.get_best_affine(), np.float64)
        if not is_usable(affine):
            raise _lost_geometry(path)
        return ImageHeader(Grid(storage.spatial, affine, source=path), storage.channels, storage.read)


def nifti_image(array: AnyArray, grid: Grid, slope: float = 1.0) -> nib.Nifti1Image:
    """(D, H, W) or (D, H, W, C), unscaled, in the array's own type, with `slope` and `grid` in the header."""
    header = nib.Nifti1Header()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header["xyzt_units"] = grid.xyzt_units
    to_file_units = np.diag([*(3 * [1.0 / _mm_per_unit(grid.xyzt_units)]), 1.0])
    affine = to_file_units @ grid.affine
    header.set_qform(affine if grid.qform is None else to_file_units @ grid.qform, code=grid.qform_code)
    if grid.sform_code > 0:
        header.set_sform(affine, code=grid.sform_code)
    image = nib.Nifti1Image(array, header.get_best_affine(), header)
    if slope != 1.0:
        image.header.set_slope_inter(slope, 0.0)
    return image


def rewrite_nifti(
    path: Path, source: Path, where: NDArray[np.bool_], values: NDArray[np.floating[Any]], channel: int | None = None
) -> None:
    """Write one channel of a NIfTI file with `values` (n,) at its n voxels `where` (D, H, W), taken in C order.

    Header, type and scale factors are those of the source, without its free text and extensions, which may name the
    patient. Voxels outside `where` keep their stored bits. Integer types round and clip the values.
    """
    header, storage, _ = _read_nifti_header(source)
    voxels = storage.stored(channel)
    voxels[where] = in_type((values.astype(np.float64) - storage.intercept) / storage.slope, voxels.dtype)
    if storage.channels == 1:
        voxels = voxels.reshape(header.get_data_shape(), order="F")  # with its axes of length 1
    header.set_data_offset(0)  # of what nibabel writes
    for name in set(_FREE_TEXT) & set(header.keys()):
        header[name] = b""
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = kind(voxels, None, header)
    if (storage.slope, storage.intercept) != (1.0, 0.0):
        image.header.set_slope_inter(storage.slope, storage.intercept)
    image.to_filename(path)


def save_mgh(path: Path, array: AnyArray, grid: Grid) -> None:
    """Write (D, H, W) as .mgz or .mgh, which knows uint8, int16, int32 and float32."""
    nib.MGHImage(array, grid.affine).to_filename(path)


class _Reports(list[str]):
    """What nibabel corrects in a header, collected in place of its log lines, which do not name the file."""

    def log(self, level: int, message: str) -> None:
        if level >= logging.WARNING:
            self.append(message)


def _read_nifti_header(path: Path) -> tuple[nib.Nifti1Header, _Storage, list[str]]:
    require_file(path)
    with as_data_errors(path):
        block, is_compressed = _read_beginning(path, nib.Nifti2Header.sizeof_hdr)
        sizes = {int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big")}
        for kind in (nib.Nifti1Header, nib.Nifti2Header):
            if kind.sizeof_hdr in sizes and len(block) >= kind.sizeof_hdr:
                header = kind(block[: kind.sizeof_hdr], check=False)
                voxel_size, reports = header["pixdim"][1:4].copy(), _Reports()
                header.check_fix(reports, logging.ERROR)
                storage = _storage(path, header, is_compressed)
                flat = [axis for axis in range(3) if voxel_size[axis] == 0 and storage.spatial[axis] > 1]
                if flat and not (header["sform_code"] > 0 and is_usable(header.get_sform())):
                    found = f"the header gives voxels of {format_size(voxel_size)}, so that distances are unknown"
                    raise DataError(found, where=path, expected="a voxel size in mm", remedy=_FROM_DICOM)
                return header, storage, reports
        raise damaged(path, "the file does not begin like a NIfTI file (with a header of 348 or 540 bytes)")


def _storage(path: Path, header: Any, is_compressed: bool) -> _Storage:
    shape = tuple(int(length) for length in header.get_data_shape())
    dtype, offset = header.get_data_dtype(), int(header.get_data_offset())
    if not 0 <= offset <= _MOST_BYTES_AROUND:
        found = f"the header says that the voxels begin at byte {offset}"
        raise DataError(found, where=path, expected="a few hundred bytes")
    stored = path.stat().st_size - (0 if is_compressed else offset)
    refuse_implausible(path, shape, bytes_per_voxel=dtype.itemsize, stored_bytes=stored, is_compressed=is_compressed)
    if len(shape) < 2:
        raise DataError(f"the image has {len(shape)} axis", where=path, expected="a volume of 3 axes")
    beyond = [length for length in shape[3:] if length > 1]
    if len(beyond) > 1:
        raise DataError(f"the image has {3 + len(beyond)} axes", where=path, expected="3 axes, or 4 with channels")
    slope, intercept = header.get_slope_inter()
    return _Storage(
        path=path,
        spatial=(*shape[:3], 1)[:3],
        channels=math.prod(beyond),
        dtype=dtype,
        offset=offset,
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        is_compressed=is_compressed,
    )


def nifti_grid(path: Path, header: nib.Nifti1Header, spatial: tuple[int, ...], reports: Iterable[str] = ()) -> Grid:
    """The grid in millimetres: by the sform where it is set and usable, else the qform, else the voxel size alone.

    An sform whose columns all have length 1, beside a qform of another voxel size, was written without voxel sizes and
    gives way to the qform, as one that is unusable does. `reports` are earlier notes on the header.
    """
    notes = list(reports)
    units = int(header["xyzt_units"])
    to_mm = np.diag([*(3 * [_mm_per_unit(units)]), 1.0])
    sform_code, qform_code = int(header["sform_code"]), int(header["qform_code"])
    forms = to_mm @ header.get_sform(), to_mm @ _qform(header)
    sform: Affine | None = forms[0] if sform_code > 0 and is_usable(forms[0]) else None
    qform: Affine | None = forms[1] if qform_code > 0 and is_usable(forms[1]) else None
    if sform is not None and qform is None and qform_code > 0:
        notes.append("the qform of the header is unusable; the sform stands for both")
    if qform is not None and sform is None and sform_code > 0:
        notes.append("the sform of the header is unusable; the qform is taken instead")
    lengths, voxel_size = np.linalg.norm(header.get_sform()[:3, :3], axis=0), header["pixdim"][1:4]
    if sform is not None and not np.allclose(lengths, voxel_size, rtol=_LARGEST_DRIFT):
        found = f"the sform gives voxels of {format_size(lengths)} and pixdim of {format_size(voxel_size)}"
        if qform is not None and np.allclose(lengths, 1, rtol=_LARGEST_DRIFT):
            notes.append(f"{found}; it was written without voxel sizes, and the qform is taken instead")
            sform = None
        else:
            notes.append(f"{found}; the sform is taken")
    if sform is not None:
        affine = sform
    elif qform is not None:
        affine, sform_code = qform, 0
    elif sform_code <= 0 and qform_code <= 0 and is_usable(base := to_mm @ header.get_base_affine()):
        affine = base
    else:
        raise _lost_geometry(path)
    if qform is not None and np.allclose(qform, affine, atol=1e-4):
        qform = None
    affine = np.asarray(affine, np.float64)
    return Grid(spatial, affine, sform_code, qform_code, qform, units, source=path, notes=tuple(notes))


def _qform(header: nib.Nifti1Header) -> Affine:
    """The qform (4, 4) in the units of the file, NaN where quaternion or voxel sizes describe none."""
    quaternion = np.array([header[f"quatern_{letter}"] for letter in "bcd"], np.float64)
    length = float(np.linalg.norm(quaternion))
    if 1 < length <= _LONGEST_QUATERNION:
        header = header.copy()
        for letter, value in zip("bcd", quaternion / length, strict=True):
            header[f"quatern_{letter}"] = value
    try:
        return np.asarray(header.get_qform(), np.float64)
    except (ValueError, HeaderDataError):
        return np.full((4, 4), np.nan)


def _lost_geometry(path: Path) -> DataError:
    found = "the header does not say where the voxels lie (its affine is singular or not finite)"
    return DataError(found, where=path, remedy=_FROM_DICOM)


def _mm_per_unit(xyzt_units: int) -> float:
    return _MM_PER_UNIT.get(xyzt_units & 7, 1.0)


def _read_beginning(path: Path, count: int) -> tuple[bytes, bool]:
    """The first `count` bytes, and whether the file is compressed."""
    # By content: compressed `.nii` and uncompressed `.nii.gz` files both exist.
    with path.open("rb") as stream:
        is_compressed = stream.read(2) == _GZIP_MAGIC
    with _opened(path, is_compressed) as stream:
        return stream.read(count), is_compressed


def _opened(path: Path, is_compressed: bool) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path, "rb") if is_compressed else path.open("rb")


def _fill(stream: IO[bytes] | gzip.GzipFile, target: NDArray[np.uint8], path: Path) -> None:
    """Read exactly as many bytes as `target` (n) holds."""
    filled = 0
    while filled < len(target):
        chunk = stream.read(min(_CHUNK_BYTES, len(target) - filled))
        if not chunk:
            raise damaged(path, f"the file is truncated: its voxels end after {filled} of {len(target)} bytes")
        target[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
        filled += len(chunk)


def _read_to_end(stream: IO[bytes] | gzip.GzipFile, expected: int, path: Path) -> None:
    """Read the rest, of which `expected` bytes are voxels: gzip compares the checksum only at the end."""
    left = expected + _MOST_BYTES_AROUND
    while chunk := stream.read(_CHUNK_BYTES):
        left -= len(chunk)
        if left < 0:
            raise damaged(path, f"after its voxels the file unpacks to more than {_MOST_BYTES_AROUND} other bytes")
