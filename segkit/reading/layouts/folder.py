"""A plain folder of volumes: no convention, only names that people give (see `grouping` and `modality`).

Folders of pictures with masks: images/ and masks/ with equal stems, or pairs such as x.jpg and x_1stHO.png.

Colour pictures become three modalities, red, green and blue. Masks are PNG files of label values, 0 and 1, or 0 and
255; a value of 255 stays what it is, so that predicted masks look like the reference.
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from segkit.errors import DataError, Problem
from segkit.labels import classes_scheme
from segkit.reading.case import Cohort, ImageFile
from segkit.reading.files import count_channels, suffix_of
from segkit.reading.layouts.grouping import IMAGE, common_modalities, group_files, shared_suffix, without_nameless
from segkit.reading.layouts.layout import (
    FolderOptions,
    FoundFile,
    Layout,
    SchemeChoice,
    build_cases,
    build_cohort,
    unused_files,
)
from segkit.reading.layouts.listing import Listing, bare_name
from segkit.reading.layouts.schemes import scheme_by_values
from segkit.reading.modalities import IGNORED, LABEL, split_name

_TASK01_NAME = re.compile(r"^BRATS_\d{3}$")
_TASK01_CHANNELS = ("t2f", "t1n", "t1c", "t2w")
"""Channel order of the Decathlon's Task01_BrainTumour, for its files on their own."""


def _recognise(listing: Listing) -> float:
    if listing.volumes:
        return 0.3
    return 0.05 if any(path.is_dir() for path in listing.others) else 0.02


def _read(listing: Listing, options: FolderOptions) -> Cohort:
    channels = {name: int(pattern) for name, pattern in options.modalities.items() if pattern.isdigit()}
    patterns = {name: pattern for name, pattern in options.modalities.items() if name not in channels}
    grouping = group_files(listing.volumes, listing.root, patterns)
    found, problems = _with_channels(grouping.files, channels)
    files, nameless = without_nameless(found)
    cases, more = build_cases(files, patient_of=lambda case_id: grouping.patients[case_id])
    modalities, rare = common_modalities(cases, named=options.modalities)
    if ignored := [file.image.path for file in files if file.kind == IGNORED]:
        why = "fitting no --modality" if patterns else "neither an image nor a reference by their names"
        problems.append(unused_files(ignored, why, "Name modalities and reference with --modality name=suffix"))
    choice = scheme_by_values(cases, options, listing.root)
    problems += [*grouping.problems, *more, *nameless, *rare]
    return build_cohort(listing, "folder", cases, choice, modalities=modalities, problems=problems)


def _with_channels(files: Iterable[FoundFile], named: Mapping[str, int]) -> tuple[list[FoundFile], list[Problem]]:
    """Files of unknown modality that are 4D become one entry a channel, named by the user or by their number."""
    result: list[FoundFile] = []
    nameless: list[Path] = []
    for file in files:
        count = _channel_count(file.image.path) if file.kind == IMAGE else 1
        if count == 1:
            result.append(file)
            continue
        names = _channel_names(file.image.path, count, named)
        if names[0].startswith("channel_"):
            nameless.append(file.image.path)
        result += [
            FoundFile(file.case_id, file.folder, name, ImageFile(file.image.path, channel))
            for channel, name in enumerate(names)
        ]
    return result, [_nameless(nameless)] if nameless else []


def _channel_names(path: Path, count: int, named: Mapping[str, int]) -> Sequence[str]:
    name_of = {channel: name for name, channel in named.items()}
    if not named and count == len(_TASK01_CHANNELS) and _TASK01_NAME.match(bare_name(path)):
        return _TASK01_CHANNELS
    return [name_of.get(channel, f"channel_{channel}") for channel in range(count)]


def _channel_count(path: Path) -> int:
    try:
        return count_channels(path)
    except DataError:
        return 1  # the check reads the file itself and tells what is wrong with it


def _nameless(paths: Sequence[Path]) -> Problem:
    return Problem(
        str(paths[0]),
        "holds several channels, and nothing says which modality each of them is",
        "Name them by their number, such as --modality t2f=0 --modality t1n=1 --modality t1c=2 --modality t2w=3",
        is_fatal=False,
    )


FOLDER = Layout(
    "folder",
    "plain folder of volumes: a case a folder or a file, modalities by name or by --modality",
    "patient19/FLAIR.nii.gz, or p1_t1.nii.gz + p1_seg.nii.gz",
    _recognise,
    _read,
)

_PLANES = ("red", "green", "blue")
_PREFERENCE = (".tif", ".tiff", ".png", ".bmp", ".jpg", ".jpeg", ".gif")
"""Which of two pictures with one stem is the image: beside a photograph, a GIF is a field-of-view mask."""

_EYE = re.compile(r"^(?P<patient>.*\d)[-_. ]*(?P<side>L|R|OS|OD|left|right)$", re.IGNORECASE)
_SIDES = {"l": "left", "os": "left", "left": "left", "r": "right", "od": "right", "right": "right"}
"""What photographs of eyes are called; OS and OD are oculus sinister and dexter."""

_SECOND_READER = frozenset({"2ndho", "manual2"})
_FIELD_OF_VIEW = frozenset({"fov", "fov mask"})


def _recognise_pictures(listing: Listing) -> float:
    if not listing.pictures:
        return 0.0
    return 0.15 if listing.volumes else 0.3


