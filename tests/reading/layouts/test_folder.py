from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from segkit.reading.layouts.table import find_cases

Write = Callable[..., Path]


def test_a_folder_for_each_case(volume: Write, tmp_path: Path) -> None:
    for case in ("patient 1", "Überweisung 患者"):
        for name in ("T1", "T1POST", "T2", "FLAIR", "lesions"):
            volume(f"{case}/{name}.nii.gz", (1,))
    cohort = find_cases(tmp_path)
    assert (cohort.layout, cohort.modalities) == ("folder", ("t1n", "t1c", "t2w", "t2f"))
    assert [case.id for case in cohort.cases] == ["patient 1", "Überweisung 患者"]
    assert cohort.scheme is not None
    assert dict(cohort.scheme.values) == {"lesions": 1}


def test_all_cases_in_one_folder(volume: Write, tmp_path: Path) -> None:
    for case in ("p1", "p2"):
        for suffix in ("t1", "flair", "seg"):
            volume(f"{case}_{suffix}.nii.gz", (1, 2))
    cohort = find_cases(tmp_path)
    assert [(case.id, tuple(case.images), case.label is not None) for case in cohort.cases] == [
        ("p1", ("t1n", "t2f"), True),
        ("p2", ("t1n", "t2f"), True),
    ]
    assert cohort.scheme is not None
    assert dict(cohort.scheme.values) == {"label_1": 1, "label_2": 2}


@pytest.mark.parametrize("folders", [("images", "labels"), ("imagesTr", "labelsTr"), ("img", "masks")])
def test_a_folder_for_images_and_one_for_references(volume: Write, tmp_path: Path, folders: tuple[str, str]) -> None:
    for case in ("a", "b"):
        volume(f"{folders[0]}/{case}.nii.gz")
        volume(f"{folders[1]}/{case}.nii.gz", (1,))
    cohort = find_cases(tmp_path)
    assert [(case.id, tuple(case.images), case.label is not None) for case in cohort.cases] == [
        ("a", ("image",), True),
        ("b", ("image",), True),
    ]


def test_a_folder_for_each_modality(volume: Write, tmp_path: Path) -> None:
    for case in ("a", "b"):
        for modality in ("T1", "FLAIR"):
            volume(f"{modality}/{case}.nii.gz")
    cohort = find_cases(tmp_path)
    assert [(case.id, tuple(case.images)) for case in cohort.cases] == [("a", ("t1n", "t2f")), ("b", ("t1n", "t2f"))]


def test_sessions_of_one_patient(volume: Write, tmp_path: Path) -> None:
    for session in ("tp1", "tp2"):
        volume(f"anna/{session}/T1.nii.gz")
        volume(f"anna/{session}/FLAIR.nii.gz")
    cohort = find_cases(tmp_path)
    assert [(case.id, case.patient) for case in cohort.cases] == [("anna_tp1", "anna"), ("anna_tp2", "anna")]


def test_one_file_is_one_case(volume: Write) -> None:
    path = volume("scan one.nii.gz")
    volume("scan two.nii.gz")
    cohort = find_cases(path)
    assert [(case.id, case.images["image"].path) for case in cohort.cases] == [("scan one", path)]


def test_names_given_by_the_user(volume: Write, tmp_path: Path) -> None:
    for case in ("p1", "p2"):
        volume(f"{case}_before.nii.gz")
        volume(f"{case}_after.nii.gz")
        volume(f"{case}_drawn.nii.gz", (1,))
        volume(f"{case}_junk.nii.gz")
    cohort = find_cases(tmp_path, modalities={"t1n": "_before", "t1c": "_after.nii.gz", "label": "_drawn"})
    assert [(case.id, tuple(case.images)) for case in cohort.cases] == [("p1", ("t1n", "t1c")), ("p2", ("t1n", "t1c"))]
    assert cohort.cases[0].label is not None
    assert "p1_junk.nii.gz, p2_junk.nii.gz" in cohort.problems[0].found


def test_unknown_companions_are_no_cases(volume: Write, tmp_path: Path) -> None:
    volume("scan.nii.gz")
    volume("scan_prediction.nii.gz")
    cohort = find_cases(tmp_path)
    assert [case.id for case in cohort.cases] == ["scan"]
    assert "scan_prediction" in cohort.problems[0].found


