"""Splits by patient: cases of one patient are never in both training and validation, unless a file says so."""

import json
import logging
import random
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from segkit.errors import RequestError, some
from segkit.reading.case import Case, Cohort
from segkit.reading.volume import short_reason

_log = logging.getLogger(__name__)


def patient_folds(cases: Sequence[Case], folds: int, seed: int) -> list[list[str]]:
    """Sorted case ids of each fold; all cases of a patient are in the same fold.

    Depends on the ids, `folds` and `seed` only, not on the order of `cases`. Patients are shuffled and, those with most
    cases first, assigned to the fold with the fewest cases.

    Raises:
        RequestError: fewer than two folds, or fewer patients than folds.
    """
    if folds < 2:
        raise RequestError(f"{folds} folds cannot be made", expected="at least 2 folds")
    case_ids: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        case_ids[case.patient].append(case.id)
    if len(case_ids) < folds:
        expected, remedy = f"at least {folds} patients with a reference", "Ask for fewer folds, or add cases"
        raise RequestError(f"{len(case_ids)} patients cannot fill {folds} folds", expected=expected, remedy=remedy)
    patients = sorted(case_ids)
    random.Random(seed).shuffle(patients)
    filled: list[list[str]] = [[] for _ in range(folds)]
    for patient in sorted(patients, key=lambda patient: -len(case_ids[patient])):
        min(filled, key=len).extend(case_ids[patient])
    return [sorted(fold) for fold in filled]


def train_and_validation(cases: Sequence[Case], fold: int, folds: int, seed: int) -> tuple[list[str], list[str]]:
    """Case ids to train on and to validate on when `fold` (from 0) is held out.

    Raises:
        RequestError: there is no such fold, or the folds cannot be made.
    """
    if not 0 <= fold < folds:
        raise RequestError(f"there is no fold {fold}", expected=f"0 to {folds - 1}")
    split = patient_folds(cases, folds, seed)
    train = sorted(case_id for index, ids in enumerate(split) if index != fold for case_id in ids)
    return train, split[fold]


def read_patients(path: Path) -> dict[str, str]:
    """Case id -> patient, from a table with two columns, case and patient; a first line with these names is skipped.

    Columns are separated by commas, semicolons or tabs.

    Raises:
        RequestError: the file cannot be read, a line has not two columns, or a case has two patients.
    """
    expected = "lines such as case_01,patient_1"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot be read ({short_reason(error)})", where=path, expected=expected) from error
    patients: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        cells = [cell.strip().strip('"') for cell in re.split(r"[,;\t]", line)]
        if not line.strip() or (not patients and [cell.lower() for cell in cells] == ["case", "patient"]):
            continue
        if len(cells) != 2 or not all(cells):
            raise RequestError(f"line {number} does not name one case and one patient", where=path, expected=expected)
        if patients.setdefault(cells[0], cells[1]) != cells[1]:
            raise RequestError(f"case {cells[0]} has two patients", where=path, remedy="Keep one of them")
    return patients


def with_patients(cohort: Cohort, path: Path | None) -> Cohort:
    """The cohort with the patients of a table; cases that it does not name keep theirs.

    Raises:
        RequestError: as `read_patients`, or the table names none of the cases.
    """
    if path is None:
        return cohort
    patients = read_patients(path)
    if not any(case.id in patients for case in cohort.cases):
        found = f"names none of the {len(cohort.cases)} cases in {cohort.root}, but {some(patients)}"
        raise RequestError(found, where=path, expected=f"ids such as {some(case.id for case in cohort.cases)}")
    cases = (replace(case, patient=patients.get(case.id, case.patient)) for case in cohort.cases)
    return replace(cohort, cases=tuple(cases))


def read_split(path: Path) -> list[tuple[list[str], list[str]]]:
    """The (training, validation) ids of each fold: nnU-Net's `splits_final.json`, or `split.json` of a run.

    nnU-Net lists {"train": [...], "val": [...]} for each fold; a run has {"training": [...], "validation": [...]}.

    Raises:
        RequestError: the file is neither, a case is in both parts, or a part is empty.
    """
    expected = 'a list of {"train": [case ids], "val": [case ids]}, or split.json of a run folder'
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"cannot be read ({short_reason(error)})", where=path, expected=expected) from error
    folds = []
    for entry in document if isinstance(document, list) else [document]:
        named = entry if isinstance(entry, dict) else {}
        parts: list[Any] = [named.get("train", named.get("training")), named.get("val", named.get("validation"))]
        if not all(isinstance(part, list) and part and all(isinstance(one, str) for one in part) for part in parts):
            raise RequestError("names no training and validation cases", where=path, expected=expected)
        if both := sorted(set(parts[0]) & set(parts[1])):
            raise RequestError(f"{some(both)} are in training and validation", where=path, remedy="Correct the split")
        folds.append((parts[0], parts[1]))
    if not folds:
        raise RequestError("has no fold", where=path, expected=expected)
    return folds


def given_split(
    path: Path, fold: int, cases: Sequence[Case], excluded: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Training and validation ids of one fold of a file, without the excluded ones.

    A warning names patients that are in both, and cases that are in neither.

    Raises:
        RequestError: as `read_split`, there is no such fold, or cases of it are not in the data.
    """
    folds = read_split(path)
    if not 0 <= fold < len(folds):
        raise RequestError(f"there is no fold {fold}", where=path, expected=f"0 to {len(folds) - 1}")
    training, validation = ([one for one in part if one not in excluded] for part in folds[fold])
    patient_of = {case.id: case.patient for case in cases}
    if unknown := [case_id for case_id in (*training, *validation) if case_id not in patient_of]:
        found = f"{len(unknown)} cases of the split are not among the usable cases with a reference: {some(unknown)}"
        raise RequestError(found, where=path, expected=f"ids such as {some(patient_of)}")
    both = {patient_of[one] for one in training} & {patient_of[one] for one in validation}
    if both:
        _log.warning("%s: %d patients are in training and validation: %s", path, len(both), some(sorted(both)))
    if rest := sorted(set(patient_of).difference(training, validation)):
        _log.warning("%s: %d cases are in neither part and not used: %s", path, len(rest), some(rest))
    return sorted(training), sorted(validation)
