"""Layout: one way to arrange a data folder. Listing: the images below a folder, found by one safe walk.

A layout names the case and kind of each listed file; `build_cases` and `build_cohort` do the rest for all of them.
"""

import fnmatch
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from segkit.errors import DataError, Problem, some, warning
from segkit.labels import LabelScheme
from segkit.reading.case import IGNORED, LABEL, Case, Cohort, ImageFile, in_channel_order, split_name
from segkit.reading.dicom import DICOM_SUFFIXES, has_dicom_name, holds_frames, is_dicom_file
from segkit.reading.files import (
    UNREAD_REMEDY,
    VOLUME_SUFFIXES,
    count_channels,
    read_grid,
    read_json,
    stem_of,
    suffix_of,
    unread_images,
)
from segkit.reading.geometry import same_grid
from segkit.reading.pictures import PICTURE_SUFFIXES
from segkit.reading.volume import list_folder

UNASSIGNED = "unassigned"
"""The kind of an image that fits none of the cases."""
_SAMPLED_GRIDS = 20
LEAST_SHARE = 0.5
"""A modality of fewer cases is not a channel of the cohort: as one, it would make all other cases incomplete."""

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

    `exclude` is a folder below `root` to leave out, such as one for results. Raises DataError where `root` is missing.
    """
    root = Path(os.path.normpath(root.absolute()))
    if root.is_file():
        return _listing_of_file(root)
    if not root.is_dir():
        expected, remedy = "a data folder, a case folder or one image file", "Check the path and the disk"
        raise DataError("no such file or folder", where=root, expected=expected, remedy=remedy)
    walk = _Walk(_identity(exclude))
    walk.visit(root)
    volumes, pictures, others = (tuple(sorted(found)) for found in (walk.volumes, walk.pictures, walk.others))
    if unread := unread_images(others, is_volumes=bool(volumes)):
        problem = unused_files(unread, "images in formats that are not read", UNREAD_REMEDY)
        walk.problems.append(replace(problem, left_out=tuple(map(str, unread))))
    return Listing(root, volumes, pictures, tuple(walk.problems), others=others)


def bare_name(path: Path) -> str:
    """The name of an image without its suffix; a DICOM folder keeps its whole name, dots and all."""
    is_file_name = suffix_of(path) in (*VOLUME_SUFFIXES, *PICTURE_SUFFIXES, *DICOM_SUFFIXES)
    return stem_of(path) if is_file_name else path.name


def read_document(path: Path) -> dict[str, Any]:
    """The JSON object of a data set, see `read_json`."""
    return read_json(path, remedy="Correct it, or pass --layout folder to ignore it")


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


@dataclass
class _Walk:
    excluded: tuple[int, int] | None
    volumes: list[Path] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def visit(self, folder: Path, above: tuple[tuple[int, int], ...] = ()) -> None:
        """Add what is in `folder` and below; `above` are the identities of the folders above it."""
        try:
            status = folder.stat()
            folders, files = list_folder(folder)
        except OSError as error:
            remedy = "Check permissions and links; everything below it is left out"
            self.problems.append(warning(folder, f"cannot be opened ({error.strerror})", remedy, (str(folder),)))
            return
        identity = (status.st_dev, status.st_ino)
        if above and identity == self.excluded:
            return
        if identity in above:
            remedy = "Remove the link; the folder itself is read once"
            self.problems.append(warning(folder, "is a link to a folder that contains it", remedy))
            return
        if _is_series(files):
            several = _multi_frame_files(files)
            self.volumes += several or [folder]
            files = [path for path in files if not (has_dicom_name(path) or path in several)]
        for path in files:
            suffix = suffix_of(path)
            if suffix not in VOLUME_SUFFIXES and suffix not in PICTURE_SUFFIXES:
                self.others.append(path)
            elif not path.exists():
                found = "is a link to a file that does not exist"
                self.problems.append(warning(path, found, "Correct the link", (str(path),)))
            else:
                (self.volumes if suffix in VOLUME_SUFFIXES else self.pictures).append(path)
        for child in folders:
            self.visit(child, (*above, identity))


def _is_series(files: list[Path]) -> bool:
    """Whether a folder holds a DICOM series: by suffix, else by the magic bytes of its first files without suffix."""
    bare = (path for path in files if not path.suffix or path.suffix[1:].isdigit())
    candidates = [path for path in bare if path.name.upper() != _DICOM_INDEX]
    return any(map(has_dicom_name, files)) or any(map(is_dicom_file, candidates[:_TRIED_FILES]))


def _multi_frame_files(files: list[Path]) -> list[Path]:
    """The DICOM files of a folder where each of several is a whole volume, as the first one shows; else none."""
    slices = [path for path in files if path.name.upper() != _DICOM_INDEX and (has_dicom_name(path) or not path.suffix)]
    if not 2 <= len(slices) <= _MOST_MULTI_FRAME_FILES:
        return []
    slices = [path for path in slices if is_dicom_file(path)]
    return slices if len(slices) > 1 and holds_frames(slices[0]) else []


@dataclass(frozen=True)
class FolderOptions:
    """The user's options for a folder: file name patterns by modality, label scheme, and name of the layout."""

    modalities: Mapping[str, str] = field(default_factory=dict)
    label_scheme: LabelScheme | None = None
    layout: str | None = None


