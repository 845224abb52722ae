"""The patients of cases by their ids."""

from __future__ import annotations

import pytest

from segkit.reading.case import Case
from segkit.reading.layouts.patients import patients_by_id, patients_note


def patients(*ids: str) -> list[str]:
    found = patients_by_id([Case(case_id, case_id, {}) for case_id in ids])
    return [found[case_id] for case_id in ids]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (
            ("patient001_frame01", "patient001_frame12", "patient002_frame01"),
            ("patient001", "patient001", "patient002"),
        ),
        (("P01_slice_003", "P01_slice_004", "P02_slice_003"), ("P01", "P01", "P02")),
        (("anna_visit1", "anna-visit-2-rescan", "berta_visit1"), ("anna", "anna", "berta")),
        (("anna", "anna2"), ("anna", "anna2")),
        (("anna", "anna_2", "anna_followup", "berta_2"), ("anna", "anna", "anna", "berta_2")),
        (("c1", "c1 (1)"), ("c1", "c1")),
        (("P01_003", "P01_004", "P02_003"), ("P01", "P01", "P02")),
        (("001_SA_ED", "001_LA_ES", "002_SA_ED"), ("001", "001", "002")),
        (("case123_day20_slice_0001", "case123_day22_slice_0001"), ("case123", "case123")),
        (("PatientID_0003_Timepoint_1", "PatientID_0003_Timepoint_2"), ("PatientID_0003", "PatientID_0003")),
        (("P01slice3", "P01slice4", "AnnaVisit1", "AnnaVisit2"), ("P01", "P01", "Anna", "Anna")),
        (("Case_001_T0", "Case_001_T1", "anna_v1", "anna_v2"), ("Case_001", "Case_001", "anna", "anna")),
        (("anna_20190102", "anna_2020-03-04", "20190102_berta", "20200304_berta"), ("anna", "anna", "berta", "berta")),
        (("hip_left_1", "anna_left", "anna_right"), ("hip_left_1", "anna", "anna")),
        (("123_001", "123_002", "124_001"), ("123", "123", "124")),
        (("anna_1", "anna_2", "berta_1", "berta_2"), ("anna", "anna", "berta", "berta")),
        (("RHUH-0001_0", "RHUH-0001_1", "RHUH-0002_0"), ("RHUH-0001", "RHUH-0001", "RHUH-0002")),
        (("axial_full_pat0", "axial_full_pat1", "anna_visit1_pat2"), ("axial_full_pat0", "axial_full_pat1", "pat2")),
        # Classes, sites, years and registries with many patients.
        (("benign (1)", "benign (2)", "malignant (1)", "malignant (2)"),) * 2,
        (("liver_1", "liver_2", "liver_3", "spleen_1"),) * 2,
        (("site1_001", "site1_002", "site2_001", "site2_002"),) * 2,
        (("2021_001", "2021_002", "2022_001", "2022_002"),) * 2,
        (("1.3.6279.6001.1002", "1.3.6279.6001.1003", "1.3.7009.9004.1002"),) * 2,
        # Numbers of cases, and words in front of all of them, name no patient.
        (("hippocampus_001", "hippocampus_003"), ("hippocampus_001", "hippocampus_003")),
        (("BRATS_001", "BRATS_002"), ("BRATS_001", "BRATS_002")),
        (("study_scan_01", "study_scan_02"), ("study_scan_01", "study_scan_02")),
        (("case_00000", "case_00001"), ("case_00000", "case_00001")),
        (("FLARE22_Tr_0001", "FLARE22_Tr_0002"), ("FLARE22_Tr_0001", "FLARE22_Tr_0002")),
        (("CT_phase_01", "CT_phase_02"), ("CT_phase_01", "CT_phase_02")),
    ],
)
def test_cases_of_one_person(ids: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert patients(*ids) == list(expected)


def test_the_note_counts_patients_and_gives_an_example() -> None:
    cases = [Case(f"p{number}_visit{visit}", f"p{number}", {}) for number in (1, 2) for visit in (1, 2, 3, 4)]
    note = patients_note(cases)
    assert note.startswith("8 cases of 2 patients")
    assert "p1_visit1, p1_visit2, p1_visit3, ..." in note
    assert patients_note(cases[:1]) == "1 case of 1 patient: each case counts as a patient of its own"
