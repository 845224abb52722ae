"""Reading and writing of images and label maps in every format, and atomic writing of any file.

Arrays are read and written in the file's own orientation; `geometry` reorients them. The suffix chooses the format.
"""

import errno
import hashlib
import json
import os
import platform
import secrets
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segkit.errors import DataError, SegkitError
from segkit.reading.case import ImageFile
from segkit.reading.dicom import DICOM_SUFFIXES, is_dicom_file, open_dicom
from segkit.reading.geometry import same_grid
from segkit.reading.itk import ITK_SUFFIXES, open_itk, save_itk, voxel_file
from segkit.reading.nifti import (
    MGH_SUFFIXES,
    NIFTI_SUFFIXES,
    nifti_image,
    open_mgh,
    open_nifti,
    rewrite_nifti,
    save_mgh,
)
from segkit.reading.pictures import PICTURE_SUFFIXES, open_mask, open_picture, save_picture
from segkit.reading.volume import (
    Grid,
    ImageHeader,
    Volume,
    as_data_errors,
    in_type,
    list_folder,
    require_file,
    short_reason,
)
from segkit.shapes import AnyArray, LabelMap

VOLUME_SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES, *MGH_SUFFIXES)
_UNREAD_PAIRS = {".img": ".hdr", ".img.gz": ".hdr.gz", ".rec": ".par"}
"""Analyze 7.5, which has no orientation, NIfTI in two files, and Philips' PAR/REC: recognised and not read."""
_UNREAD_VOLUMES = (".mnc", ".nhdr", ".nii.bz2", ".nii.xz", ".nii.zst", ".nii.zip")
_UNREAD_PICTURES = (".webp", ".heic", ".jp2")
UNREAD_REMEDY = (
    "Convert volumes to .nii.gz, such as with nibabel's `nib-convert a.hdr a.nii.gz` for .hdr/.img pairs, "
    "and pictures to .png"
)
IMAGE_SUFFIXES = (*VOLUME_SUFFIXES, *PICTURE_SUFFIXES)

_OPENERS: dict[str, Callable[[Path], ImageHeader]] = {
    **dict.fromkeys(NIFTI_SUFFIXES, open_nifti),
    **dict.fromkeys(ITK_SUFFIXES, open_itk),
    **dict.fromkeys(MGH_SUFFIXES, open_mgh),
    **dict.fromkeys(PICTURE_SUFFIXES, open_picture),
    **dict.fromkeys(DICOM_SUFFIXES, open_dicom),
}
_INTEGRAL_TOLERANCE = 1e-4
"""Label values in float32 are read as 2.9999998."""
_MOST_LABELS, _MOST_SHOWN = 255, 40
_CONVERT = "segkit convert labels DATA -o MASKS"
_LARGEST_STEP = 1.001
"""With a larger scale factor, neighbouring labels may be stored as the same integer."""
_WRITE_FAILURES = (
    ((errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)), "the disk is full", "Free some space and start again. "),
    (
        (errno.EROFS, errno.EACCES, errno.EPERM),
        "the folder is read-only, or you have no permission to write there",
        "Choose another output folder. ",
    ),
)
"""Error codes with the finding and the remedy; EDQUOT: the user's quota is used up, which Windows does not have."""
_KEPT = "An existing file of this name and all files already written are kept"
_LARGEST_JSON_BYTES = 64 * 1024**2
"""Five times a `dataset.json` of a hundred thousand cases."""


def suffix_of(path: Path) -> str:
    """The suffix in lower case, ".nii.gz" in one piece."""
    name = path.name.lower()
    return next((suffix for suffix in IMAGE_SUFFIXES if name.endswith(suffix)), path.suffix.lower())


def stem_of(path: Path) -> str:
    """The name without its suffix: "case 1" for "case 1.nii.gz"."""
    return path.name.removesuffix(path.name[len(path.name) - len(suffix_of(path)) :])


