"""The patients of cases by their ids: scans, visits, time frames and slices of one person are one patient.

`patient001_frame01` and `patient001_frame12`, `P01_slice_003` and `P01_slice_004`, `anna_visit1` and `anna_visit2` name
the patient before a word for a part of the examinations. `P01_003` and `P01_004` begin with a word for persons and its
number. `anna_2` and `c1 (1)` are more scans of `anna` and `c1` where those exist. `anna` and `anna2` are two patients.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from segkit.reading.case import Case, words_of
from segkit.reading.layouts.pairs import identity

_PARTS = frozenset(
    {"frame", "slice", "visit", "session", "ses", "timepoint", "tp", "time", "followup", "fu", "baseline", "bl"}
    | {"week", "month", "year", "day", "phase", "ed", "es", "follow", "pre", "post", "preop", "postop", "exam"}
    | {"copy", "repeat", "rescan", "retest"}
)
"""Words for a part of the examinations of a patient, with or without a number behind them."""
_VIEWS = frozenset({"sa", "la", "axial", "ax", "sagittal", "sag", "coronal", "cor", "view"})
_WEAK_PARTS = frozenset({"scan", "series", "run", "image", "img", "acq", "rep", "study", "no", "z", "layer", "stack"})
"""The same, if the words before them hold a number: in `study_scan_01` no patient is named."""
_PERSON = r"(?:patient|patientid|pat|pt|p|subject|subj|sub|s|case|id|person|volunteer|participant|mouse|rat|animal)"
_PERSON_FIRST = re.compile(rf"^((?:.*[-_. ])?{_PERSON}[-_. ]*\d+)[-_. (]+\S", re.IGNORECASE)
_COLLECTIONS = frozenset(
    {"train", "training", "val", "validation", "valid", "test", "testing", "fold", "part", "batch", "set", "dataset"}
    | {"site", "center", "centre", "hospital", "group", "class", "cohort", "scanner", "task", "hgg", "lgg", "chunk"}
)
"""Words of folders that hold several patients."""
_YEAR = re.compile(r"^(19|20)\d\d$")


def is_session(text: str) -> bool:
    """Whether the end of a name is a word for a part of the examinations: another scan of the patient."""
    words = words_of(text)
    return bool(words) and words[0] in _PARTS | _WEAK_PARTS


def patients_by_id(cases: Sequence[Case]) -> dict[str, str]:
    """Case id -> patient: that of the layout, or for a case that is a patient of its own, the one that its id names."""
    ids = {case.id for case in cases}
    found = {case.id: case.patient if case.patient != case.id else _before_part(case.id, ids) for case in cases}
    prefixes = {patient for case_id, patient in found.items() if patient != case_id}
    alone = len(prefixes) == 1 and len(found) > 1 and len(set(found.values())) == 1
    if alone and not any(letter.isdigit() for prefix in prefixes for letter in prefix) and not ids & prefixes:
        return found if _is_person(next(iter(prefixes))) else {case.id: case.patient for case in cases}
    return found


def _before_part(case_id: str, ids: set[str]) -> str:
    """The words of an id before the first one for a part of the examinations, or for another scan of a known id."""
    for separator in re.finditer(r"[-_. (]+", case_id):
        before, after = case_id[: separator.start()], words_of(case_id[separator.end() :])
        if not before or not after or not identity(before):
            continue
        has_number = any(letter.isdigit() for letter in before)
        is_part = after[0] in _PARTS | _VIEWS or (after[0] in _WEAK_PARTS and has_number)
        if is_part or (before in ids and after[0].isdigit() and len(after) == 1):
            return before
    match = _PERSON_FIRST.match(case_id)
    return match[1] if match else case_id


def _is_person(name: str) -> bool:
    return not set(words_of(name)) & (_WEAK_PARTS | _COLLECTIONS | {"case", "patient", "subject", "data"})


def patient_folder(key: str, folders: Sequence[str], shapes: Mapping[str, int]) -> str | None:
    """The patient's folder of a case that is a file in it, as `P01/2.png`; None where the file names the patient.

    `folders` are the names of the folders above the file, `shapes` counts folders by their names without the numbers.
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
    is_numbered = shapes[shape_of(folder)] > 1 or re.fullmatch(rf"{_PERSON}[-_. ]*\d+", folder, re.IGNORECASE)
    return folder if is_numbered and all(word.isdigit() for word in own) else None


def shape_of(folder: str) -> str:
    """The name of a folder with a sign for each number."""
    return re.sub(r"\d+", "#", folder)


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
