"""Case ids and patients from the folders that cases lie in, for data without any convention of names.

An id is as short as it can be: the name of the case folder or file, with the folders above it put in front as far as it
takes to tell it from others (`P1/MR` and `P2/MR` are `P1_MR` and `P2_MR`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from segkit.data.layouts.conventions import patient_of

_SESSION = re.compile(
    r"^(ses|session|visit|tp|timepoint|time|scan|baseline|followup|week|month|year)[-_ ]?\d*$", re.IGNORECASE
)
_BARE_NUMBER = re.compile(r"^\d+([-_.]\d+)*$")


def name_cases(places: Sequence[tuple[Path, str]], root: Path) -> list[tuple[str, str]]:
    """(case id, patient) for each place: a folder and the name of the case in it, "" where the folder is the case."""
    paths = [(*_parts(folder, root), *((key,) if key else ())) or (root.name,) for folder, key in places]
    least = [1 if key else _depth_to_patient(path) for path, (_, key) in zip(paths, places, strict=True)]
    depths = _unique_depths(paths, least)
    named = []
    for (_, key), path, shortest, depth in zip(places, paths, least, depths, strict=True):
        case_id = "_".join(path[-depth:])
        if key:
            patient = patient_of(key)
            named.append((case_id, case_id if patient == key else patient))
        else:
            named.append((case_id, patient_of(_patient(path, depth, is_qualified=depth > shortest))))
    return named


def _parts(folder: Path, root: Path) -> tuple[str, ...]:
    """The folders below `root`; a root that is a case itself goes by its own name."""
    if folder == root:
        return ()
    return folder.relative_to(root).parts if folder.is_relative_to(root) else (folder.name,)


def _unique_depths(paths: Sequence[tuple[str, ...]], least: Sequence[int]) -> list[int]:
    """How many parts of each path make its id; paths that end in the same name are lengthened together."""
    depths = list(least)
    alike: dict[str, list[int]] = defaultdict(list)
    for index, path in enumerate(paths):
        alike["_".join(path[-least[index] :])].append(index)
    for members in alike.values():
        while True:
            counts = Counter(paths[index][-depths[index] :] for index in members)
            longer = [index for index in members if depths[index] < len(paths[index])]
            if counts.total() == len(counts) or not longer:
                break
            for index in longer:
                depths[index] += 1
    return depths


def _depth_to_patient(path: tuple[str, ...]) -> int:
    """1 for a case folder, more for one that is a session of the patient whose folder lies above it."""
    last = len(path) - 1
    return 1 + last - _above_sessions(path, last)


def _above_sessions(path: tuple[str, ...], index: int) -> int:
    """Index of the nearest folder from `index` upwards that is no session of the one above it."""
    while index > 0 and _is_session(path[index], path[index - 1]):
        index -= 1
    return index


def _is_session(name: str, above: str) -> bool:
    """Plain numbers are sessions only in the folder of a patient: HGG/001 is a patient, P07/001 a visit."""
    return bool(_SESSION.match(name)) or bool(_BARE_NUMBER.match(name) and _has_digit(above))


def _patient(path: tuple[str, ...], depth: int, *, is_qualified: bool) -> str:
    """Who a case folder belongs to; a name that occurs under many folders (MR) describes and does not identify."""
    index = len(path) - 1
    if is_qualified and index > 0 and (_has_digit(path[index - 1]) or not _has_digit(path[index])):
        index -= 1
    index = _above_sessions(path, index)
    return "_".join(path[min(len(path) - depth, index) : index + 1])


def _has_digit(name: str) -> bool:
    return any(letter.isdigit() for letter in name)
