from __future__ import annotations

import pytest

from segkit.errors import RequestError
from segkit.preparing.splits import patient_folds, train_and_validation
from segkit.reading.case import Case


def _cases(counts: dict[str, int]) -> list[Case]:
    return [Case(f"{patient}-{visit}", patient, {}) for patient, count in counts.items() for visit in range(count)]


CASES = _cases({"a": 3, "b": 1, "c": 1, "d": 2, "e": 1})


def test_every_case_is_in_one_fold_and_no_patient_in_two() -> None:
    folds = patient_folds(CASES, 3, seed=1)
    assert sorted(case_id for fold in folds for case_id in fold) == sorted(case.id for case in CASES)
    patients = [{case_id[0] for case_id in fold} for fold in folds]
    assert not patients[0] & patients[1]
    assert not patients[0] & patients[2]
    assert not patients[1] & patients[2]


def test_folds_are_even() -> None:
    # 3 + 2 + 1 + 1 + 1 cases: the largest patient fills a fold of its own.
    assert sorted(len(fold) for fold in patient_folds(CASES, 3, seed=5)) == [2, 3, 3]


def test_order_of_the_input_does_not_matter_and_the_seed_does() -> None:
    many = _cases({f"p{number:02d}": 1 for number in range(20)})
    assert patient_folds(many, 5, seed=3) == patient_folds(many[::-1], 5, seed=3)
    assert patient_folds(many, 5, seed=3) != patient_folds(many, 5, seed=4)


def test_train_and_validation_are_the_folds() -> None:
    folds = patient_folds(CASES, 3, seed=1)
    train, validation = train_and_validation(CASES, 1, 3, seed=1)
    assert validation == folds[1]
    assert train == sorted(folds[0] + folds[2])


def test_impossible_requests() -> None:
    with pytest.raises(RequestError, match="5 patients cannot fill 6 folds"):
        patient_folds(CASES, 6, seed=0)
    with pytest.raises(RequestError, match="at least 2 folds"):
        patient_folds(CASES, 1, seed=0)
    with pytest.raises(RequestError, match="there is no fold 3; expected 0 to 2"):
        train_and_validation(CASES, 3, 3, seed=0)