def test_channels_of_a_4d_file(volume: Write, tmp_path: Path) -> None:
    volume("four.nii.gz", channels=4)
    nameless = find_cases(tmp_path)
    assert nameless.modalities == ("channel_0", "channel_1", "channel_2", "channel_3")
    assert "--modality t2f=0" in nameless.problems[0].remedy
    named = find_cases(tmp_path, modalities={"t2f": "0", "t1n": "1", "t1c": "2", "t2w": "3"})
    assert {name: image.channel for name, image in named.cases[0].images.items()} == {
        "t1n": 1,
        "t1c": 2,
        "t2w": 3,
        "t2f": 0,
    }


def test_a_task01_file_on_its_own_tells_its_channels(volume: Write) -> None:
    cohort = find_cases(volume("BRATS_001.nii.gz", channels=4))
    assert {name: image.channel for name, image in cohort.cases[0].images.items()} == {
        "t1n": 1,
        "t1c": 2,
        "t2w": 3,
        "t2f": 0,
    }


def test_references_without_image_are_named(volume: Write, tmp_path: Path) -> None:
    volume("a_t1.nii.gz")
    volume("b_seg.nii.gz")
    cohort = find_cases(tmp_path)
    assert [(case.id, case.label) for case in cohort.cases] == [("a", None)]
    assert "b_seg.nii.gz" in cohort.problems[0].found


def test_real_multiple_sclerosis_case(real_data: Path) -> None:
    cohort = find_cases(real_data / "open_ms" / "patient19")
    assert cohort.scheme is not None
    assert (cohort.layout, cohort.modalities) == ("folder", ("t1n", "t1c", "t2w", "t2f"))
    (case,) = cohort.cases
    assert (case.id, dict(cohort.scheme.values)) == ("patient19", {"lesions": 1})
    assert case.images["t1c"].path.name == "T1POST.nii.gz"
    assert case.problems == ()


def test_real_ct_and_dicom_folders(real_data: Path) -> None:
    ct = find_cases(real_data / "totalsegmentator_ct")
    assert [(case.id, tuple(case.images)) for case in ct.cases] == [
        ("example_ct_sm", ("image",)),
        ("example_mr_sm", ("image",)),
    ]
    series = find_cases(real_data / "dicom_headers" / "siemens" / "anatomical" / "001")
    assert [image.path.name for image in series.cases[0].images.values()] == ["001"]
    assert [case.id for case in series.cases] == ["001"]  # as a file of that name, not as the folder above it


def test_dicom_series_of_patients(tmp_path: Path) -> None:
    """Folders of slices: of one sequence a patient, of four, or named by a scanner."""
    names = ("one/p1", "one/p2", *(f"four/{p}/{kind}" for p in ("p1", "p2") for kind in ("T1", "T1c", "T2", "FLAIR")))
    for name in (*names, "clinic/P7/3_t1_mprage_sag", "clinic/P7/5_t1_mprage_sag_gd"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / name / f"IM{number}").write_bytes(bytes(128) + b"DICM")
    one = find_cases(tmp_path / "one")
    assert [(case.id, tuple(case.images)) for case in one.cases] == [("p1", ("image",)), ("p2", ("image",))]
    assert [case.id for case in find_cases(tmp_path / "one" / "p1").cases] == ["p1"]
    four = find_cases(tmp_path / "four")
    assert (four.modalities, [case.id for case in four.cases]) == (("t1n", "t1c", "t2w", "t2f"), ["p1", "p2"])
    assert four.cases[0].images["t2f"].path == tmp_path / "four" / "p1" / "FLAIR"
    (clinic,) = find_cases(tmp_path / "clinic", modalities={"t1n": "*mprage_sag", "t1c": "*_gd"}).cases
    assert {name: image.path.name for name, image in clinic.images.items()} == {
        "t1n": "3_t1_mprage_sag",
        "t1c": "5_t1_mprage_sag_gd",
    }


def test_one_folder_name_below_every_patient(volume: Write, tmp_path: Path) -> None:
    for patient in ("P1", "P2", "anna"):
        for name in ("T1", "FLAIR"):
            volume(f"{patient}/MR/{name}.nii.gz")
    cohort = find_cases(tmp_path)
    assert [(case.id, case.patient) for case in cohort.cases] == [
        ("P1_MR", "P1"),
        ("P2_MR", "P2"),
        ("anna_MR", "anna"),
    ]
    assert all(case.problems == () for case in cohort.cases)


