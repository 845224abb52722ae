"""Archives (.zip, .tar, .tar.gz, .tgz), unpacked into a folder that `layouts.table.find_cases` reads.

An archive with names outside its folder, links or devices is refused as a whole, since a series without some of its
slices would be worse than none. Sizes are summed before anything is written, and counted again during writing.
"""

import errno
import lzma
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, cast

from segkit.errors import DataError
from segkit.reading.volume import as_data_errors, damaged, require_file

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
MOST_BYTES = 200 * 1024**3
"""More than any packed cohort (BraTS 2021: 13 GB); a larger one is an archive bomb."""
MOST_FILES = 2_000_000
"""1000 patients of 2000 slices each; more small files would use up the inodes of a disk."""

_KEPT_FREE_BYTES = 256 * 1024**2
_DISK_ERRORS = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EROFS, errno.EACCES)
_CHUNK_BYTES = 1024**2
_JUNK = "__MACOSX"
_DRIVE = re.compile(r"[A-Za-z]:")
_ENCRYPTED, _IS_UTF8 = 0x1, 0x800
"""Bits of a zip member's flags."""


@dataclass(frozen=True)
class _Member:
    """A file in an archive: its path below the folder, its size as declared, and how to open it."""

    path: PurePosixPath
    size: int
    open: Callable[[], IO[bytes]]


def is_archive(path: Path) -> bool:
    """Whether the suffix is that of an archive (`.nii.gz` is not)."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES) and not path.is_dir()


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """The input for `find_cases`: a temporary folder with the contents of an archive, or `path` itself if it is none.

    Only its owner can read the folder, which is removed when the context ends. Errors as for `unpacked`.
    """
    if not is_archive(path):
        yield path
        return
    with _archive_errors(path):
        folder = tempfile.TemporaryDirectory(prefix="segkit-")
    with folder as name:
        yield unpacked(path, Path(name))


def unpacked(path: Path, into: Path, *, most_bytes: int = MOST_BYTES) -> Path:
    """Unpack an archive below the folder `into` and return what to read: a folder, or the only file.

    Hidden files and `__MACOSX` are left out. An archive with one folder at its top gives that folder, any other a
    folder of the archive's name, so that case ids are those of the sender.

    Raises:
        DataError: the file is not an archive, is damaged, encrypted or empty, would write outside the folder, holds
            links or two files of one name, or unpacks to more than `most_bytes`, than the free space of the disk, or
            than `MOST_FILES` files. Nothing is written where this is known beforehand.
    """
    require_file(path)
    suffix = next((suffix for suffix in ARCHIVE_SUFFIXES if path.name.lower().endswith(suffix)), "")
    target = into / (path.name[: len(path.name) - len(suffix)] or "archive")
    with _archive_errors(path):
        if target.exists():
            raise DataError("there is already something where the archive unpacks to", where=target)
        target.mkdir(parents=True)
        try:
            room = max(shutil.disk_usage(into).free - _KEPT_FREE_BYTES, 0)
            is_zip = path.name.lower().endswith(".zip")
            with zipfile.ZipFile(path) if is_zip else tarfile.open(path) as packed:
                found = (
                    _zip_members(path, packed) if isinstance(packed, zipfile.ZipFile) else _tar_members(path, packed)
                )
                for member in _checked(path, found, most_bytes, room):
                    _write(path, member, target)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
        tops = list(target.iterdir())
    return tops[0] if len(tops) == 1 else target


def _checked(path: Path, members: Iterable[_Member], most_bytes: int, room: int) -> list[_Member]:
    """All members; DataError as soon as they are too many or too large, without reading further headers."""
    kept: list[_Member] = []
    total = 0
    for member in members:
        kept.append(member)
        total += member.size
        if total > min(most_bytes, room):
            found = f"the archive unpacks to {_gigabytes(total)} or more"
            limit = _gigabytes(most_bytes)
            limit = limit if most_bytes <= room else f"the {_gigabytes(room)} that the disk has room for"
            remedy = "If you trust it, unpack it where there is room and give the folder"
            raise DataError(found, where=path, expected=f"at most {limit}", remedy=remedy)
        if len(kept) > MOST_FILES:
            raise DataError(f"the archive holds more than {MOST_FILES} files", where=path, expected="scans")
    if not kept:
        raise DataError("the archive holds no files", where=path, expected="scans")
    return kept


def _zip_members(path: Path, packed: zipfile.ZipFile) -> Iterator[_Member]:
    for info in packed.infolist():
        place = _place(path, _zip_name(info))
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 in archives written on Windows
        if place is None or info.is_dir() or kind == stat.S_IFDIR:
            continue
        if info.flag_bits & _ENCRYPTED:
            remedy = "Unpack it with its password and give the folder"
            raise DataError("the archive is encrypted", where=path, remedy=remedy)
        if kind not in (0, stat.S_IFREG):
            raise _no_plain_file(path, place)
        yield _Member(place, info.file_size, partial(packed.open, info))


def _tar_members(path: Path, tape: tarfile.TarFile) -> Iterator[_Member]:
    for info in tape:
        place = _place(path, _tar_name(info.name))
        if place is None or info.isdir():
            continue
        if not info.isreg():
            raise _no_plain_file(path, place)
        # None, where nothing can be opened, is only for links and devices.
        yield _Member(place, info.size, partial(cast("Callable[..., IO[bytes]]", tape.extractfile), info))


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The name as UTF-8 where it is valid, even without the flag for UTF-8; else as cp437."""
    with suppress(UnicodeError):
        if not info.flag_bits & _IS_UTF8:
            return info.orig_filename.encode("cp437").decode("utf-8")
    return info.orig_filename


