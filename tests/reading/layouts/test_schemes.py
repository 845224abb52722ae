from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segkit.labels import SCHEMES
from segkit.reading.layouts.schemes import scheme_from_names
from segkit.reading.layouts.table import find_cases

Write = Callable[..., Path]
FOUR = ("t1", "t1ce", "t2", "flair")


def _generic(volume: Write, values: tuple[int, ...], modalities: tuple[str, ...] = FOUR) -> None:
    for modality in modalities:
        volume(f"p1/{modality}.nii.gz")
    volume("p1/seg.nii.gz", values)


def test_values_1_2_4_beside_four_modalities_are_brats2017(volume: Write, tmp_path: Path) -> None:
    _generic(volume, (1, 2, 4))
    cohort = find_cases(tmp_path)
    assert cohort.scheme == SCHEMES["brats2017"]
    assert [problem.is_fatal for problem in cohort.problems] == [False]


def test_values_1_2_3_are_never_guessed(volume: Write, tmp_path: Path) -> None:
    _generic(volume, (1, 2, 3))
    cohort = find_cases(tmp_path)
    assert cohort.scheme is None
    assert cohort.cases[0].scheme is None
    (problem,) = cohort.problems
    assert problem.is_fatal
    assert "--label-scheme brats2023" in problem.remedy
    assert "--label-scheme msd-brats" in problem.remedy
    for name in ("brats2023", "msd-brats"):
        told = find_cases(tmp_path, label_scheme=name)
        assert told.scheme == told.cases[0].scheme == SCHEMES[name]
        assert told.problems == ()


def test_values_1_2_3_4_name_the_three_schemes_that_have_them(volume: Write, tmp_path: Path) -> None:
    _generic(volume, (1, 2, 3, 4))
    (problem,) = find_cases(tmp_path).problems
    for name in ("brats2024", "brats-ped", "brats2015"):
        assert f"--label-scheme {name}" in problem.remedy


def test_one_modality_has_plain_classes(volume: Write, tmp_path: Path) -> None:
    _generic(volume, (1, 2, 3), ("t1",))
    cohort = find_cases(tmp_path)
    assert cohort.scheme is not None
    assert dict(cohort.scheme.values) == {"label_1": 1, "label_2": 2, "label_3": 3}


def test_plain_classes_on_demand(volume: Write, tmp_path: Path) -> None:
    _generic(volume, (1, 2, 3))
    cohort = find_cases(tmp_path, label_scheme="classes")
    assert cohort.scheme is not None
    assert dict(cohort.scheme.values) == {"label_1": 1, "label_2": 2, "label_3": 3}
    assert cohort.cases[0].scheme == cohort.scheme


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [
        ({"background": 0, "edema": 1, "non-enhancing tumor": 2, "enhancing tumour": 3}, "msd-brats"),
        ({"NCR": 1, "ED": 2, "ET": 4}, "brats2017"),
        ({"NETC": 1, "SNFH": 2, "ET": 3, "RC": 4}, "brats2024"),
        ({"ET": 1, "NETC": 2, "CC": 3, "ED": 4}, "brats-ped"),
        ({"ET": 1, "NET": 2, "CC": 3, "ED": 4}, "brats-ped"),
        ({"edema": 1, "liver": 2}, "classes"),
    ],
)
def test_scheme_from_names(labels: dict[str, int], scheme: str) -> None:
    assert scheme_from_names(labels, ("t1n", "t1c", "t2w", "t2f")).name == scheme


def test_tumour_names_without_tumour_modalities_stay_own_classes() -> None:
    assert scheme_from_names({"NCR": 1, "ED": 2, "ET": 3}, ("CT",)).name == "classes"


def test_an_image_named_like_a_reference_is_no_label_map(volume: Write, tmp_path: Path) -> None:
    volume("p1/t1.nii.gz")
    array = np.arange(216, dtype=np.uint8).reshape(6, 6, 6)
    nib.Nifti1Image(array, np.eye(4)).to_filename(tmp_path / "p1" / "seg.nii.gz")
    cohort = find_cases(tmp_path)
    assert cohort.scheme is None
    assert "hold 215 different values, as images do" in cohort.problems[0].found
