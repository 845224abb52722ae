"""Plain folders without a naming convention: `folder` for volumes, `folder2d` for pictures with masks.

Files are grouped into cases by their names (see `grouping`). Colour pictures become three modalities: red, green and
blue. A label value of 255 in masks is kept, so that predicted masks look like the reference.
"""

import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from segkit.errors import Problem, warning
from segkit.labels import classes_scheme
from segkit.reading.case import IGNORED, LABEL, Case, Cohort, ImageFile, split_name
from segkit.reading.files import suffix_of
from segkit.reading.layouts.grouping import IMAGE, group_files, shared_suffix
from segkit.reading.layouts.layout import (
    LEAST_SHARE,
    UNASSIGNED,
    FolderOptions,
    FoundFile,
    Layout,
    Listing,
    SchemeChoice,
    bare_name,
    build_cases,
    build_cohort,
    channels_or_one,
    common_modalities,
    unused_files,
)
from segkit.reading.layouts.schemes import scheme_by_classes, scheme_by_values

_NAMELESS = re.compile(rf"^({IMAGE}|channel_\d+)$")
_TASK01_NAME = re.compile(r"^BRATS_\d{3}$")
_TASK01_CHANNELS = ("t2f", "t1n", "t1c", "t2w")
"""Channel order of the Decathlon's Task01_BrainTumour, for its files without their `dataset.json`."""
_PLANES = ("red", "green", "blue")
_PREFERENCE = (".tif", ".tiff", ".png", ".bmp", ".ppm", ".pgm", ".jpg", ".jpeg", ".gif")
"""Which of two pictures with one stem is the image: beside a photograph, a GIF is a field-of-view mask."""
_EYE = re.compile(r"^(?P<patient>.*\d)[-_. ]*(?P<side>L|R|OS|OD|left|right)$", re.IGNORECASE)
_SIDES = {"l": "left", "os": "left", "left": "left", "r": "right", "od": "right", "right": "right"}
"""Sides in names of eye photographs; OS and OD are oculus sinister and dexter."""
_SECOND_READER = frozenset({"2ndho", "manual2"})
_FIELD_OF_VIEW = frozenset({"fov", "fov mask"})


def _recognise_volumes(listing: Listing) -> float:
    return 0.3 if listing.volumes else 0.05 if any(path.is_dir() for path in listing.others) else 0.02


def _read_volumes(listing: Listing, options: FolderOptions) -> Cohort:
    channels = {int(pattern): name for name, pattern in options.modalities.items() if pattern.isdigit()}
    patterns = {name: pattern for name, pattern in options.modalities.items() if not pattern.isdigit()}
    grouping = group_files(listing.volumes, listing.root, patterns)
    found, problems = _split_channels(grouping.files, channels)
    files, nameless = _without_nameless(found)
    cases, more = build_cases(files, patient_of=lambda case_id: grouping.patients[case_id])
    modalities, rare = common_modalities(cases, named=options.modalities)
    why = "fitting no --modality" if patterns else "neither an image nor a reference by their names"
    remedy = "Name modalities and reference with --modality name=suffix"
    problems += _left_out_of(files, cases, why, remedy)
    if nameless:
        why, remedy = "as their modality is not in their names", "Keep it with --modality NAME=SUFFIX"
        more.append(unused_files(nameless, why, remedy, cases=cases))
    choice = scheme_by_classes(files, options) or scheme_by_values(cases, options, listing.root)
    problems += [*grouping.problems, *more, *rare]
    return build_cohort(listing, "folder", cases, choice, modalities=modalities, problems=problems)