def _tar_name(name: str) -> str:
    """The name, as Latin-1 where its bytes are not UTF-8: Python's lone surrogates could not be printed."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogateescape").decode("latin-1")
    return name


def _place(path: Path, name: str) -> PurePosixPath | None:
    """Relative path of a member; None where it is hidden or junk. DataError where its name leads elsewhere.

    Some Windows programs write backslashes; there a name that begins with C: is absolute.
    """
    plain = name.replace("\\", "/")
    parts = [part for part in plain.split("/") if part not in ("", ".")]
    if plain.startswith("/") or ".." in parts or _DRIVE.match(plain) or "\0" in plain:
        found = f"the archive would write outside its folder ({name!r})"
        raise DataError(found, where=path, remedy="Do not trust it, or have its sender pack the scans again")
    if not parts or _JUNK in parts or any(part.startswith(".") for part in parts):
        return None
    return PurePosixPath(*parts)


def _write(path: Path, member: _Member, target: Path) -> None:
    """Copy one member and count its bytes, as the size in the header may be wrong."""
    place = target / member.path
    left = member.size
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        written = place.open("xb")
    except (FileExistsError, NotADirectoryError) as failure:
        found = f"the archive holds two files of one name ({member.path})"
        remedy = "Pack the scans again, each series in a folder of its own"
        raise DataError(found, where=path, remedy=remedy) from failure
    with written, member.open() as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            left -= len(chunk)
            if left < 0:
                raise damaged(path, f"{member.path} is larger than the archive declares")
            written.write(chunk)
    if left:
        raise damaged(path, f"{member.path} is cut short in the archive")


@contextmanager
def _archive_errors(path: Path) -> Iterator[None]:
    """Turn errors of unpacking and of the disk into DataErrors, all others as `as_data_errors` does."""
    with as_data_errors(path):
        try:
            yield
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError) as failure:
            raise damaged(path, f"the archive is damaged, or not an archive ({failure})") from failure
        except NotImplementedError as failure:
            remedy = "Unpack it with the program that made it and give the folder"
            found = f"the archive is packed in a way that cannot be read here ({failure})"
            raise DataError(found, where=path, remedy=remedy) from failure
        except OSError as failure:
            if failure.errno not in _DISK_ERRORS:
                raise
            found = f"there is no room to unpack it ({failure.strerror})"
            remedy = "Free some space, or unpack it elsewhere and give the folder"
            raise DataError(found, where=path, remedy=remedy) from failure


def _no_plain_file(path: Path, place: PurePosixPath) -> DataError:
    remedy = "Pack the files themselves: `tar --dereference`, or zip without -y"
    found = f"the archive holds a link or a device ({place})"
    return DataError(found, where=path, expected="plain files", remedy=remedy)


def _gigabytes(count: int) -> str:
    return f"{count / 1024**3:.3g} GB" if count >= 1024**3 else f"{count / 1024**2:.3g} MB"