def test_sessions_above_a_fixed_folder_name(volume: Write, tmp_path: Path) -> None:
    for session in ("P1/ses-1", "P1/ses-2", "P2/ses-1"):
        volume(f"{session}/MR/T1.nii.gz")
    assert [(case.id, case.patient) for case in find_cases(tmp_path).cases] == [
        ("P1_ses-1_MR", "P1"),
        ("P1_ses-2_MR", "P1"),
        ("P2_ses-1_MR", "P2"),
    ]


def test_numbered_case_folders_are_patients(volume: Write, tmp_path: Path) -> None:
    for folder in ("HGG/000", "HGG/001", "LGG/000", "siteA/007"):
        volume(f"{folder}/T1.nii.gz")
    assert [(case.id, case.patient) for case in find_cases(tmp_path).cases] == [
        ("001", "001"),
        ("007", "007"),
        ("HGG_000", "HGG_000"),
        ("LGG_000", "LGG_000"),
    ]


def test_numbers_below_a_patient_are_sessions(volume: Write, tmp_path: Path) -> None:
    for folder in ("P07/001", "P07/2019-05-03"):
        volume(f"{folder}/T1.nii.gz")
    assert [(case.id, case.patient) for case in find_cases(tmp_path).cases] == [
        ("P07_001", "P07"),
        ("P07_2019-05-03", "P07"),
    ]


def test_time_points_by_brats_ids_share_their_patient(volume: Write, tmp_path: Path) -> None:
    for case_id in ("BraTS-GLI-00005-100", "BraTS-GLI-00005-101"):
        volume(f"images/{case_id}.nii.gz")
        volume(f"labels/{case_id}.nii.gz", (1,))
    assert [case.patient for case in find_cases(tmp_path).cases] == ["BraTS-GLI-00005"] * 2


def test_kind_folders_above_the_parts_of_the_data(volume: Write, tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "val/a"):
        volume(f"images/{name}.nii.gz")
        volume(f"masks/{name}.nii.gz", (1,))
    volume("images/val/c.nii.gz")
    cohort = find_cases(tmp_path)
    assert [(case.id, case.label and case.label.path.relative_to(tmp_path).as_posix()) for case in cohort.cases] == [
        ("b", "masks/train/b.nii.gz"),
        ("c", None),
        ("train_a", "masks/train/a.nii.gz"),
        ("val_a", "masks/val/a.nii.gz"),
    ]
    assert all(case.problems == () for case in cohort.cases)


def test_kind_folders_with_a_folder_for_each_patient(volume: Write, tmp_path: Path) -> None:
    for patient in ("P1", "P2"):
        volume(f"images/{patient}/T1.nii.gz")
        volume(f"images/{patient}/FLAIR.nii.gz")
        volume(f"masks/{patient}/seg.nii.gz", (1,))
    cohort = find_cases(tmp_path)
    assert [(case.id, tuple(case.images), case.label is not None) for case in cohort.cases] == [
        ("P1", ("t1n", "t2f"), True),
        ("P2", ("t1n", "t2f"), True),
    ]


def test_an_extra_of_one_patient_is_no_channel(volume: Write, tmp_path: Path) -> None:
    for patient in ("P1", "P2", "P3"):
        for name in ("T1", "T2"):
            volume(f"{patient}/{name}.nii.gz")
    volume("P1/FLAIR.nii.gz")
    for name in ("DWI", "ADC"):
        volume(f"P2/{name}.nii.gz")
    cohort = find_cases(tmp_path)
    assert cohort.modalities == ("t1n", "t2w")
    assert all(case.problems == () for case in cohort.cases)
    assert "t2f" in cohort.cases[0].images
    assert tuple(cohort.cases[1].images) == ("t1n", "t2w")
    notes = {problem.found: problem.remedy for problem in cohort.problems}
    assert notes == {
        "2 files left out, as their modality is not in their names: ADC.nii.gz, DWI.nii.gz": (
            "Keep it with --modality NAME=SUFFIX"
        ),
        "1 file left out, in training: 1 of 3 cases have t2f: FLAIR.nii.gz": "Keep it with --modality t2f=SUFFIX",
    }
    kept = find_cases(tmp_path, modalities={"t1n": "T1", "t2f": "FLAIR", "dwi": "DWI"})
    assert kept.modalities == ("t1n", "t2f", "dwi")


def test_half_of_the_cases_make_a_channel(volume: Write, tmp_path: Path) -> None:
    for patient in ("P1", "P2"):
        volume(f"{patient}/T1.nii.gz")
    volume("P1/FLAIR.nii.gz")
    assert find_cases(tmp_path).modalities == ("t1n", "t2f")