def _split_channels(files: Iterable[FoundFile], named: Mapping[int, str]) -> tuple[list[FoundFile], list[Problem]]:
    """4D files of unknown modality as one entry for each channel, named by the user or by its number."""
    result: list[FoundFile] = []
    nameless: list[Path] = []
    for file in files:
        path = file.image.path
        count = channels_or_one(path) if file.kind == IMAGE else 1
        if count == 1:
            result.append(file)
            continue
        names: Sequence[str] = [named.get(channel, f"channel_{channel}") for channel in range(count)]
        if not named and count == len(_TASK01_CHANNELS) and _TASK01_NAME.match(bare_name(path)):
            names = _TASK01_CHANNELS
        if names[0].startswith("channel_"):
            nameless.append(path)
        images = [ImageFile(path, channel) for channel in range(count)]
        result += [FoundFile(file.case_id, file.folder, *pair) for pair in zip(names, images, strict=True)]
    note = "holds several channels, and nothing says which modality each of them is"
    remedy = "Name them by their number, such as --modality t2f=0 --modality t1n=1 --modality t1c=2 --modality t2w=3"
    return result, [warning(nameless[0], note, remedy)] if nameless else []


def _left_out_of(files: Sequence[FoundFile], cases: Sequence[Case], why: str, remedy: str) -> list[Problem]:
    """A warning about the files of no case: those with names of masks and the like, and images that fit none."""
    left = [file.image.path for file in files if file.kind in (IGNORED, UNASSIGNED)]
    unassigned = {file.image.path for file in files if file.kind == UNASSIGNED}
    problem = unused_files(left, why, remedy, cases=cases) if left else None
    if problem is None:
        return []
    return [replace(problem, left_out=tuple(path for path in problem.left_out if Path(path) in unassigned))]


def _without_nameless(files: Sequence[FoundFile]) -> tuple[list[FoundFile], list[Path]]:
    """The files without images of unknown modality, where most cases have known ones, and those removed."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for file in files:
        if file.kind not in (LABEL, IGNORED, UNASSIGNED):
            kinds[file.case_id].add(file.kind)
    named = sum(1 for found in kinds.values() if any(not _NAMELESS.match(kind) for kind in found))
    if named == 0 or named < LEAST_SHARE * len(kinds):
        return list(files), []
    kept = [file for file in files if not _NAMELESS.match(file.kind)]
    return kept, sorted({file.image.path for file in files} - {file.image.path for file in kept})


FOLDER = Layout(
    "folder",
    "plain folder of volumes: a case a folder or a file, modalities by name or by --modality",
    "patient19/FLAIR.nii.gz, or p1_t1.nii.gz + p1_seg.nii.gz",
    _recognise_volumes,
    _read_volumes,
)


def _recognise_pictures(listing: Listing) -> float:
    return 0.0 if not listing.pictures else 0.15 if listing.volumes else 0.3


def _read_pictures(listing: Listing, options: FolderOptions) -> Cohort:
    pictures, doubles = _one_per_stem(listing.pictures)
    grouping = group_files(pictures, listing.root, options.modalities)
    problems = list(grouping.problems)
    has_references = any(file.kind == LABEL for file in grouping.files)
    if not options.modalities and not has_references and (suffix := shared_suffix(pictures)) is not None:
        grouping = group_files(pictures, listing.root, {LABEL: suffix, IMAGE: "*"})
        note = f"files that end in {suffix} are taken for the reference masks"
        remedy = "Name another suffix with --modality label=SUFFIX --modality image=SUFFIX"
        problems.append(warning(listing.root, note, remedy))
    patients = join_both_eyes(grouping.patients)
    files = list(_split_planes(grouping.files))
    cases, more = build_cases(files, patient_of=lambda case_id: patients[case_id], order=_plane_order)
    problems += _left_out([file.image.path for file in grouping.files if file.kind == IGNORED], doubles)
    strays = [file for file in grouping.files if file.kind == UNASSIGNED]
    problems += _left_out_of(strays, cases, "which fit no case", "Describe them with --modality name=suffix")
    choice = scheme_by_classes(files, options) or scheme_by_values(cases, options, listing.root)
    values = {} if choice.scheme is None else choice.scheme.values
    if list(values) == ["label_1"]:
        choice = SchemeChoice(classes_scheme("classes", {"foreground": values["label_1"]}))
    elif len(values) > 1 and (lossy := _lossy_mask(grouping.files)):
        choice = SchemeChoice(None, (lossy,))
    modalities = _plane_order(modality for case in cases for modality in case.images)
    return build_cohort(listing, "folder2d", cases, choice, modalities=modalities, problems=(*problems, *more), dims=2)


def _one_per_stem(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The images, and the files left out because a better one has the same folder and stem."""
    best: dict[tuple[Path, str], Path] = {}
    for path in sorted(paths, key=lambda path: _PREFERENCE.index(suffix_of(path))):
        best.setdefault((path.parent, bare_name(path)), path)
    kept = set(best.values())
    return sorted(kept), sorted(path for path in paths if path not in kept)


