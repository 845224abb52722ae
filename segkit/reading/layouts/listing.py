"""The images below a data folder, listed by one safe walk from which every layout reads."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segkit.errors import DataError, Problem
from segkit.reading.dicom import DICOM_SUFFIXES, has_dicom_name, holds_frames, is_dicom_file
from segkit.reading.files import VOLUME_SUFFIXES, read_json, stem_of, suffix_of
from segkit.reading.pictures import PICTURE_SUFFIXES
from segkit.reading.volume import list_folder

_DICOM_INDEX = "DICOMDIR"
"""The table of contents of a DICOM disc: a DICOM file without an image."""

_TRIED_FILES = 5
"""Files without suffix to open in search of a DICOM series: a disc also holds programs (AUTORUN)."""

_MOST_MULTI_FRAME_FILES = 32
"""In folders with more DICOM files, each is a slice and not a volume; none is opened to find out."""


@dataclass(frozen=True)
class Listing:
    """The image files below a folder, sorted by path; a DICOM series counts as one volume, its folder.

    `only` is the file itself where the user gave a single file; `root` is then its folder.
    """

    root: Path
    volumes: tuple[Path, ...] = ()
    pictures: tuple[Path, ...] = ()
    problems: tuple[Problem, ...] = ()
    only: Path | None = None
    others: tuple[Path, ...] = field(default=(), repr=False)

    @property
    def images(self) -> tuple[Path, ...]:
        """Volumes, then pictures."""
        return self.volumes + self.pictures


def list_images(root: Path, exclude: Path | None = None) -> Listing:
    """List `root` (a folder or one file): links are followed, but not into a loop; hidden files are left out.

    `exclude` is a folder below `root` to leave out, such as one for results.

    Raises:
        DataError: `root` does not exist or cannot be opened.
    """
    root = Path(os.path.normpath(root.absolute()))
    if root.is_file():
        return _listing_of_file(root)
    if not root.is_dir():
        raise DataError(
            "no such file or folder",
            where=root,
            expected="a data folder, a case folder or one image file",
            remedy="Check the path, and that the disk is mounted",
        )
    found = _Found(excluded=_identity(exclude))
    _walk(root, (), found)
    return Listing(
        root,
        volumes=tuple(sorted(found.volumes)),
        pictures=tuple(sorted(found.pictures)),
        problems=tuple(found.problems),
        others=tuple(sorted(found.others)),
    )


def bare_name(path: Path) -> str:
    """The name of an image without its suffix; a DICOM folder keeps its whole name, dots and all."""
    is_file_name = suffix_of(path) in (*VOLUME_SUFFIXES, *PICTURE_SUFFIXES, *DICOM_SUFFIXES)
    return stem_of(path) if is_file_name else path.name


def read_document(path: Path) -> dict[str, Any]:
    """The JSON object of a data set, see `read_json`."""
    return read_json(path, remedy="Correct it, or pass --layout folder to ignore it")


@dataclass
class _Found:
    excluded: tuple[int, int] | None = None
    volumes: list[Path] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)


def _listing_of_file(path: Path) -> Listing:
    if suffix_of(path) in PICTURE_SUFFIXES:
        return Listing(path.parent, pictures=(path,), only=path)
    if has_dicom_name(path) or suffix_of(path) in VOLUME_SUFFIXES or is_dicom_file(path):
        return Listing(path.parent, volumes=(path,), only=path)
    return Listing(path.parent, others=(path,), only=path)


def _identity(folder: Path | None) -> tuple[int, int] | None:
    """Device and inode, which are the same by every path or link to a folder; None where there is no folder."""
    try:
        status = None if folder is None else folder.stat()
    except OSError:
        return None
    return None if status is None else (status.st_dev, status.st_ino)


def _walk(folder: Path, above: tuple[tuple[int, int], ...], found: _Found) -> None:
    try:
        status = folder.stat()
        folders, files = list_folder(folder)
    except OSError as error:
        remedy = "Check permissions and links; what lies below it is left out"
        found.problems.append(Problem(str(folder), f"cannot be opened ({error.strerror})", remedy, is_fatal=False))
        return
    identity = (status.st_dev, status.st_ino)
    if above and identity == found.excluded:
        return
    if identity in above:
        remedy = "Remove the link; the folder itself is read once"
        found.problems.append(Problem(str(folder), "is a link to a folder that contains it", remedy, is_fatal=False))
        return
    if _is_series(files):
        several = _multi_frame_files(files)
        found.volumes += several or [folder]
        files = [path for path in files if not (has_dicom_name(path) or path in several)]
    for path in files:
        suffix = suffix_of(path)
        if suffix not in VOLUME_SUFFIXES and suffix not in PICTURE_SUFFIXES:
            found.others.append(path)
        elif not path.exists():
            found.problems.append(Problem(str(path), "is a link to a file that is not there", "Mend the link", False))
        else:
            (found.volumes if suffix in VOLUME_SUFFIXES else found.pictures).append(path)
    for child in folders:
        _walk(child, (*above, identity), found)


def _is_series(files: list[Path]) -> bool:
    """Whether a folder holds a DICOM series: by suffix, else by the magic bytes of its first files without suffix."""
    if any(has_dicom_name(path) for path in files):
        return True
    bare = (path for path in files if not path.suffix or path.suffix[1:].isdigit())
    candidates = [path for path in bare if path.name.upper() != _DICOM_INDEX]
    return any(is_dicom_file(path) for path in candidates[:_TRIED_FILES])


def _multi_frame_files(files: list[Path]) -> list[Path]:
    """The DICOM files of a folder where each of several is a whole volume, as the first one shows; else none."""
    slices = [path for path in files if path.name.upper() != _DICOM_INDEX and (has_dicom_name(path) or not path.suffix)]
    if not 2 <= len(slices) <= _MOST_MULTI_FRAME_FILES:
        return []
    slices = [path for path in slices if is_dicom_file(path)]
    return slices if len(slices) > 1 and holds_frames(slices[0]) else []
