"""Splits by patient: time points of one patient are never in both training and validation."""

import random
from collections import defaultdict
from collections.abc import Sequence

from segkit.errors import RequestError
from segkit.reading.case import Case


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