def is_unread_image(path: Path) -> bool:
    """Whether a file is an image by its name, or the header of one, in a format that is not read."""
    pairs = (*_UNREAD_PAIRS, *_UNREAD_PAIRS.values())
    return path.name.lower().endswith((*pairs, *_UNREAD_VOLUMES, *_UNREAD_PICTURES))


def unread_images(others: Sequence[Path], *, is_volumes: bool) -> list[Path]:
    """The images in formats that are not read; pictures only where there are no volumes, which they may show."""
    names = {str(path).lower() for path in others}

    def is_image(name: str) -> bool:
        pairs = [(end, header) for end, header in _UNREAD_PAIRS.items() if name.endswith(end)]
        is_whole = any(name.removesuffix(end) + header in names for end, header in pairs)
        return is_whole or name.endswith(_UNREAD_VOLUMES if is_volumes else _UNREAD_VOLUMES + _UNREAD_PICTURES)

    return [path for path in others if is_image(str(path).lower())]


def read_grid(path: Path) -> Grid:
    """The grid of a file from its header; DataError where that is damaged or claims more voxels than the file holds."""
    return _read_header(path).grid


def count_channels(path: Path) -> int:
    """1 for a volume or a grey picture, 3 for a colour picture, the length of the last axis for a 4D file."""
    return _read_header(path).channels


def _read_header(path: Path) -> ImageHeader:
    suffix = suffix_of(path)
    with as_data_errors(path):
        is_series = path.is_dir() and suffix not in IMAGE_SUFFIXES
    if is_series:
        return open_dicom(path)
    opener = _OPENERS.get(suffix)
    if opener is not None:
        return opener(path)
    require_file(path)
    if is_dicom_file(path):  # DICOM files often have no suffix, or one that is the end of a number
        return open_dicom(path)
    expected = "a folder of DICOM slices or one of " + " ".join(IMAGE_SUFFIXES)
    found = f"files of the kind {suffix or 'without suffix'!r} cannot be read"
    remedy = UNREAD_REMEDY if is_unread_image(path) else None
    raise DataError(found, where=path, expected=expected, remedy=remedy)


def read_volume(path: Path, channel: int | None = None) -> Volume:
    """One image: (D, H, W), or (H, W) for a picture; floats as float32, integers in the file's own type.

    `path` is a file or a folder with one DICOM series; `channel` counts from 0 and is needed where there are several
    (last axis of a 4D file; red, green, blue). Scale factors are applied, NaN and infinity kept. Raises DataError.
    """
    header = _read_header(path)
    return Volume(header.read(channel), header.grid)


def read_labels(path: Path, channel: int | None = None) -> tuple[LabelMap, Grid]:
    """A label map as uint8, with its grid; floats must be whole numbers from 0 to 255.

    Labels stored as integers with a scale factor may differ from them by half a step: 1 of a slope of 4/255 is 1.0039.
    The labels of a palette picture are its indices, those of a 1-bit picture 0 and 1. Raises DataError.
    """
    header = _read_mask_header(path)
    if header.channels > 1 and channel is None:
        remedy = f"If it is one mask per class (one-hot), join them with `{_CONVERT} --values 1=1 --values 2=2`"
        raise DataError(f"the mask holds {header.channels} channels", where=path, expected="one", remedy=remedy)
    array = header.read(channel)
    if array.dtype == np.uint8:
        return array, header.grid
    if array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= 255:
        return array.astype(np.uint8), header.grid
    with np.errstate(invalid="ignore"):
        rounded = np.rint(array)
        tolerance = _INTEGRAL_TOLERANCE + (header.step / 2 if header.step < _LARGEST_STEP else 0)
        is_whole = np.abs(array - rounded) <= tolerance
        fits = is_whole & (rounded >= 0) & (rounded <= 255)
    if not fits.all():
        stray = np.unique(array[~fits])
        named = ", ".join(f"{value:g}" for value in stray[:5]) + (" ..." if len(stray) > 5 else "")
        found = f"{int((~fits).sum())} voxels hold values that are no labels: {named}"
        remedy = "This looks like an image or like probabilities: give the label map"
        if is_whole.all() and len(values := np.unique(rounded)) <= _MOST_LABELS:
            numbers = iter(range(1, _MOST_LABELS + 1))
            mapped = [f"--values {value:.0f}={next(numbers) if value > 0 else 0}" for value in values if value != 0]
            remedy = f"Map them with `{_CONVERT} {' '.join(mapped[:_MOST_SHOWN])}`"
            remedy += " and so on" if len(mapped) > _MOST_SHOWN else ""
        raise DataError(found, where=path, expected="whole numbers from 0 to 255", remedy=remedy)
    return rounded.astype(np.uint8), header.grid