@dataclass(frozen=True)
class Layout:
    """One way to arrange a data folder.

    `recognise` scores a listing from 0 (not this layout) to 1 (certainly this one); scores below 0.1 only serve to name
    the nearest layouts. `read` turns the listing into a cohort, which may be empty. `example` shows one case.
    """

    name: str
    description: str
    example: str
    recognise: Callable[[Listing], float]
    read: Callable[[Listing, FolderOptions], Cohort]


@dataclass(frozen=True)
class FoundFile:
    """A file with its case, its folder and its kind: a modality, LABEL or IGNORED.

    Images of one case share `case_id` and `folder`; a reference may be in another folder. `shown` is the class that a
    reference shows where there is a mask for each.
    """

    case_id: str
    folder: Path
    kind: str
    image: ImageFile
    shown: str = ""


@dataclass(frozen=True)
class SchemeChoice:
    """The label scheme of a cohort, None where it is unknown, and problems to report with it."""

    scheme: LabelScheme | None
    problems: tuple[Problem, ...] = ()


def shown_classes(files: Iterable[FoundFile]) -> dict[str, int]:
    """Class -> label value, from 1 in the order of their names, where references are one mask per class."""
    return {name: value for value, name in enumerate(sorted({file.shown for file in files} - {""}), start=1)}


def build_cases(
    files: Iterable[FoundFile],
    *,
    patient_of: Callable[[str], str] = str,
    order: Callable[[Iterable[str]], tuple[str, ...]] = in_channel_order,
) -> tuple[list[Case], list[Problem]]:
    """Group files into cases, sorted by id; problems of one case are stored in it, the others are returned.

    A case id that occurs in two folders is read from the first one only, as results are named by case id.
    """
    files = list(files)
    classes = shown_classes(files)
    images: dict[str, dict[Path, list[FoundFile]]] = defaultdict(lambda: defaultdict(list))
    references: dict[str, list[FoundFile]] = defaultdict(list)
    for file in files:
        if file.kind == LABEL:
            references[file.case_id].append(file)
        elif file.kind not in (IGNORED, UNASSIGNED):
            images[file.case_id][file.folder].append(file)
    cases = []
    for case_id, by_folder in sorted(images.items()):
        first, *others = sorted(by_folder)
        labels = references.pop(case_id, [])
        beside = [file for file in labels if file.folder == first]
        labels = beside or [file for file in labels if file.folder not in by_folder]
        by_kind: dict[str, list[ImageFile]] = defaultdict(list)
        for file in by_folder[first]:
            by_kind[file.kind].append(file.image)
        by_kind |= {LABEL: _references(labels, classes)} if labels else {}
        problems = [_several_files(kind, found) for kind, found in by_kind.items() if len(found) > 1]
        if others:
            found = f"case {case_id} also exists in {', '.join(map(str, others))}, which is left out"
            problems.append(Problem(str(first), found, "Rename or remove one of them"))
        chosen = {kind: min(found, key=lambda image: str(image.path)) for kind, found in by_kind.items()}
        label = chosen.pop(LABEL, None)
        modalities = {kind: chosen[kind] for kind in order(chosen)}
        cases.append(Case(case_id, patient_of(case_id), modalities, label, problems=tuple(problems)))
    lonely = sorted(file.image.path for labels in references.values() for file in labels)
    if not lonely:
        return cases, []
    remedy = "Name each reference like its image, or describe both with --modality image=SUFFIX --modality label=SUFFIX"
    problem = unused_files(lonely, "references that belong to no image", remedy)
    if cases and not any(case.label for case in cases):
        problem = replace(problem, is_fatal=True, left_out=tuple(map(str, lonely)))
    return cases, [problem]


def _references(files: Sequence[FoundFile], classes: Mapping[str, int]) -> list[ImageFile]:
    """The references of one case; masks of one class each are one reference, painted in the order of the classes."""
    parts = sorted((classes[file.shown], file.image.path) for file in files if file.shown)
    joined = [ImageFile(parts[0][1], parts=tuple(parts))] if parts else []
    return joined + [file.image for file in files if not file.shown]


def _several_files(kind: str, images: Iterable[ImageFile]) -> Problem:
    paths = sorted(image.path for image in images)
    what = "reference mask" if kind == LABEL else f"modality {kind}"
    found = f"{len(paths)} files for the {what}: {', '.join(path.name for path in paths)}"
    return Problem(str(paths[0].parent), found, f"Keep one of them, or name it with --modality {kind}=SUFFIX")


