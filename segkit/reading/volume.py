"""Volume, Grid, and the shared part of the file readers: headers, their checks, errors and the listing of a folder.

Each reader (`nifti`, `itk`, `dicom`, `pictures`) turns a path into an `ImageHeader`. No memory is allocated before the
header has been checked.
"""

import gzip
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from segkit.errors import DataError, SegkitError
from segkit.shapes import Affine, AnyArray

_log = logging.getLogger(__name__)
MOST_VOXELS = 2**33
"""More voxels than any scanner makes (2048 x 2048 x 2048); a header that claims more is broken."""

_COPY_AGAIN = "Copy the file again from where it came from; it cannot be repaired here"

_FAILURES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str, str], ...] = (
    (FileNotFoundError, "the file does not exist", "Check the name and the folder"),
    (PermissionError, "you have no permission to read it", "Ask its owner for read access, or copy it"),
    ((EOFError, zlib.error, gzip.BadGzipFile), "the file is truncated or damaged ({})", _COPY_AGAIN),
    (MemoryError, "it does not fit into this computer's memory", ""),
    (Exception, "the file cannot be read: {}", _COPY_AGAIN),
)
"""Exceptions with the finding and the remedy to report; the first row that fits counts."""
_BEST_DEFLATE_RATIO = 1100
"""Deflate packs at most 1032 bytes into one (zlib.net, technical details); a little room for framing."""
_SAMPLE_STEP = 7
"""Every 7th voxel is enough for percentiles and for the share of background."""
_LARGEST_PEAK = 1e6
"""More times the median than any scanner has: metal, vessels and spikes of maps reach some thousand times."""
_JUNK_FOLDERS = frozenset({"__MACOSX", "__pycache__"})


@dataclass(frozen=True)
class Grid:
    """Positions of voxels: shape (D, H, W) or (H, W), affine in mm (RAS+ world), and the codes of the source header.

    Pictures have two axes and an identity affine; `is_turned` where their EXIF orientation exchanged rows and columns.
    `source` is the file the grid was read from; `qform` is the affine of the quaternion form where it differs from
    `affine`; `notes` are sentences on what was odd in the header and how it was read.
    """

    shape: tuple[int, ...]
    affine: Affine
    sform_code: int = 1
    qform_code: int = 1
    qform: Affine | None = None
    xyzt_units: int = 2
    source: Path | None = None
    is_turned: bool = False
    notes: tuple[str, ...] = ()

    @property
    def dims(self) -> int:
        """3 for a volume, 2 for a picture."""
        return len(self.shape)

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Distance between neighbouring voxels along each axis."""
        lengths = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))
        return tuple(float(length) for length in lengths[: self.dims])

    @property
    def orientation(self) -> str:
        """Direction in which each voxel axis grows, such as "RAS" or "LPS"; pictures have none ("")."""
        return "".join(nib.orientations.aff2axcodes(self.affine)) if self.dims == 3 else ""


@dataclass(frozen=True)
class Volume:
    """One image: array (D, H, W) or (H, W) in the file's own orientation, with its grid."""

    array: AnyArray = field(repr=False)
    grid: Grid


@dataclass(frozen=True)
class ImageHeader:
    """A checked header: `read(channel)` gives the array (*grid.shape) of one channel, None where there is only one.

    `step` is the fractional distance between the values of neighbouring stored integers, else 0.
    """

    grid: Grid
    channels: int
    read: Callable[[int | None], AnyArray]
    step: float = 0.0


def log_notes(grid: Grid) -> None:
    """Log the notes on a file as warnings, each once in a process."""
    for note in grid.notes:
        _log_once(grid.source, note)


@cache
def _log_once(path: Path | None, note: str) -> None:
    _log.warning("%s: %s", path, note)


def damaged(path: Path, found: str) -> DataError:
    """The error of a file whose content is wrong, which cannot be repaired here."""
    return DataError(found, where=path, remedy=_COPY_AGAIN)


@contextmanager
def as_data_errors(path: Path) -> Iterator[None]:
    """Turn every failure to read `path` into a DataError that names the file, the finding and the remedy."""
    try:
        yield
    except SegkitError:
        raise
    # Five image libraries raise OSError, ValueError, RuntimeError, SyntaxError, KeyError and classes of their own
    # for the same thing: the content does not match the suffix.
    except Exception as failure:
        found, remedy = next(row[1:] for row in _FAILURES if isinstance(failure, row[0]))
        raise DataError(found.format(short_reason(failure)), where=path, remedy=remedy) from failure


def short_reason(failure: Exception) -> str:
    """The last 300 characters of an error of a library, on one line."""
    return " ".join(str(failure).split())[-300:]