def read_label_values(path: Path, channel: int | None = None) -> Volume:
    """The values of a mask as they are stored, of any type: a palette picture gives its indices. Raises DataError."""
    header = _read_mask_header(path)
    return Volume(header.read(channel), header.grid)


def _read_mask_header(path: Path) -> ImageHeader:
    return open_mask(path) if suffix_of(path) in PICTURE_SUFFIXES else _read_header(path)


def read_reference(file: ImageFile) -> tuple[LabelMap, Grid]:
    """A reference as uint8, with its grid; of one mask per class, each paints its value over those before it.

    Raises:
        DataError: a file is unusable, or the masks are not on one grid.
    """
    if not file.parts:
        return read_labels(file.path, file.channel)
    first, grid = read_labels(file.parts[0][1])
    labels = np.zeros(first.shape, np.uint8)
    for value, path in file.parts:
        mask, own = read_labels(path)
        if difference := same_grid(own, grid):
            raise DataError(difference, where=path, expected=f"the grid of {file.path.name}, of the same case")
        labels[mask > 0] = value
    return labels, grid


def write_labels(path: Path, labels: LabelMap, grid: Grid) -> None:
    """Write a label map (*grid.shape) as uint8 with the affine, codes and units of `grid`; atomically.

    The suffix chooses the format; pictures are written as .png, as other formats may change values.
    """
    if grid.dims == 2 and suffix_of(path) != ".png":
        raise DataError(f"a mask of a picture is not written as {suffix_of(path)}", where=path, expected=".png")
    write_image(path, labels.astype(np.uint8, copy=False), grid)


def write_image(path: Path, array: AnyArray, grid: Grid, *, slope: float = 1.0) -> None:
    """Write (*grid.shape), or (*grid.shape, C) as NIfTI or colour picture, atomically; the suffix chooses the format.

    Integers keep their type, floats become float32. `slope` is the scale factor of the header, NIfTI only. Raises
    DataError where the disk is full, the folder is read-only or the format cannot hold the array.
    """
    if array.shape[: grid.dims] != grid.shape or array.ndim > grid.dims + 1:
        raise ValueError(f"an array of shape {array.shape} does not fit a grid of shape {grid.shape}")
    suffix = suffix_of(path)
    if suffix not in (PICTURE_SUFFIXES if grid.dims == 2 else VOLUME_SUFFIXES) or suffix == ".mhd":
        expected = ".png or .tif" if grid.dims == 2 else ".nii.gz, .nii, .mgz, .nrrd or .mha"
        raise DataError(f"{grid.dims}D images are not written as {suffix!r}", where=path, expected=expected)
    if array.ndim > grid.dims and suffix not in (*NIFTI_SUFFIXES, *PICTURE_SUFFIXES):
        raise DataError(f"{suffix} files are written with one channel only", where=path, expected=".nii.gz")
    plain = array.astype({"f": np.float32, "b": np.uint8}.get(array.dtype.kind, array.dtype), copy=False)
    with written_atomically(path) as temporary:
        if suffix in PICTURE_SUFFIXES:
            save_picture(temporary, plain)
        elif suffix in NIFTI_SUFFIXES:
            nifti_image(plain, grid, slope).to_filename(temporary)
        elif suffix in MGH_SUFFIXES:
            save_mgh(temporary, plain, grid)
        else:
            save_itk(temporary, plain, grid)


