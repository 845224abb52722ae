"""Grouping of files without naming convention into cases, with the id and patient of each.

Three arrangements are recognised: a folder for each case (`patient19/FLAIR.nii.gz`), all cases in one folder with
suffixes (`p1_t1.nii.gz`, `p1_seg.nii.gz`), and a folder for each kind (`images/p1.png`, `masks/p1.png`,
`T1/p1.nii.gz`). The folder for a kind may hold subfolders (`images/train/p1.png`, `masks/train/p1.png`): it is left out
of the path when files are compared (`train/p1.png`).

A case id is the name of the case folder or file, preceded by as many folders above it as make it unique (`P1/MR` and
`P2/MR` are `P1_MR` and `P2_MR`).
"""

import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from segkit.errors import Problem
from segkit.reading.case import (
    BRATS_MODALITIES,
    IGNORED,
    LABEL,
    ImageFile,
    NameParts,
    canonical_modality,
    kind_of,
    split_name,
)
from segkit.reading.layouts.layout import UNASSIGNED, FoundFile, bare_name, unused_files
from segkit.reading.layouts.pairs import (
    Place,
    holds_references,
    identity,
    is_class_name,
    is_companion,
    is_label_map,
    matched_by_wildcards,
    pair_by_identity,
)
from segkit.reading.layouts.patients import is_session, name_cases

IMAGE = "image"
"""The modality of a file whose name contains none."""

_IMAGE_FOLDERS = frozenset({"image", "images", "img", "imgs", "imagestr", "imagests", "scans", "volumes", "input"})
_LABEL_FOLDERS = frozenset(
    {"label", "labels", "labelstr", "mask", "masks", "segmentation", "segmentations", "seg", "segs", "gt"}
    | {"annotations", "ground_truth", "groundtruth", "references", "1st_manual", "manual1", "manual", "targets"}
    | {"structures", "organs", "rois", "contours", "rtstruct", "ann", "annos", "groundtruths"}
)
_KIND_FOLDERS = _IMAGE_FOLDERS | _LABEL_FOLDERS
_SECOND_READERS = frozenset({"2nd_manual", "manual2", "2nd_annotator", "labels-vk"})
"""Folders of masks by a second reader; the last one is of STARE."""
_UNPROCESSED, _PROCESSED = frozenset({"orig", "original", "raw"}), frozenset({"pre", "preprocessed", "processed"})
"""Folders with the same scans of a case, such as of WMH; references are on the grid of the processed ones."""
_LAST_CHOICE = frozenset({"mask", "masks"})
"""Not references where another folder for references exists: then they hold fields of view or masks of organs."""
_SUBSET = re.compile(r"[-_. ]+(training|train|validation|val|testing|test)$", re.IGNORECASE)
"""The part of the data in names of images, which references lack (`21_training`, `21_manual1`)."""
_TIME_POINT = re.compile(r"(?:.*[-_. ])?t(?P<number>\d)", re.IGNORECASE)
"""T1 and T2 at the end of a name are sequences, unless T0, T3 or a higher number is at the end of another."""


@dataclass(frozen=True)
class Grouping:
    """Files with their case ids, the patient of each case id, and warnings about files left out."""

    files: list[FoundFile]
    patients: dict[str, str]
    problems: list[Problem]


@dataclass(frozen=True)
class _Item:
    """A file, the folder that may hold its whole case, and its name without the kind (`rest`).

    `kind_folder` is the folder for images or references that the file is in; `folder` is the path without that part.
    """

    path: Path
    folder: Path
    kind: str | None
    rest: str
    is_leading: bool = False
    kind_folder: Path | None = None
    shown: str = ""

    @property
    def kind_name(self) -> str:
        return "" if self.kind_folder is None else self.kind_folder.name.lower()

    @property
    def is_reference(self) -> bool:
        return self.kind_name in _LABEL_FOLDERS

    @property
    def place(self) -> Place:
        return Place(self.path, self.folder, self.rest)


