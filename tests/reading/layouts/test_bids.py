from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from segkit.errors import DataError
from segkit.reading.layouts.table import find_cases
from tests.zoo.build import masks, scans

Write = Callable[..., Path]


@pytest.fixture
def bids(volume: Write, tmp_path: Path) -> Path:
    for session in ("01", "02"):
        stem = f"sub-7/ses-{session}/anat/sub-7_ses-{session}"
        for suffix in ("T1w", "ce-gadolinium_T1w", "T2w", "FLAIR"):
            volume(f"{stem}_{suffix}.nii.gz")
        volume(f"derivatives/manual/{stem}_space-orig_dseg.nii.gz", (1, 2, 3))
        volume(f"derivatives/manual/{stem}_desc-brain_mask.nii.gz", (1,))
        volume(f"derivatives/manual/{stem}_label-lesion_mask.nii.gz", (1,))
        volume(f"derivatives/prep/{stem}_desc-preproc_T1w.nii.gz")
    (tmp_path / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.9.0", "License": "CC0"}')
    return tmp_path


def test_sessions_contrast_and_references(bids: Path) -> None:
    cohort = find_cases(bids)
    assert (cohort.layout, cohort.modalities, cohort.licence) == ("bids", ("t1n", "t1c", "t2w", "t2f"), "CC0")
    first, second = cohort.cases
    assert (first.id, second.id) == ("sub-7_ses-01", "sub-7_ses-02")
    assert first.patient == second.patient == "sub-7"
    assert first.images["t1c"].path.name == "sub-7_ses-01_ce-gadolinium_T1w.nii.gz"
    assert first.images["t1n"].path.name == "sub-7_ses-01_T1w.nii.gz"
    assert first.label is not None
    assert first.label.path.name == "sub-7_ses-01_space-orig_dseg.nii.gz"
    assert first.problems == ()


def test_values_without_names_are_ambiguous_and_a_table_names_them(bids: Path) -> None:
    cohort = find_cases(bids)
    assert cohort.scheme is None
    (problem,) = [problem for problem in cohort.problems if problem.is_fatal]
    assert "--label-scheme brats2023" in problem.remedy
    assert "--label-scheme msd-brats" in problem.remedy
    (bids / "dseg.tsv").write_text("index\tname\n0\tbackground\n1\tedema\n2\tnecrosis\n3\tenhancing tumour\n")
    named = find_cases(bids)
    assert named.scheme is not None
    assert named.scheme.name == "msd-brats"
    (bids / "dseg.tsv").write_text("number\tname\n1\tedema\n")
    with pytest.raises(DataError, match=r"dseg\.tsv: cannot be read"):
        find_cases(bids)


def test_an_extra_of_one_subject_is_no_channel(volume: Write, tmp_path: Path) -> None:
    for subject in (1, 2, 3):
        volume(f"sub-{subject}/anat/sub-{subject}_T1w.nii.gz")
    volume("sub-2/anat/sub-2_FLAIR.nii.gz")
    cohort = find_cases(tmp_path)
    assert (cohort.layout, cohort.modalities) == ("bids", ("t1n",))
    assert "1 of 3 cases have t2f: sub-2_FLAIR.nii.gz" in cohort.problems[0].found


def test_two_runs_are_two_files_for_one_modality(volume: Write, tmp_path: Path) -> None:
    volume("sub-1/anat/sub-1_run-1_T1w.nii.gz")
    volume("sub-1/anat/sub-1_run-2_T1w.nii.gz")
    volume("sub-1/dwi/sub-1_dwi.nii.gz")
    cohort = find_cases(tmp_path)
    assert cohort.layout == "bids"
    assert "2 files for the modality t1n" in cohort.cases[0].problems[0].found
    assert "sub-1_dwi" in cohort.problems[0].found


def test_references_of_spine_data(tmp_path: Path) -> None:
    """spine-generic: `_seg-manual` before 2023, `_label-SC_seg` since; several labels are classes."""
    scans(tmp_path, "sub-{a,b}/anat/sub-{a,b}_T2w.nii.gz")
    masks(tmp_path, "derivatives/labels/sub-{a,b}/anat/sub-{a,b}_T2w_seg-manual.nii.gz")
    cohort = find_cases(tmp_path)
    assert [case.label and case.label.path.name for case in cohort.cases] == [
        "sub-a_T2w_seg-manual.nii.gz",
        "sub-b_T2w_seg-manual.nii.gz",
    ]
    for path in tmp_path.rglob("*seg-manual*"):
        path.rename(path.with_name(path.name.replace("seg-manual", "label-SC_seg")))
    masks(tmp_path, "derivatives/labels/sub-{a,b}/anat/sub-{a,b}_T2w_lesion-manual.nii.gz")
    both = find_cases(tmp_path)
    assert both.scheme is not None
    assert dict(both.scheme.values) == {"SC": 1, "lesion": 2}
    chosen = find_cases(tmp_path, modalities={"label": "lesion-manual"})
    assert chosen.layout == "bids"
    assert [case.label and case.label.path.name for case in chosen.cases] == [
        "sub-a_T2w_lesion-manual.nii.gz",
        "sub-b_T2w_lesion-manual.nii.gz",
    ]


def test_one_mask_per_label(tmp_path: Path) -> None:
    scans(tmp_path, "sub-{a,b}/anat/sub-{a,b}_T2w.nii.gz")
    masks(tmp_path, "derivatives/labels/sub-{a,b}/anat/sub-{a,b}_T2w_label-{SC,lesion}_seg.nii.gz")
    cohort = find_cases(tmp_path)
    assert cohort.scheme is not None
    assert dict(cohort.scheme.values) == {"SC": 1, "lesion": 2}
    assert cohort.cases[0].label is not None
    assert [value for value, _ in cohort.cases[0].label.parts] == [1, 2]


def test_references_of_one_image_are_chosen_where_sessions_have_several(tmp_path: Path) -> None:
    scans(tmp_path, "sub-{a,b}/anat/sub-{a,b}_{T1w,T2w}.nii.gz")
    masks(tmp_path, "derivatives/labels/sub-{a,b}/anat/sub-{a,b}_T2w_seg-manual.nii.gz")
    masks(tmp_path, "derivatives/labels/sub-a/anat/sub-a_T1w_seg-manual.nii.gz")
    cohort = find_cases(tmp_path)
    assert [case.label and case.label.path.name for case in cohort.cases] == [
        "sub-a_T2w_seg-manual.nii.gz",
        "sub-b_T2w_seg-manual.nii.gz",
    ]
    (note,) = (problem for problem in cohort.problems if "another image" in problem.found)
    assert note.remedy == "To use them instead, pass --modality label=T1w_seg-manual"


def test_strokes_without_the_flair_on_another_grid(tmp_path: Path) -> None:
    session = "sub-strokecase{0001,0002}/ses-0001"
    name = "sub-strokecase{0001,0002}_ses-0001"
    scans(tmp_path, f"{session}/dwi/{name}_{{dwi,adc}}.nii.gz")
    scans(tmp_path, f"{session}/anat/{name}_FLAIR.nii.gz", shape=(20, 20, 20))
    masks(tmp_path, f"derivatives/{session}/{name}_msk.nii.gz")
    cohort = find_cases(tmp_path)
    assert (cohort.layout, cohort.modalities) == ("bids", ("adc", "dwi"))
    assert [(case.id, case.label is not None, case.problems) for case in cohort.cases] == [
        ("sub-strokecase0001_ses-0001", True, ()),
        ("sub-strokecase0002_ses-0001", True, ()),
    ]
    assert any("t2f is on another grid than the references" in problem.found for problem in cohort.problems)


def test_a_reference_without_session_belongs_to_the_only_one(tmp_path: Path) -> None:
    scans(tmp_path, "sub-{a,b}/ses-1/anat/sub-{a,b}_ses-1_T1w.nii.gz")
    masks(tmp_path, "derivatives/sub-{a,b}/sub-{a,b}_msk.nii.gz")
    assert [case.label is not None for case in find_cases(tmp_path).cases] == [True, True]
