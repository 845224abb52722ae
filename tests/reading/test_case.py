from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from segkit.errors import DataError, Problem, warning
from segkit.reading.case import (
    IGNORED,
    LABEL,
    Case,
    Cohort,
    ImageFile,
    canonical_modality,
    in_channel_order,
    match_modalities,
    split_name,
    usable_only,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("t1", "t1n"),
        ("T1w", "t1n"),
        ("t1ce", "t1c"),
        ("T1GD", "t1c"),
        ("CT1", "t1c"),
        ("T1POST", "t1c"),
        ("T1_post", "t1c"),
        ("T2", "t2w"),
        ("FLAIR", "t2f"),
        ("fla", "t2f"),
        ("FL", "t2f"),
        ("T2-FLAIR", "t2f"),
        ("seg", None),
        ("ADC", None),
    ],
)
def test_canonical_modality(name: str, expected: str | None) -> None:
    assert canonical_modality(name) == expected


@pytest.mark.parametrize(
    ("stem", "kind", "rest", "is_leading"),
    [
        ("BraTS2021_00006_t1", "t1n", "BraTS2021_00006", False),
        ("BraTS2021_00006_t1ce", "t1c", "BraTS2021_00006", False),
        ("p1-T2-FLAIR", "t2f", "p1", False),
        ("p1.t2", "t2w", "p1", False),
        ("FLAIR", "t2f", "", False),
        ("Flair_subtrMeanDivStd", "t2f", "subtrMeanDivStd", True),
        ("VSD.Brain.XX.O.MR_T1c.54514", "t1c", "VSD.Brain.XX.O.MR_54514", False),
        ("VSD.Brain_3more.XX.O.OT.54517", LABEL, "VSD.Brain_3more.XX.O_54517", False),
        ("W39_1998.09.19_Segm", LABEL, "W39_1998.09.19", False),
        ("p1_lesion_mask", LABEL, "p1", False),
        ("p1_brain_mask", IGNORED, "p1", False),
        ("Ärzte münchen_t2", "t2w", "Ärzte münchen", False),
        ("hippocampus_004", None, "hippocampus_004", False),
    ],
)
def test_split_name(stem: str, kind: str | None, rest: str, is_leading: bool) -> None:
    parts = split_name(stem)
    assert (parts.kind, parts.rest, parts.is_leading) == (kind, rest, is_leading)


def test_channel_order_is_canonical_then_as_given() -> None:
    assert in_channel_order(["t2f", "dwi", "t1c", "adc", "t1n", "t1c"]) == ("t1n", "t1c", "t2f", "dwi", "adc")


def test_cases_that_contradict_themselves_are_left_out_and_excluded_ones_are_not_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = Path("/data")
    fatal = Problem("/data/b", "2 files for the modality t1n")
    cases = tuple(Case(name, name, {"t1n": ImageFile(root / name / "t1.nii.gz")}) for name in "abcd")
    cases = tuple(replace(case, problems=(fatal,)) if case.id in "bd" else case for case in cases)
    cohort = Cohort(root, "folder", None, ("t1n",), cases, (warning(root, "a note"),))
    assert cohort.left_out == ()
    usable = usable_only(cohort, ["d"])
    assert [case.id for case in usable.cases] == ["a", "c"]
    assert usable.left_out == ("b/t1.nii.gz",)
    assert [record.getMessage() for record in caplog.records] == [str(fatal)]


def test_numbered_scans_are_not_the_channels_of_a_model_with_fewer() -> None:
    images = {f"channel_{number}": ImageFile(Path(f"scan_000{number}.nii.gz")) for number in range(4)}
    with pytest.raises(DataError, match=r"channel_0 is missing .* pass --layout folder"):
        match_modalities(Case("scan", "scan", images), ["channel_0"])