def list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the files in a folder, sorted by name; hidden ones and junk folders left out, links followed.

    Raises OSError where the folder cannot be opened.
    """
    folders: list[Path] = []
    files: list[Path] = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.name.startswith(".") and entry.name not in _JUNK_FOLDERS:
                (folders if _is_folder(entry) else files).append(Path(entry.path))
    return folders, files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points to itself
        return False


def require_file(path: Path) -> int:
    """The size of a file in bytes; DataError where it is missing, a folder, empty or may not be read."""
    with as_data_errors(path):
        if path.is_symlink() and not path.exists():
            raise DataError(f"this link points to {path.readlink()}, which does not exist", where=path)
        if path.is_dir():
            remedy = "Some unpacking programs make such folders: give the file inside it"
            raise DataError("a folder with the name of an image file", where=path, expected="a file", remedy=remedy)
        size = path.stat().st_size
        if size == 0:
            raise damaged(path, "the file is empty (0 bytes)")
        with path.open("rb"):
            return size


def refuse_implausible(
    path: Path, shape: Sequence[int], *, bytes_per_voxel: int, stored_bytes: int, is_compressed: bool
) -> None:
    """DataError where a header's shape (voxels, channels included) cannot be true for a file of `stored_bytes`."""
    written = " x ".join(str(length) for length in shape)
    if not shape or min(shape) < 1:
        raise damaged(path, f"the header gives the shape {written or 'of nothing'}")
    voxels = math.prod(shape)
    if voxels > MOST_VOXELS:
        found = f"the header claims {written} = {voxels:.1e} voxels"
        raise DataError(found, where=path, expected=f"at most {MOST_VOXELS:.1e}", remedy=_COPY_AGAIN)
    needed, stored = voxels * bytes_per_voxel, max(stored_bytes, 0)
    if needed > stored * (_BEST_DEFLATE_RATIO if is_compressed else 1):
        promised = f"the header promises {written} voxels ({needed} bytes)"
        raise damaged(path, f"{promised}, and the file has room for {stored} bytes: it is truncated or damaged")


def is_usable(affine: Affine) -> bool:
    """Whether an affine (4, 4) is finite and invertible: no axis of length 0, no two parallel."""
    if not np.isfinite(affine).all():
        return False
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(lengths.min() > 1e-6 and abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-3)


def pick_channel(path: Path, channels: int, channel: int | None) -> int:
    """The channel to read; DataError where none was named and there are several, or where it does not exist."""
    if channel is None and channels > 1:
        remedy = "Name the channel, or split it into one file per modality"
        raise DataError(f"the file holds {channels} channels", where=path, expected="one image", remedy=remedy)
    picked = channel or 0
    if not 0 <= picked < channels:
        raise DataError(f"channel {picked} does not exist; the file holds {channels}, counted from 0", where=path)
    return picked


def require_finite(array: AnyArray, where: Path | str) -> None:
    """DataError where voxels are NaN or infinite."""
    with np.errstate(invalid="ignore"):  # infinity of both signs
        is_finite = bool(np.isfinite(array.sum(dtype=np.float64)))
    if not is_finite:
        broken = int(array.size - np.count_nonzero(np.isfinite(array)))
        remedy = "Write the file again with finite values, usually 0 outside the patient"
        raise DataError(f"{broken} voxels are NaN or infinite", where=where, remedy=remedy)


def measure_intensities(array: AnyArray, where: Path | str) -> tuple[float, float]:
    """Of a volume (D, H, W) the share of background, and the 99th percentile of the other absolute values, else 0.

    Background is the value of the first voxel; every 7th voxel is measured. Raises DataError where voxels are NaN or
    infinite, all voxels hold one value, or one is a million times larger than usual: normalised, all others are 0.
    """
    lowest, highest = float(array.min()), float(array.max())
    if not math.isfinite(highest - lowest):
        require_finite(array, where)
    if lowest == highest:
        remedy = "Export the image again, leave the case out, or pass --allow-missing to use it without this image"
        raise DataError(f"every voxel holds the same value, {lowest:g}", where=where, remedy=remedy)
    sample, corner = array.reshape(-1)[::_SAMPLE_STEP], array.reshape(-1)[0]
    inside = np.abs(sample[sample != corner].astype(np.float32))
    usual, bright = (float(value) for value in (np.percentile(inside, (50, 99)) if inside.size else (0, 0)))
    if usual == 0 < bright:
        usual = float(np.median(inside[inside > 0]))
    if (peak := max(-lowest, highest)) > _LARGEST_PEAK * usual > 0:
        count = int(np.count_nonzero(np.abs(array.astype(np.float32)) > _LARGEST_PEAK * usual))
        found = f"{count} voxels hold up to {peak:.3g}, where {usual:.3g} is usual; normalised, all others would be 0"
        raise DataError(found, where=where, remedy="Replace them, such as by 0, or export the image again")
    return 1 - inside.size / sample.size, bright


def plain_numbers(array: AnyArray, path: Path | str) -> AnyArray:
    """Floats as float32, booleans as uint8, integers in their own type, all in this machine's byte order."""
    kind = array.dtype.kind
    if kind == "f":
        # A float64 beyond float32 becomes infinite here, which preprocessing reports by name.
        with np.errstate(over="ignore"):
            return array.astype(np.float32, copy=False)
    if kind == "b":
        return array.astype(np.uint8)
    if kind in "iu":
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    expected = "one integer or real number per voxel"
    raise DataError(f"voxels are of the type {array.dtype}", where=path, expected=expected)


def in_type(values: NDArray[np.floating[Any]], dtype: np.dtype[Any]) -> AnyArray:
    """Values in another type: rounded and clipped to the range of an integer type."""
    if dtype.kind not in "iu":
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    rounded: AnyArray = np.clip(np.rint(values), limits.min, limits.max).astype(dtype)
    return rounded
