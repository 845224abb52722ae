"""What a file tells before its voxels are read, and how a failure of an image library becomes a sentence.

Each reader (`nifti`, `itk`, `dicom`, `pictures`) turns a path into an `ImageHeader`: the grid, the number of channels,
and a function that reads one channel. Nothing is allocated before the header has been judged.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segkit.errors import DataError, SegkitError
from segkit.reading.volume import Grid
from segkit.shapes import Affine, AnyArray

MOST_VOXELS = 2**33
"""More voxels than any scanner makes (2048 x 2048 x 2048); a header that claims more is broken."""

COPY_AGAIN = "Copy the file again from where it came from; it cannot be repaired here"

_BEST_DEFLATE_RATIO = 1100
"""Deflate packs at most 1032 bytes into one (zlib.net, technical details); a little room for framing."""


@dataclass(frozen=True)
class ImageHeader:
    """A judged header: `read(channel)` gives the array (*grid.shape) of one channel, None where there is only one."""

    grid: Grid
    channels: int
    read: Callable[[int | None], AnyArray]


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns whatever fails while `path` is read into a DataError that names the file, the finding and the remedy."""
    try:
        yield
    except SegkitError:
        raise
    except FileNotFoundError as failure:
        raise DataError("the file does not exist", where=path, remedy="Check the name and the folder") from failure
    except PermissionError as failure:
        raise DataError(
            "you have no permission to read it", where=path, remedy="Ask its owner for read access, or copy it"
        ) from failure
    except (EOFError, zlib.error, gzip.BadGzipFile) as failure:
        raise DataError(f"the file is truncated or damaged ({failure})", where=path, remedy=COPY_AGAIN) from failure
    except MemoryError as failure:
        raise DataError("it does not fit into this computer's memory", where=path) from failure
    # The frontier with five image libraries: they raise OSError, ValueError, RuntimeError, SyntaxError, KeyError and
    # classes of their own for one and the same thing, a file that is not what its name says.
    except Exception as failure:
        reason = " ".join(str(failure).split())[-300:]
        raise DataError(f"the file cannot be read: {reason}", where=path, remedy=COPY_AGAIN) from failure


def require_file(path: Path) -> int:
    """The size of a file in bytes; DataError where it is missing, a folder, empty or may not be read."""
    with explained(path):
        if path.is_symlink() and not path.exists():
            raise DataError(f"this link points to {path.readlink()}, which does not exist", where=path)
        if path.is_dir():
            raise DataError(
                "this is a folder with the name of an image file",
                where=path,
                expected="a file",
                remedy="Some unpacking programs make such folders: give the file inside it",
            )
        size = path.stat().st_size
        if size == 0:
            raise DataError("the file is empty (0 bytes)", where=path, remedy=COPY_AGAIN)
        with path.open("rb"):
            return size


def refuse_implausible(
    path: Path, shape: Sequence[int], *, bytes_per_voxel: int, stored_bytes: int, is_compressed: bool
) -> None:
    """DataError where a header's shape (voxels, channels included) cannot be true for a file of `stored_bytes`."""
    written = " x ".join(str(length) for length in shape)
    if not shape or min(shape) < 1:
        raise DataError(f"the header gives the shape {written or 'of nothing'}", where=path, remedy=COPY_AGAIN)
    voxels = math.prod(shape)
    if voxels > MOST_VOXELS:
        raise DataError(
            f"the header claims {written} = {voxels:.1e} voxels",
            where=path,
            expected=f"at most {MOST_VOXELS:.1e}",
            remedy=f"The header is damaged. {COPY_AGAIN}",
        )
    needed = voxels * bytes_per_voxel
    if needed > stored_bytes * (_BEST_DEFLATE_RATIO if is_compressed else 1):
        raise DataError(
            f"the header promises {written} voxels ({needed} bytes), and the file has room for "
            f"{max(stored_bytes, 0)} bytes: it is truncated or damaged",
            where=path,
            remedy=COPY_AGAIN,
        )


def pick_channel(path: Path, channels: int, channel: int | None) -> int:
    """The channel to read; DataError where none was named and there are several, or where it does not exist."""
    if channel is None and channels > 1:
        raise DataError(
            f"the file holds {channels} channels",
            where=path,
            expected="one image",
            remedy="Name the channel, or split it into one file per modality",
        )
    picked = channel or 0
    if not 0 <= picked < channels:
        raise DataError(f"channel {picked} does not exist; the file holds {channels}, counted from 0", where=path)
    return picked


def is_usable(affine: Affine) -> bool:
    """Does the affine (4, 4) put every voxel in a place of its own: finite, no axis of length 0, no two alike?"""
    if not np.isfinite(affine).all():
        return False
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(lengths.min() > 1e-6 and abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-3)


def plain_numbers(array: AnyArray, path: Path) -> AnyArray:
    """Floats as float32, truth values as uint8, integers in their own type, all in this machine's byte order."""
    kind = array.dtype.kind
    if kind == "f":
        # A float64 beyond float32 becomes infinite here, which preprocessing reports by name.
        with np.errstate(over="ignore"):
            return array.astype(np.float32, copy=False)
    if kind == "b":
        return array.astype(np.uint8)
    if kind in "iu":
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    raise DataError(
        f"voxels are of the type {array.dtype}", where=path, expected="one integer or real number per voxel"
    )


def in_type(values: NDArray[np.floating[Any]], dtype: np.dtype[Any]) -> AnyArray:
    """Values in another type: rounded for integers, and those beyond the type's range become its ends."""
    if dtype.kind not in "iu":
        return values.astype(dtype)
    range_of = np.iinfo(dtype)
    fitting: AnyArray = np.clip(np.rint(values), range_of.min, range_of.max).astype(dtype)
    return fitting