def build_cohort(
    listing: Listing,
    layout: str,
    cases: Sequence[Case],
    choice: SchemeChoice,
    *,
    modalities: Sequence[str] | None = None,
    problems: Iterable[Problem] = (),
    dims: int = 3,
    licence: str | None = None,
) -> Cohort:
    """A cohort whose cases all carry its label scheme; modalities default to those that any case has."""
    if modalities is None:
        modalities = in_channel_order(modality for case in cases for modality in case.images)
    return Cohort(
        root=listing.only or listing.root,
        layout=layout,
        scheme=choice.scheme,
        modalities=tuple(modalities),
        cases=tuple(replace(case, scheme=case.scheme or choice.scheme) for case in cases),
        problems=(*listing.problems, *problems, *choice.problems),
        dims=dims,
        licence=licence,
    )


def unused_files(paths: Sequence[Path], why: str, remedy: str = "", *, cases: Sequence[Case] | None = None) -> Problem:
    """A warning about files that are left out: how many, why, and the first few names.

    With `cases`, those that belong to none of them are its `left_out`.
    """
    names = some((path.name for path in paths), 3)
    count = f"{len(paths)} file" + ("s" if len(paths) != 1 else "")
    problem = warning(paths[0].parent, f"{count} left out, {why}: {names}", remedy)
    return problem if cases is None else replace(problem, left_out=tuple(map(str, _of_no_case(paths, cases))))


def _of_no_case(paths: Sequence[Path], cases: Sequence[Case]) -> list[Path]:
    """The files that are no masks, lie in no folder of a single case, and are not named after a case or its image."""
    owners: dict[Path, set[str]] = defaultdict(set)
    names: set[str] = set()
    for case in cases:
        names.add(case.id)
        for image in case.images.values():
            owners[image.path.parent].add(case.id)
            names.add(bare_name(image.path))

    def is_known(path: Path) -> bool:
        stem = bare_name(path)
        stems = [stem, *(stem[: match.start()] for match in re.finditer(r"[-_. ]+", stem))]
        is_mask = split_name(stem).kind in (LABEL, IGNORED)
        return (
            is_mask or any(len(owners.get(folder, ())) == 1 for folder in path.parents) or not names.isdisjoint(stems)
        )

    return [path for path in paths if not is_known(path)]


def channels_or_one(path: Path) -> int:
    """The number of channels of a file, 1 where it cannot be read: the check reports why."""
    try:
        return count_channels(path)
    except DataError:
        return 1


def matches_ending(path: Path, ending: str) -> bool:
    """Whether the name of a file, with or without suffix, ends in a text, or fits it where it has wildcards."""
    names = (bare_name(path).lower(), path.name.lower())
    if any(sign in ending for sign in "*?["):
        return any(fnmatch.fnmatchcase(name, ending.lower()) for name in names)
    return any(name.endswith(ending.lower()) for name in names)


def on_grid_of_reference(cases: Sequence[Case]) -> tuple[list[Case], list[Problem]]:
    """The cases without the modalities that are on another grid than their reference in all cases, and a warning.

    At least one modality must be on the grid of the reference; else all are kept, and the check reports the difference.
    """
    fits: dict[str, list[bool]] = defaultdict(list)
    for case in [case for case in cases if case.label is not None][:_SAMPLED_GRIDS]:
        with suppress(DataError):
            grid = read_grid(case.label.path) if case.label else None
            for name, image in case.images.items():
                fits[name].append(grid is not None and same_grid(read_grid(image.path), grid) is None)
    apart = [name for name, found in fits.items() if not any(found)]
    if not apart or len(apart) == len(fits):
        return list(cases), []
    paths = [case.images[name].path for case in cases for name in apart if name in case.images]
    why = f"as {', '.join(apart)} is on another grid than the references"
    images = [{name: image for name, image in case.images.items() if name not in apart} for case in cases]
    kept = [replace(case, images=own) if own else case for case, own in zip(cases, images, strict=True)]
    return kept, [unused_files(paths, why, "Resample it to the grid of the references to use it as a channel")]


def common_modalities(cases: Sequence[Case], named: Collection[str] = ()) -> tuple[tuple[str, ...], list[Problem]]:
    """Modalities, in channel order, that at least half of the cases have or that the user named; warnings about others.

    The cases keep their rare images for models that were trained with them.
    """
    counts = Counter(modality for case in cases for modality in case.images)
    common = {name for name, count in counts.items() if name in named or count >= LEAST_SHARE * len(cases)}
    rare: dict[tuple[Path, ...], list[str]] = defaultdict(list)
    for name in in_channel_order(name for name in counts if name not in common):
        rare[tuple(case.images[name].path for case in cases if name in case.images)].append(name)
    problems = []
    for paths, names in rare.items():
        why = f"in training: {len(paths)} of {len(cases)} cases have {', '.join(names)}"
        problems.append(unused_files(paths, why, f"Keep it with --modality {names[0]}=SUFFIX"))
    return in_channel_order(name for case in cases for name in case.images if name in common), problems