def group_files(paths: Sequence[Path], root: Path, patterns: Mapping[str, str]) -> Grouping:
    """Group files into cases by their names and folders.

    `patterns` (modality to suffix, or glob where it has `*`, `?` or `[`) replaces the known synonyms where it is given;
    files that match no pattern are IGNORED. Files whose name contains no kind are of the kind IMAGE.
    """
    problems: list[Problem] = []
    if patterns:
        items = [_by_pattern(path, patterns) for path in paths]
    else:
        has_times = _has_time_points(paths, root)
        items, problems = _pair_kind_folders([_by_name(path, root, has_times) for path in paths])
        items = _pair_others(_with_reference_folders(_with_other_sequences(items), root))
    items = _ignore_companions(items)
    folders: dict[Path, list[_Item]] = defaultdict(list)
    for item in items:
        if item.kind not in (IGNORED, UNASSIGNED):
            folders[item.folder].append(item)
    groups = [
        (folder, key, own) for folder, members in folders.items() for key, own in _cases_in(folder, members, root)
    ]
    names = name_cases([(folder, key) for folder, key, _ in groups], root)
    files = [
        FoundFile(case_id, folder, item.kind or IMAGE, ImageFile(item.path), item.shown)
        for (case_id, _), (folder, _, own) in zip(names, groups, strict=True)
        for item in own
    ]
    used = {file.image.path for file in files}
    left = [item for item in items if item.path not in used]
    for item in left:
        kind = item.kind if item.kind in (IGNORED, LABEL) else UNASSIGNED
        files.append(FoundFile("", item.folder, kind, ImageFile(item.path)))
    return Grouping(files, dict(names), problems)


def shared_suffix(paths: Sequence[Path]) -> str | None:
    """The suffix that most often pairs two files of a folder (`_vessels`); None where it pairs under 2/3 of them."""
    stems = {(path.parent, bare_name(path)) for path in paths}
    counts: Counter[str] = Counter()
    for folder, stem in stems:
        counts.update(stem[len(base) :] for base in _shorter_stems(stem) if (folder, base) in stems)
    (suffix, count), *others = counts.most_common(2) or [("", 0)]
    is_alone = not others or others[0][1] < count
    return suffix if is_alone and count * 3 >= len(stems) else None


def _by_pattern(path: Path, patterns: Mapping[str, str]) -> _Item:
    for name, pattern in sorted(patterns.items(), key=lambda pair: -len(pair[1])):
        kind = LABEL if kind_of(name) == LABEL or name == "reference" else name
        wanted = pattern.lower()
        if any(sign in wanted for sign in "*?["):
            if (rest := matched_by_wildcards(bare_name(path), path.name, wanted)) is not None:
                return _Item(path, path.parent, kind, rest, is_leading=True)
            continue
        for text in (bare_name(path), path.name):
            if text.lower().endswith(wanted):
                rest = text[: len(text) - len(wanted)].rstrip("-_. ")
                return _Item(path, path.parent, kind, rest, is_leading=not rest)
    return _Item(path, path.parent, UNASSIGNED, bare_name(path))


def _has_time_points(paths: Sequence[Path], root: Path) -> bool:
    names = {name for path in paths for name in (bare_name(path), *path.relative_to(root).parts[:-1])}
    return any(match["number"] not in "12" for match in map(_TIME_POINT.fullmatch, names) if match)


def _is_unprocessed(path: Path) -> bool:
    return path.parent.name.lower() in _UNPROCESSED and any(
        (path.parent.parent / folder / path.name).exists() for folder in _PROCESSED
    )


def _by_name(path: Path, root: Path, has_times: bool) -> _Item:
    name = bare_name(path)
    if _SECOND_READERS & {folder.lower() for folder in path.relative_to(root).parts[:-1]} or _is_unprocessed(path):
        return _Item(path, path.parent, IGNORED, name)
    parts = NameParts(None, name) if has_times and _TIME_POINT.fullmatch(name) else split_name(name)
    above = path.relative_to(root).parts[:-1]
    if has_times and above and _TIME_POINT.fullmatch(above[-1]):
        return _Item(path, path.parent, parts.kind, parts.rest, parts.is_leading)
    index = next((at for at in reversed(range(len(above))) if above[at].lower() in _KIND_FOLDERS), None)
    if index is None:
        if above and parts.kind is None and (modality := canonical_modality(above[-1])):
            return _Item(path, path.parent.parent, modality, parts.rest)
        return _Item(path, path.parent, parts.kind, parts.rest, parts.is_leading)
    folder = root.joinpath(*above[:index], *above[index + 1 :])
    kind_folder = root.joinpath(*above[: index + 1])
    if above[index].lower() in _LABEL_FOLDERS:
        rest = parts.rest if parts.kind in (LABEL, None) else name
        return _Item(path, folder, LABEL, rest, kind_folder=kind_folder)
    if index + 1 < len(above) and parts.kind is None and (modality := canonical_modality(above[-1])):
        return _Item(path, folder.parent, modality, parts.rest, kind_folder=kind_folder)
    return _Item(path, folder, parts.kind, parts.rest, kind_folder=kind_folder)


