"""The patients of cases by their ids: scans, visits, time frames and slices of one person are one patient.

`patient001_frame01` and `patient001_frame12`, `P01_slice_003` and `P01slice4`, `anna_visit1` and `anna_v2` name the
patient before a word for a part of the examinations, `anna_20190102` before a date. `P01_003` and `P01_004` begin with
a word for persons and its number. `anna_2` and `c1 (1)` are more scans of `anna` and `c1` where those exist. Short
numbers behind several names, some of which occur twice, are parts too (`123_001`, `123_002`, `124_001`). `anna` and
`anna2` are two patients.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from segkit.reading.case import Case, words_of
from segkit.reading.layouts.pairs import identity
from segkit.reading.layouts.schemes import patient_of

_PARTS = frozenset(
    {"frame", "slice", "visit", "session", "ses", "timepoint", "tp", "time", "followup", "fu", "baseline", "bl"}
    | {"week", "month", "year", "day", "phase", "ed", "es", "follow", "pre", "post", "preop", "postop", "exam"}
    | {"copy", "repeat", "rescan", "retest", "nifti"}
)
"""Words for a part of the examinations of a patient, with or without a number behind them."""
_VIEWS = frozenset({"sa", "la", "axial", "ax", "sagittal", "sag", "coronal", "cor", "view"})
_WEAK_PARTS = frozenset({"scan", "series", "run", "image", "img", "acq", "rep", "study", "no", "z", "layer", "stack"})
"""The same, if the words before them hold a number: in `study_scan_01` no patient is named."""
_PERSON = r"(?:patient|patientid|pat|pt|p|subject|subj|sub|s|case|id|person|volunteer|participant|mouse|rat|animal)"
_PERSON_FIRST = re.compile(rf"^((?:.*[-_. ])?{_PERSON}[-_. ]*\d+)[-_. (]+\S", re.IGNORECASE)
_PERSON_BEHIND = re.compile(r"(?:^|[-_. ])((?:patient|pat|subject|subj|sub|case)[-_. ]*\d+)", re.IGNORECASE)
_COLLECTIONS = frozenset(
    {"train", "training", "val", "validation", "valid", "test", "testing", "fold", "part", "batch", "set", "dataset"}
    | {"site", "center", "centre", "hospital", "group", "class", "cohort", "scanner", "task", "hgg", "lgg", "chunk"}
    | {"benign", "malignant", "normal", "abnormal", "healthy"}
)
"""Words of folders that hold several patients."""
_SESSION = re.compile(
    r"^(ses|session|visit|tp|timepoint|time|scan|baseline|followup|week|month|year)[-_ ]?\d*$", re.IGNORECASE
)
_BARE_NUMBER = re.compile(r"^\d+([-_.]\d+)*$")
_DIGIT = re.compile(r"\d")
_YEAR = re.compile(r"^(19|20)\d\d$")
_SHORT_PART = re.compile(r"[tvmwyd]\d+(?![^\W_])", re.IGNORECASE)
"""Time point, visit, month, week, year or day."""
_DATE = re.compile(r"(19|20)\d\d([-_.]?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])(?!\d)")
_SIDES = frozenset({"left", "right"})
_NUMBERED = re.compile(r"(?P<name>.*[^-_ (])[-_ (]+\d{1,4}\)?")


def is_session(text: str) -> bool:
    """Whether the end of a name is a word for a part of the examinations: another scan of the patient."""
    words = words_of(text)
    return bool(words) and words[0] in _PARTS | _WEAK_PARTS


def patients_by_id(cases: Sequence[Case]) -> dict[str, str]:
    """Case id -> patient: that of the layout, or for a case that is a patient of its own, the one that its id names."""
    ids = {case.id for case in cases}
    found = {case.id: case.patient if case.patient != case.id else _before_part(case.id, ids) for case in cases}
    found |= _before_numbers([case for case in cases if found[case.id] == case.id])
    prefixes = {patient for case_id, patient in found.items() if patient != case_id}
    alone = len(prefixes) == 1 and len(found) > 1 and len(set(found.values())) == 1
    if alone and not any(letter.isdigit() for prefix in prefixes for letter in prefix) and not ids & prefixes:
        return found if _is_person(next(iter(prefixes))) else {case.id: case.patient for case in cases}
    return found


def _before_part(case_id: str, ids: set[str]) -> str:
    """The words of an id before the first one for a part of the examinations, or for another scan of a known id."""
    if date := _DATE.match(case_id):
        rest = case_id[date.end() :].lstrip("-_. ")
        if any(letter.isalpha() for letter in rest) and identity(rest):
            return _before_part(rest, ids)
    for start in re.finditer(r"[-_. (]+|(?<=[a-z\d])(?=[A-Z])|(?<=\d)(?=[a-z])", case_id):
        before, behind = case_id[: start.start()], case_id[start.end() :]
        after, is_word = words_of(behind), bool(start[0])
        if not before or not after or not identity(before):
            continue
        has_number = any(letter.isdigit() for letter in before)
        is_part = after[0] in _PARTS | _VIEWS or (after[0] in _WEAK_PARTS and has_number)
        is_part |= is_word and bool(_SHORT_PART.match(behind) or _DATE.match(behind) or behind.lower() in _SIDES)
        if is_part or (is_word and before in ids and after[0].isdigit() and len(after) == 1):
            person = _PERSON_BEHIND.search(behind)
            return person[1] if person else before
    match = _PERSON_FIRST.match(case_id)
    return match[1] if match else case_id


def _before_numbers(cases: Iterable[Case]) -> dict[str, str]:
    """Case id -> the name before its last number, where several names have several numbers.

    The names hold a number (`123_001`), or are at least as many as the numbers behind one of them (`anna_1`,
    `berta_1`): else they are classes, sites or data sets with many patients (`benign_1`, `benign_2` ...). An id that
    begins with the name of a folder for several cases is left out.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        match = _NUMBERED.fullmatch(case.id)
        if match is None or not identity(match["name"]) or _COLLECTIONS & set(words_of(match["name"])):
            continue
        parts = [part for image in case.images.values() for part in image.path.parts]
        if not parts or any(part.startswith(match["name"]) for part in parts):
            members[match["name"]].append(case.id)
    several = {name: own for name, own in members.items() if not _YEAR.match(name)}
    most = max(map(len, several.values()), default=0)
    if len(several) < 2 or most < 2:
        return {}
    has_number = all(any(letter.isdigit() for letter in name) for name in several)
    return (
        {case_id: name for name, own in several.items() for case_id in own}
        if has_number or most <= len(several)
        else {}
    )


