"""Which files of a folder without convention belong to one case.

Three habits are understood: a folder for each case (`patient19/FLAIR.nii.gz`), all cases in one folder with suffixes
(`p1_t1.nii.gz`, `p1_seg.nii.gz`), and a folder for each kind (`images/p1.png`, `masks/p1.png`, `T1/p1.nii.gz`).
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from segkit.data.case import ImageFile
from segkit.data.layouts.layout import FoundFile
from segkit.data.layouts.listing import bare_name
from segkit.data.layouts.modality import IGNORED, LABEL, canonical_modality, kind_of, split_name

IMAGE = "image"
"""The modality of a file whose name tells none."""

_IMAGE_FOLDERS = frozenset({"image", "images", "img", "imgs", "imagestr", "imagests", "scans", "volumes", "input"})
_LABEL_FOLDERS = frozenset(
    {"label", "labels", "labelstr", "mask", "masks", "segmentation", "segmentations", "seg", "segs", "gt"}
    | {"annotations", "ground_truth", "groundtruth", "references", "1st_manual", "manual", "targets"}
)
_SESSION = re.compile(
    r"^(ses|session|visit|tp|timepoint|time|scan|baseline|followup|week|month|year)?[-_ ]?\d*$", re.IGNORECASE
)


@dataclass(frozen=True)
class _Item:
    """A file, the folder that may hold its whole case, and what its name leaves when the kind is taken away."""

    path: Path
    folder: Path
    kind: str | None
    rest: str
    is_leading: bool = False
    is_sorted: bool = False
    """Whether the folder's name gave the kind, so that the rest identifies the case."""


def group_files(
    paths: Sequence[Path], root: Path, patterns: Mapping[str, str]
) -> tuple[list[FoundFile], dict[str, str]]:
    """Cases of files by their names and folders, and the patient of each case id.

    `patterns` (modality to suffix, or glob where it has `*`, `?` or `[`) replaces the synonyms where it is given;
    files that no pattern fits are IGNORED. The kind of a file whose name tells nothing is IMAGE.
    """
    items = [_by_pattern(path, patterns) for path in paths] if patterns else [_by_name(path, root) for path in paths]
    folders: dict[Path, list[_Item]] = defaultdict(list)
    left = {item.path: item.folder for item in items}
    for item in _tell_companions(items):
        if item.kind != IGNORED:
            folders[item.folder].append(item)
    counts = Counter(key for members in folders.values() for key in _keys(members))
    repeated = {key for key, count in counts.items() if count > 1}
    files: list[FoundFile] = []
    patients: dict[str, str] = {}
    for folder, members in folders.items():
        for case_id, patient, own in _cases_in(folder, members, root, repeated):
            patients[case_id] = patient
            for item in own:
                files.append(FoundFile(case_id, folder, item.kind or IMAGE, ImageFile(item.path)))
                del left[item.path]
    files += [FoundFile("", folder, IGNORED, ImageFile(path)) for path, folder in left.items()]
    return files, patients


def shared_suffix(paths: Sequence[Path]) -> str | None:
    """The one suffix that pairs files with others of the same folder (`_vessels`), where it fits half of them."""
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
            if fnmatch.fnmatch(path.name.lower(), wanted):
                return _Item(path, path.parent, kind, split_name(bare_name(path)).rest, is_leading=True)
            continue
        for text in (bare_name(path), path.name):
            if text.lower().endswith(wanted):
                rest = text[: len(text) - len(wanted)].rstrip("-_. ")
                return _Item(path, path.parent, kind, rest, is_leading=not rest)
    return _Item(path, path.parent, IGNORED, bare_name(path))


def _by_name(path: Path, root: Path) -> _Item:
    parts = split_name(bare_name(path))
    folder, name = path.parent, path.parent.name.lower()
    if folder == root:
        return _Item(path, folder, parts.kind, parts.rest, parts.is_leading)
    if name in _LABEL_FOLDERS:
        rest = parts.rest if parts.kind in (LABEL, None) and parts.rest else bare_name(path)
        return _Item(path, folder.parent, LABEL, rest, is_sorted=True)
    if name in _IMAGE_FOLDERS:
        rest = parts.rest or bare_name(path)
        return _Item(path, folder.parent, parts.kind, rest, is_sorted=True)
    if parts.kind is None and (modality := canonical_modality(name)):
        return _Item(path, folder.parent, modality, parts.rest, is_sorted=True)
    return _Item(path, folder, parts.kind, parts.rest, parts.is_leading)


def _tell_companions(items: Iterable[_Item]) -> list[_Item]:
    """Mark files named after another file plus something unknown (`scan1_prediction` beside `scan1`) as IGNORED."""
    items = list(items)
    images = {(item.path.parent, item.rest) for item in items if item.kind is None}
    return [
        replace(item, kind=IGNORED)
        if item.kind is None and any((item.path.parent, base) in images for base in _shorter_stems(item.rest))
        else item
        for item in items
    ]


def _shorter_stems(stem: str) -> list[str]:
    return [stem[: match.start()] for match in re.finditer(r"[-_. ]+", stem) if match.start() > 0]


def _keys(items: Sequence[_Item]) -> set[str]:
    """The names that tell the cases of one folder apart, empty where it holds a single case."""
    firm = {item.rest for item in items if item.rest and not item.is_leading}
    leading = Counter(item.kind for item in items if item.is_leading)
    if firm or any(count > 1 for count in leading.values()):
        firm |= {item.rest for item in items if item.is_leading and item.rest}
    return firm if len(firm) > 1 else set()


def _cases_in(
    folder: Path, items: Sequence[_Item], root: Path, repeated: set[str]
) -> Iterable[tuple[str, str, list[_Item]]]:
    """(case id, patient, files) for each case of one folder."""
    keys = _keys(items)
    if keys:
        for key in sorted(keys):
            case_id = f"{folder.name}_{key}" if key in repeated and folder != root else key
            yield case_id, case_id, [item for item in items if item.rest == key]
        return
    rests = sorted({item.rest for item in items if item.rest and not item.is_leading})
    has_own_folder = folder != root or any(item.kind for item in items if not item.rest or item.is_leading)
    name = folder.name if has_own_folder or not rests else rests[0]
    if _SESSION.match(name) and folder != root and folder.parent != root:
        yield f"{folder.parent.name}_{name}", folder.parent.name, list(items)
    else:
        yield name, name, list(items)