def _read_pictures(listing: Listing, options: FolderOptions) -> Cohort:
    pictures, doubles = _one_per_stem(listing.pictures)
    grouping = group_files(pictures, listing.root, options.modalities)
    grouped, problems = grouping.files, list(grouping.problems)
    if not options.modalities and not any(file.kind == LABEL for file in grouped):
        suffix = shared_suffix(pictures)
        if suffix is not None:
            grouping = group_files(pictures, listing.root, {LABEL: suffix, IMAGE: "*"})
            grouped = grouping.files
            note = f"files that end in {suffix} are taken for the reference masks"
            remedy = "Name another suffix with --modality label=SUFFIX --modality image=SUFFIX"
            problems.append(Problem(str(listing.root), note, remedy, is_fatal=False))
    patients = join_both_eyes(grouping.patients)
    cases, more = build_cases(_with_planes(grouped), patient_of=lambda case_id: patients[case_id], order=_order)
    problems += _left_out([file.image.path for file in grouped if file.kind == IGNORED], doubles)
    choice = scheme_by_values(cases, options, listing.root)
    if choice.scheme is not None and list(choice.scheme.values) == ["label_1"]:
        choice = SchemeChoice(classes_scheme("classes", {"foreground": choice.scheme.values["label_1"]}))
    if choice.scheme is not None and len(choice.scheme.values) > 1 and (lossy := _lossy_mask(grouped)):
        choice = SchemeChoice(None, (lossy,))
    modalities = _order(modality for case in cases for modality in case.images)
    return build_cohort(listing, "folder2d", cases, choice, modalities=modalities, problems=(*problems, *more), dims=2)


def _left_out(ignored: Sequence[Path], doubles: Sequence[Path]) -> list[Problem]:
    """What is said of files that are neither images nor references: `doubles` have the stem of an image."""
    words = {path: split_name(bare_name(path)).word for path in ignored}
    readers = [path for path in ignored if words[path] in _SECOND_READER]
    views = [path for path in ignored if words[path] in _FIELD_OF_VIEW]
    views = sorted([*views, *(path for path in doubles if suffix_of(path) == ".gif")])
    copies = [path for path in doubles if suffix_of(path) != ".gif"]
    others = [path for path in ignored if path not in {*readers, *views}]
    problems = []
    if views:
        ending = _common_ending(views)
        remedy = f"`segkit evaluate --roi {shlex.quote(ending)}` scores inside them" if ending else ""
        problems.append(unused_files(views, "fields of view by their names", remedy))
    if readers:
        problems.append(unused_files(readers, "drawn by a second reader; the first is the reference"))
    if copies:
        problems.append(unused_files(copies, "with the name of another image"))
    if others:
        problems.append(unused_files(others, "neither an image nor the reference by their names"))
    return problems


def _common_ending(paths: Sequence[Path]) -> str:
    """How all names end from their last separator or suffix on (`.gif`, `_fov.png`), "" where they differ."""
    endings = {path.name[len(split_name(bare_name(path)).rest) :] for path in paths}
    return endings.pop() if len(endings) == 1 else ""


def _one_per_stem(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The images, and the files left out because a better one has the same folder and stem."""
    best: dict[tuple[Path, str], Path] = {}
    for path in sorted(paths, key=lambda path: _PREFERENCE.index(suffix_of(path))):
        best.setdefault((path.parent, bare_name(path)), path)
    kept = set(best.values())
    return sorted(kept), sorted(path for path in paths if path not in kept)


def _with_planes(files: Iterable[FoundFile]) -> Iterable[FoundFile]:
    """Colour pictures of unknown modality as one entry a plane; if any is in colour, grey ones count as colour too.

    A grey picture has the same grey in all three planes, so that folders which mix both stay usable.
    """
    files = list(files)
    is_colour = any(_is_colour(file.image.path) for file in files if file.kind == IMAGE)
    for file in files:
        if file.kind != IMAGE:
            yield file
        elif is_colour:
            for channel, plane in enumerate(_PLANES):
                yield FoundFile(file.case_id, file.folder, plane, ImageFile(file.image.path, channel))
        else:
            yield FoundFile(file.case_id, file.folder, "grey", file.image)


def _is_colour(path: Path) -> bool:
    try:
        return count_channels(path) == len(_PLANES)
    except DataError:
        return False  # the check reads the file itself and tells what is wrong with it


def _lossy_mask(files: Iterable[FoundFile]) -> Problem | None:
    """The problem of masks saved as JPEG, whose compression blurs 0 and 255 into many values."""
    masks = [file.image.path for file in files if file.kind == LABEL]
    jpeg = next((path for path in masks if suffix_of(path) in (".jpg", ".jpeg")), None)
    if jpeg is None:
        return None
    return Problem(str(jpeg), "the masks are JPEG pictures, whose compression changes label values", "Save them as PNG")


def _order(modalities: Iterable[str]) -> tuple[str, ...]:
    present = dict.fromkeys(modalities)
    planes = [plane for plane in _PLANES if plane in present]
    return (*planes, *(name for name in present if name not in _PLANES))


def join_both_eyes(patients: Mapping[str, str]) -> dict[str, str]:
    """Case id -> patient, the same for both eyes of one person (`Image_01L` and `Image_01R`) where both are there.

    A lone `scan_12L` keeps its own: a letter at the end says nothing as long as no case has the other.
    """
    eyes = {case_id: match for case_id in patients if (match := _EYE.match(case_id))}
    sides: dict[str, set[str]] = defaultdict(set)
    for match in eyes.values():
        sides[match["patient"]].add(_SIDES[match["side"].lower()])
    return {
        case_id: eyes[case_id]["patient"] if case_id in eyes and len(sides[eyes[case_id]["patient"]]) == 2 else own
        for case_id, own in patients.items()
    }


FOLDER2D = Layout(
    "folder2d",
    "2D pictures with masks: images/ + masks/, or pairs with a suffix",
    "images/x.png + masks/x.png, or x.jpg + x_mask.png",
    _recognise_pictures,
    _read_pictures,
)