def _pair_kind_folders(items: Sequence[_Item]) -> tuple[list[_Item], list[Problem]]:
    """Give references and images in folders for their kind the same `rest`; warn of those without a partner."""
    by_folder: dict[Path, list[_Item]] = defaultdict(list)
    for item in items:
        if item.kind_folder is not None:
            by_folder[item.folder].append(item)
    names_by_folder = ({item.kind_name for item in members if item.is_reference} for members in by_folder.values())
    unused_names = {name for names in names_by_folder if names - _LAST_CHOICE for name in names & _LAST_CHOICE}
    paired = [item for item in items if item.kind_folder is None]
    unused: list[Path] = []
    lonely: list[Path] = []
    for members in by_folder.values():
        lost = {item.path for item in members if item.kind_name in unused_names}
        unused += sorted(lost)
        images, references = _paired([item for item in members if item.path not in lost])
        paired += [*images, *references]
        if lost:
            known = {item.rest for item in references}
            lonely += sorted(item.path for item in images if item.rest not in known)
    problems = []
    if unused:
        folder = shlex.quote(str(unused[0].parent))
        remedy = f"Where they are fields of view, `segkit evaluate --roi {folder}` scores inside them"
        problems.append(unused_files(unused, "as another folder beside theirs holds the references", remedy))
    if lonely:
        problems.append(unused_files(lonely, "in training: no reference in the folder of the references"))
    return paired, problems


def _paired(items: Sequence[_Item]) -> tuple[list[_Item], list[_Item]]:
    """Images and references of one folder, each pair with the same `rest`."""
    references = [item for item in items if item.is_reference]
    named = [item for item in items if not item.is_reference and item.kind == LABEL]
    images = [item for item in items if not item.is_reference and item.kind != LABEL]
    plain = set() if references else {(item.path.parent, item.rest) for item in images}
    for item in named:  # in a folder for images, a file named as a reference is one only beside its image
        is_reference = (item.path.parent, item.rest) in plain
        references += [item] if is_reference else []
        images += [] if is_reference else [replace(item, kind=None, rest=bare_name(item.path))]
    rest_of = {bare_name(item.path): item.rest for item in images}
    references = [replace(item, rest=rest_of.get(bare_name(item.path), item.rest)) for item in references]
    known = {item.rest for item in references}
    shorter = {item.path: _SUBSET.sub("", item.rest) for item in images}
    return [
        replace(item, rest=shorter[item.path]) if item.rest not in known and shorter[item.path] in known else item
        for item in images
    ], references