def _is_person(name: str) -> bool:
    return not set(words_of(name)) & (_WEAK_PARTS | _COLLECTIONS | {"case", "patient", "subject", "data"})


def _patient_folder(key: str, folders: Sequence[str], shapes: Mapping[str, int], *, is_repeated: bool) -> str | None:
    """The patient's folder of a case that is a file in it, as `P01/2.png`; None where the file names the patient.

    `folders` are the names of the folders above the file, `shapes` counts folders by their names without the numbers.
    `is_repeated`: files in other folders have the same name, as in `P01/CTres.nii.gz` and `P02/CTres.nii.gz`.
    """
    if not folders:
        return None
    folder = folders[-1]
    words = words_of(folder)
    is_collection = words[:1] != list(identity(folder)[:1]) and not words[0].isdigit()
    if not any(word.isdigit() for word in words) or is_collection or _COLLECTIONS & set(words) or _YEAR.match(folder):
        return None
    if re.match(rf"{re.escape(folder)}([-_. ]|$)", key):
        return folder
    own = [word for word in identity(key) if word not in _PARTS | _VIEWS | _WEAK_PARTS]
    is_numbered = shapes[_shape_of(folder)] > 1 or re.fullmatch(rf"{_PERSON}[-_. ]*\d+", folder, re.IGNORECASE)
    return folder if is_numbered and (is_repeated or all(word.isdigit() for word in own)) else None


def _shape_of(folder: str) -> str:
    """The name of a folder with a sign for each number."""
    return re.sub(r"\d+", "#", folder)


def name_cases(places: Sequence[tuple[Path, str]], root: Path) -> list[tuple[str, str]]:
    """(case id, patient) for each place: a folder and the name of the case in it, "" where the folder is the case."""
    paths, least = [], []
    for folder, key in places:
        parts = folder.relative_to(root).parts if folder.is_relative_to(root) else (folder.name,)
        path = (*parts, *((key,) if key else ())) or (root.name,)
        paths.append(path)
        # Parts of the id: one, or down from the patient's folder where the case folder is a session in it.
        least.append(1 if key else len(path) - _above_sessions(path, len(path) - 1))
    named = []
    shapes = Counter(_shape_of(name) for name in {folder.name for folder, _ in places})
    for (_, key), path, shortest, depth in zip(places, paths, least, _unique_depths(paths, least), strict=True):
        case_id = "_".join(path[-depth:])
        if key and _patient_folder(key, path[:-1], shapes, is_repeated=depth > 1) is not None:
            index = _above_sessions(path, len(path) - 2)
            named.append((case_id, "_".join(path[min(len(path) - depth, index) : index + 1])))
            continue
        patient = patient_of(key or _patient(path, depth, is_qualified=depth > shortest))
        named.append((case_id, case_id if patient == key else patient))
    return named


def _unique_depths(paths: Sequence[tuple[str, ...]], least: Sequence[int]) -> list[int]:
    """How many last parts of each path form its id; those that end in the same name are lengthened together."""
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


def _above_sessions(path: tuple[str, ...], index: int) -> int:
    """Index of the nearest folder from `index` upwards that is not a session of the one above it.

    HGG/001 and site1/001 are patients, P07/001 a session.
    """

    def is_number(name: str, above: str) -> bool:
        is_bare = _BARE_NUMBER.match(name) and _DIGIT.search(above)
        return bool(is_bare) and _COLLECTIONS.isdisjoint(words_of(above))

    while index > 0 and (_SESSION.match(path[index]) or is_number(path[index], path[index - 1])):
        index -= 1
    return index


def _patient(path: tuple[str, ...], depth: int, *, is_qualified: bool) -> str:
    """The patient of a case folder; a name that occurs in many folders (MR) does not identify one."""
    index = len(path) - 1
    if is_qualified and index > 0 and (_DIGIT.search(path[index - 1]) or not _DIGIT.search(path[index])):
        index -= 1
    index = _above_sessions(path, index)
    return "_".join(path[min(len(path) - depth, index) : index + 1])


def patients_note(cases: Iterable[Case]) -> str:
    """How many cases are of how many patients, with an example of cases that share one."""
    by_patient: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        by_patient[case.patient].append(case.id)
    count = sum(map(len, by_patient.values()))
    note = f"{count} case{'s' * (count != 1)} of {len(by_patient)} patient{'s' * (len(by_patient) != 1)}"
    shared = next(((patient, ids) for patient, ids in sorted(by_patient.items()) if len(ids) > 1), None)
    if shared is None:
        return f"{note}: each case counts as a patient of its own"
    named = ", ".join(sorted(shared[1])[:3]) + (", ..." if len(shared[1]) > 3 else "")
    return (
        f"{note}: cases of one patient, such as {named} of {shared[0]}, are never split between training and validation"
    )