def _split_planes(files: Sequence[FoundFile]) -> Iterable[FoundFile]:
    """Pictures of unknown modality as one entry for each plane if any of them is in colour, else as grey.

    A grey picture has the same grey in all three planes, so that a folder may hold both.
    """
    is_colour = any(channels_or_one(file.image.path) == len(_PLANES) for file in files if file.kind == IMAGE)
    for file in files:
        if file.kind != IMAGE:
            yield file
        elif is_colour:
            for channel, plane in enumerate(_PLANES):
                yield FoundFile(file.case_id, file.folder, plane, ImageFile(file.image.path, channel))
        else:
            yield FoundFile(file.case_id, file.folder, "grey", file.image)


def _plane_order(modalities: Iterable[str]) -> tuple[str, ...]:
    present = dict.fromkeys(modalities)
    planes = [plane for plane in _PLANES if plane in present]
    return (*planes, *(name for name in present if name not in _PLANES))


def _left_out(ignored: Sequence[Path], doubles: Sequence[Path]) -> list[Problem]:
    """Warnings about files that are neither images nor references; `doubles` have the stem of an image."""
    words = {path: split_name(bare_name(path)).word for path in ignored}
    readers = [path for path in ignored if words[path] in _SECOND_READER]
    views = [path for path in ignored if words[path] in _FIELD_OF_VIEW]
    views = sorted([*views, *(path for path in doubles if suffix_of(path) == ".gif")])
    copies = [path for path in doubles if suffix_of(path) != ".gif"]
    others = [path for path in ignored if path not in {*readers, *views}]
    # How the names end from the last separator or suffix on (`.gif`, `_fov.png`).
    endings = {path.name[len(split_name(bare_name(path)).rest) :] for path in views}
    remedy = f"`segkit evaluate --roi {shlex.quote(*endings)}` scores inside them" if len(endings) == 1 else ""
    reasons = (
        (views, "fields of view by their names", remedy),
        (readers, "drawn by a second reader; the first is the reference", ""),
        (copies, "with the name of another image", ""),
        (others, "neither an image nor the reference by their names", ""),
    )
    return [unused_files(paths, why, remedy) for paths, why, remedy in reasons if paths]


def _lossy_mask(files: Iterable[FoundFile]) -> Problem | None:
    found = "the masks are JPEG pictures, whose compression changes label values"
    masks = [file.image.path for file in files if file.kind == LABEL]
    jpeg = next((path for path in masks if suffix_of(path) in (".jpg", ".jpeg")), None)
    return None if jpeg is None else Problem(str(jpeg), found, "Save them as PNG")


def join_both_eyes(patients: Mapping[str, str]) -> dict[str, str]:
    """Case id -> patient, the same for both eyes of one person (`Image_01L` and `Image_01R`) where both are there.

    A lone `scan_12L` keeps its own patient: without the other side, the letter may mean anything.
    """
    persons: dict[str, str] = {}
    sides: dict[str, set[str]] = defaultdict(set)
    for case_id in patients:
        if match := _EYE.match(case_id):
            persons[case_id] = match["patient"]
            sides[match["patient"]].add(_SIDES[match["side"].lower()])
    both = {case_id: person for case_id, person in persons.items() if len(sides[person]) == 2}
    return {case_id: both.get(case_id, own) for case_id, own in patients.items()}


FOLDER2D = Layout(
    "folder2d",
    "2D pictures with masks: images/ + masks/, or pairs with a suffix",
    "images/x.png + masks/x.png, or x.jpg + x_mask.png",
    _recognise_pictures,
    _read_pictures,
)
