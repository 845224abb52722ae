from __future__ import annotations

import json
from pathlib import Path

import pytest

from segkit.errors import RequestError
from segkit.preparing.splits import given_split, patient_folds, train_and_validation, with_patients
from segkit.reading.case import Case, Cohort


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


def _cohort(*pairs: tuple[str, str]) -> Cohort:
    cases = tuple(Case(case_id, patient, {}) for case_id, patient in pairs)
    return Cohort(Path("data"), "folder", None, ("image",), cases)


def test_a_table_of_patients_decides(tmp_path: Path) -> None:
    cohort = _cohort(("scan_1", "scan_1"), ("scan_2", "scan_2"), ("scan_3", "scan_3"))
    (tmp_path / "patients.csv").write_text("case,patient\nscan_1,anna\nscan_3;anna\n")
    found = with_patients(cohort, tmp_path / "patients.csv")
    assert [case.patient for case in found.cases] == ["anna", "scan_2", "anna"]
    folds = patient_folds(found.cases, 2, seed=0)
    assert sorted(folds) == [["scan_1", "scan_3"], ["scan_2"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scan_1,anna\nscan_2", "line 2 does not name one case and one patient"),
        ("scan_1,anna\nscan_1,berta", "case scan_1 has two patients"),
        ("other,anna", r"names none of the 1 cases in data, but other; expected ids such as scan_1"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "patients.csv").write_text(text)
    with pytest.raises(RequestError, match=message):
        with_patients(_cohort(("scan_1", "scan_1")), tmp_path / "patients.csv")


@pytest.mark.parametrize(
    "document",
    [
        [{"train": ["b"], "val": ["a"]}, {"train": ["a", "c"], "val": ["b"]}],
        [{"training": ["b"], "validation": ["a"]}, {"training": ["c", "a"], "validation": ["b"]}],
    ],
    ids=["nnU-Net", "segkit"],
)
def test_folds_of_a_file(tmp_path: Path, document: object) -> None:
    (tmp_path / "splits.json").write_text(json.dumps(document))
    cases = _cohort(("a", "a"), ("b", "b"), ("c", "c")).cases
    assert given_split(tmp_path / "splits.json", 1, cases) == (["a", "c"], ["b"])
    assert given_split(tmp_path / "splits.json", 1, cases[:2], excluded=["c"]) == (["a"], ["b"])
    with pytest.raises(RequestError, match="there is no fold 2; expected 0 to 1"):
        given_split(tmp_path / "splits.json", 2, cases)
    with pytest.raises(RequestError, match="1 cases of the split are not among"):
        given_split(tmp_path / "splits.json", 1, cases[:2])


def test_a_file_may_split_a_patient_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "split.json").write_text(json.dumps({"training": ["a1"], "validation": ["a2"]}))
    assert given_split(tmp_path / "split.json", 0, _cohort(("a1", "a"), ("a2", "a"), ("b", "b")).cases) == (
        ["a1"],
        ["a2"],
    )
    assert "1 patients are in training and validation: a" in caplog.text
    assert "1 cases are in neither part and not used: b" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot be read"),
        ("[]", "has no fold"),
        ('[{"train": ["a"]}]', "names no training and validation cases"),
        ('[{"train": ["a"], "val": ["a"]}]', "a are in training and validation"),
    ],
)
def test_splits_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "splits.json").write_text(text)
    with pytest.raises(RequestError, match=message):
        given_split(tmp_path / "splits.json", 0, _cohort(("a", "a")).cases)