def _with_other_sequences(items: Sequence[_Item]) -> list[_Item]:
    """Images of unknown sequence (`p1_ADC`) and copies (`p1_T1_bias`) become files of the case of `p1_T1`."""
    known: dict[Path, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for item in items:
        if item.kind in BRATS_MODALITIES and not item.is_leading:
            known[item.path.parent][item.rest].add(item.kind)

    def joined(item: _Item) -> _Item:
        own = known.get(item.path.parent, {})
        base = next((base for base in _shorter_stems(item.rest) if base in own), None)
        if base is None or not item.rest[len(base) :].strip("-_. ").isalpha() or is_session(item.rest[len(base) :]):
            return item
        if item.kind is None:
            return replace(item, rest=base)
        is_copy = item.kind in own[base] and len(own[item.rest]) < len(own[base])
        return replace(item, kind=IGNORED) if is_copy else item

    return [joined(item) for item in items]


def _with_reference_folders(items: Sequence[_Item], root: Path) -> list[_Item]:
    """Files as references that are in a folder named as one (`Training_GroundTruth`) and belong to images elsewhere."""
    folders: dict[Path, list[_Item]] = defaultdict(list)
    if items:  # the name of a folder of scans and masks (`A. Segmentation`) says nothing
        root = Path(os.path.commonpath([item.path.parent for item in items]))
    for item in items:
        if item.kind_folder is None and item.kind in (None, LABEL):
            above = (folder for folder in item.path.parents if root in folder.parents and holds_references(folder.name))
            if (folder := next(above, None)) is not None:
                folders[folder].append(item)
    if sum(map(len, folders.values())) == len(items):  # scans too, in a folder such as `CT-Seg_20cases`
        folders = {folder: own for folder, own in folders.items() if is_label_map(own[0].path)}
    inside = {item.path for own in folders.values() for item in own}
    images = [item.place for item in items if item.kind not in (LABEL, IGNORED) and item.path not in inside]
    changed: dict[Path, _Item] = {}
    for folder, own in folders.items():
        partners = pair_by_identity([item.place for item in own], images)
        if 2 * len(partners) >= len(own):
            changed |= {item.path: replace(item, kind=LABEL, kind_folder=folder) for item in own}
    return [changed.get(item.path, item) for item in items]


def _pair_others(items: Sequence[_Item]) -> list[_Item]:
    """References without an image of their name get the folder and name of the image with the same identity."""
    images = [item.place for item in items if item.kind not in (LABEL, IGNORED)]
    named = {(image.folder, image.rest) for image in images}
    references = [item.place for item in items if item.kind == LABEL]
    taken = named & {(place.folder, place.rest) for place in references}
    lonely = [place for place in references if (place.folder, place.rest) not in named]
    partners = pair_by_identity(lonely, images)
    partners = {path: own for path, own in partners.items() if (own.image.folder, own.image.rest) not in taken}
    shown = {partner.shown for partner in partners.values()}
    if len(shown - {""}) == 1 and (taken or "" in shown):  # not a class, where other references show all of them
        partners = {path: partner._replace(shown="") for path, partner in partners.items()}

    def paired(item: _Item) -> _Item:
        if (partner := partners.get(item.path)) is None:
            return item
        place = partner.image
        return replace(item, folder=place.folder, rest=place.rest, is_leading=False, shown=partner.shown)

    return [paired(item) for item in items]


def _ignore_companions(items: Sequence[_Item]) -> list[_Item]:
    """Mark files named after a scan plus more words (`scan1_prediction`) as IGNORED, if they are masks of it.

    Masks of no known word that most scans have (`scan1_liver`, `scan1_spleen`) are references, of a class each.
    """
    scans: dict[Path, dict[tuple[str, ...], _Item]] = defaultdict(dict)
    for item in items:
        if item.kind is None:
            scans[item.path.parent].setdefault(identity(item.rest), item)
    masks: dict[Path, tuple[_Item, str]] = {}
    for item in items:
        own = identity(item.rest) if item.kind is None else ()
        shorter = (scans[item.path.parent].get(own[:length]) for length in range(len(own) - 1, -1, -1))
        scan = next((scan for scan in shorter if scan is not None), None)
        if scan is not None and is_companion(item.path, scan.path):
            pairs = takewhile(lambda pair: pair[0] == pair[1], zip(item.rest, scan.rest, strict=False))
            masks[item.path] = (scan, item.rest[len(list(pairs)) :].strip("-_. "))
    endings: dict[str, set[Path]] = defaultdict(set)
    for scan, ending in masks.values():
        endings[ending].add(scan.path)
    others = {item.path for item in items if item.kind is None and item.path not in masks}
    shown = {ending for ending, own in endings.items() if 2 * len(own) >= len(others) and is_class_name(ending)}
    has_references = any(item.kind == LABEL for item in items)

    def marked(item: _Item) -> _Item:
        if item.path not in masks:
            return item
        scan, ending = masks[item.path]
        if has_references or ending not in shown or not is_label_map(item.path):
            return replace(item, kind=IGNORED)
        return replace(item, kind=LABEL, rest=scan.rest, shown=ending if len(shown) > 1 else "")

    return [marked(item) for item in items]


def _shorter_stems(stem: str) -> list[str]:
    return [stem[: match.start()] for match in re.finditer(r"[-_. ]+", stem) if match.start() > 0]


def _keys(items: Sequence[_Item]) -> set[str]:
    """The `rest` of each case in a folder; empty where the folder is a single case."""
    is_case = any(not item.rest and item.kind not in (None, LABEL) for item in items)  # T1.nii.gz, and DWI beside it
    firm = {item.rest for item in items if item.rest and not item.is_leading and (item.kind is not None or not is_case)}
    leading = Counter(item.kind for item in items if item.is_leading)
    if firm or any(count > 1 for count in leading.values()):
        firm |= {item.rest for item in items if item.is_leading and item.rest}
    return firm if len(firm) > 1 else set()


def _cases_in(folder: Path, items: Sequence[_Item], root: Path) -> Iterable[tuple[str, list[_Item]]]:
    """(name in the folder, files) for each case of one folder; the name is empty where the folder is the case."""
    if keys := _keys(items):
        yield from ((key, [item for item in items if item.rest == key]) for key in sorted(keys))
        return
    rests = sorted({item.rest for item in items if item.rest and not item.is_leading})
    has_own_folder = folder != root or any(item.kind for item in items if not item.rest or item.is_leading)
    yield ("" if has_own_folder else (rests or [root.name])[0]), list(items)