def rewrite_image(
    path: Path, source: Path, where: NDArray[np.bool_], values: NDArray[np.floating[Any]], channel: int | None = None
) -> None:
    """Write the image `source` with other values at some voxels, all others unchanged; atomically.

    From NIfTI to NIfTI, type, scale factors and header are those of the source. Otherwise the type is that of
    `read_volume`, which only shortens float64 to float32. The output has only the one `channel`. Raises DataError.

    Args:
        path: the file to write; its suffix chooses the format.
        source: the image; it is not changed.
        where: the n voxels to change, (*grid.shape).
        values: their new values, (n,) in the order of `array[where]`; rounded and clipped in integer types.
        channel: the channel to read, as for `read_volume`.
    """
    if suffix_of(source) in NIFTI_SUFFIXES and suffix_of(path) in NIFTI_SUFFIXES:
        with written_atomically(path) as temporary:
            rewrite_nifti(temporary, source, where, values, channel)
        return
    volume = read_volume(source, channel)
    array = volume.array.copy()
    array[where] = in_type(values, array.dtype)
    write_image(path, array, volume.grid)


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A hidden name beside `path`, with the same suffix, to write to; renamed to `path` if no error occurred.

    Missing folders are created. On an error, which becomes a DataError, the hidden file is removed and an existing
    `path` is unchanged.
    """
    temporary = path.with_name(f".{_host()}-{os.getpid()}-{secrets.token_hex(6)}{suffix_of(path)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as stream:  # network disks report only here that they are full
            os.fsync(stream.fileno())
        temporary.replace(path)
    except SegkitError:
        raise
    # Image libraries raise RuntimeError, ValueError, KeyError ... where a format cannot hold the data.
    except Exception as failure:
        code = failure.errno if isinstance(failure, OSError) else None
        unknown = (f"the file cannot be written: {short_reason(failure)}", "")
        found, remedy = next((row[1:] for row in _WRITE_FAILURES if code in row[0]), unknown)
        raise DataError(found, where=path, remedy=f"{remedy}{_KEPT}") from failure
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_json(path: Path, *, remedy: str | None = None, most_bytes: int | None = _LARGEST_JSON_BYTES) -> dict[str, Any]:
    """A JSON object; DataError where it cannot be read, exceeds `most_bytes`, is not an object, or has a key twice."""
    try:
        with path.open("rb") as file:
            data = file.read(-1 if most_bytes is None else most_bytes + 1)
        if most_bytes is not None and len(data) > most_bytes:
            raise ValueError(f"it is larger than {most_bytes} bytes")  # noqa: TRY301  reported below
        document = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_without_doubles)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path, remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not readable JSON ({error})", where=path, remedy=remedy) from error
    if not isinstance(document, dict):
        found = f"holds a {type(document).__name__}"
        raise DataError(found, where=path, expected="a JSON object with keys", remedy=remedy)
    return document


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json.loads would silently drop the first value of a repeated key.
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("it has a key twice")
    return document


def stored_files(path: Path) -> list[Path]:
    """The files that hold an image: a .mhd has a second one, a DICOM series is all files of its folder.

    Raises:
        OSError: the folder cannot be opened.
        DataError: the second file is missing.
    """
    if path.is_dir():
        return list_folder(path)[1]
    return [path, voxel_file(path)] if suffix_of(path) == ".mhd" else [path]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def way_to(path: Path, folder: Path) -> str | None:
    """`path` relative to a folder, with forward slashes; None where it is on another drive."""
    try:
        return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()
    except ValueError:
        return None


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of `written_atomically` whose process, on this machine, was killed."""
    if os.name != "posix":  # elsewhere there is no harmless way to test whether a process is alive
        return
    for path in folder.glob(f".{_host()}-*-*"):
        number = path.name.split("-")[1]
        if number.isdigit() and not _is_alive(int(number)):
            with suppress(OSError):
                path.unlink()


def _host() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as failure:
        return not isinstance(failure, ProcessLookupError)
    return True
