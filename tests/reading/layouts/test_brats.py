from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from segkit.labels import SCHEMES
from segkit.reading.layouts.schemes import patient_of
from segkit.reading.layouts.table import find_cases

Write = Callable[..., Path]
FOUR = ("t1n", "t1c", "t2w", "t2f")
OLD = ("t1", "t1ce", "t2", "flair")


@pytest.mark.parametrize(
    ("layout", "case_id", "separator", "suffixes", "scheme"),
    [
        ("brats2017", "HGG/Brats17_2013_10_1", "_", OLD, "brats2017"),
        ("brats2018", "LGG/Brats18_CBICA_AAB_1", "_", OLD, "brats2017"),
        ("brats2019", "HGG/BraTS19_TCIA01_131_1", "_", OLD, "brats2017"),
        ("brats2020", "BraTS20_Training_001", "_", OLD, "brats2017"),
        ("brats2021", "BraTS2021_00000", "_", OLD, "brats2017"),
        ("fets2022", "FeTS2022_00000", "_", OLD, "brats2017"),
        ("brats2023", "BraTS-GLI-00000-000", "-", FOUR, "brats2023"),
        ("brats2023-ssa", "BraTS-SSA-00000-000", "-", FOUR, "brats2023"),
        ("brats2023-men", "BraTS-MEN-00000-000", "-", FOUR, "brats2023"),
        ("brats2023-met", "BraTS-MET-00000-000", "-", FOUR, "brats2023"),
        ("brats2024", "BraTS-GLI-00000-100", "-", FOUR, "brats2024"),
    ],
)
def test_naming_of_every_year(
    volume: Write, tmp_path: Path, layout: str, case_id: str, separator: str, suffixes: tuple[str, ...], scheme: str
) -> None:
    name = Path(case_id).name
    for suffix in (*suffixes, "seg"):
        volume(f"{case_id}/{name}{separator}{suffix}.nii.gz", (1, 2, 3))
    cohort = find_cases(tmp_path)
    assert cohort.layout == layout
    assert cohort.scheme is not None
    assert cohort.scheme.name == scheme
    assert cohort.modalities == FOUR
    (case,) = cohort.cases
    assert case.id == name
    expected = [f"{name}{separator}{suffix}.nii.gz" for suffix in suffixes]
    assert [image.path.name for image in case.images.values()] == expected
    assert case.label is not None
    assert case.label.path.name == f"{name}{separator}seg.nii.gz"
    assert case.scheme == cohort.scheme
    assert case.problems == cohort.problems == ()


def test_the_reference_of_case_355_has_another_name(volume: Write, tmp_path: Path) -> None:
    for suffix in OLD:
        volume(f"BraTS20_Training_355/BraTS20_Training_355_{suffix}.nii")
    volume("BraTS20_Training_355/W39_1998.09.19_Segm.nii")
    (case,) = find_cases(tmp_path).cases
    assert case.label is not None
    assert case.label.path.name == "W39_1998.09.19_Segm.nii"


def test_upenn_has_its_references_in_another_tree(volume: Write, tmp_path: Path) -> None:
    for suffix in ("T1", "T1GD", "T2", "FLAIR"):
        volume(f"images_structural/UPENN-GBM-00001_11/UPENN-GBM-00001_11_{suffix}.nii.gz")
    volume("images_segm/UPENN-GBM-00001_11_segm.nii.gz")
    volume("automated_segm/UPENN-GBM-00001_11_automated_approx_segm.nii.gz")
    for root in (tmp_path, tmp_path / "images_structural"):
        cohort = find_cases(root)
        (case,) = cohort.cases
        assert (cohort.layout, tuple(case.images), case.patient) == ("upenn", FOUR, "UPENN-GBM-00001")
        assert case.label is not None
        assert case.label.path == tmp_path / "images_segm" / "UPENN-GBM-00001_11_segm.nii.gz"


def test_time_points_from_100_on_make_the_whole_folder_2024(volume: Write, tmp_path: Path) -> None:
    for case_id in ("BraTS-GLI-00001-000", "BraTS-GLI-00001-100"):
        for suffix in FOUR:
            volume(f"{case_id}/{case_id}-{suffix}.nii.gz")
    cohort = find_cases(tmp_path)
    assert cohort.layout == "brats2024"
    assert [case.patient for case in cohort.cases] == ["BraTS-GLI-00001"] * 2


def _paediatric(volume: Write, values: tuple[int, ...]) -> None:
    for suffix in FOUR:
        volume(f"BraTS-PED-00001-000/BraTS-PED-00001-000-{suffix}.nii.gz")
    volume("BraTS-PED-00001-000/BraTS-PED-00001-000-seg.nii.gz", values)


def test_value_4_tells_the_later_paediatric_scheme(volume: Write, tmp_path: Path) -> None:
    _paediatric(volume, (1, 2, 3, 4))
    cohort = find_cases(tmp_path)
    assert (cohort.layout, cohort.scheme, cohort.problems) == ("brats-ped", SCHEMES["brats-ped"], ())


def test_paediatric_values_without_4_are_never_guessed(volume: Write, tmp_path: Path) -> None:
    _paediatric(volume, (1, 2, 3))
    cohort = find_cases(tmp_path)
    assert cohort.scheme is None
    (problem,) = cohort.problems
    assert problem.is_fatal
    for name in ("brats-ped", "brats2023"):
        assert f"--label-scheme {name}" in problem.remedy
        assert find_cases(tmp_path, label_scheme=name).scheme == SCHEMES[name]


@pytest.mark.parametrize(("layout", "scheme"), [("brats2023-ped", "brats2023"), ("brats-ped", "brats-ped")])
def test_a_chosen_paediatric_layout_is_a_choice_of_scheme(
    volume: Write, tmp_path: Path, layout: str, scheme: str
) -> None:
    _paediatric(volume, (1, 2, 3))
    assert find_cases(tmp_path, layout=layout).scheme == SCHEMES[scheme]


def test_paediatric_scans_without_references_have_no_scheme(volume: Write, tmp_path: Path) -> None:
    for suffix in FOUR:
        volume(f"BraTS-PED-00001-000/BraTS-PED-00001-000-{suffix}.nii.gz")
    cohort = find_cases(tmp_path)
    assert cohort.scheme is None
    assert "--label-scheme brats-ped" in cohort.problems[0].remedy


def test_metastases_with_a_resection_cavity(volume: Write, tmp_path: Path) -> None:
    volume("BraTS-MET-00001-000/BraTS-MET-00001-000-t1c.nii.gz")
    volume("BraTS-MET-00001-000/BraTS-MET-00001-000-seg.nii.gz", (1, 2, 3, 4))
    cohort = find_cases(tmp_path)
    assert cohort.scheme is not None
    assert cohort.scheme.name == "brats2024"


def test_radiotherapy_has_one_modality_and_underscores(volume: Write, tmp_path: Path) -> None:
    volume("BraTS-MEN-RT-0000-1/BraTS-MEN-RT-0000-1_t1c.nii.gz")
    volume("BraTS-MEN-RT-0000-1/BraTS-MEN-RT-0000-1_gtv.nii.gz", (1,))
    cohort = find_cases(tmp_path)
    assert cohort.scheme is not None
    assert (cohort.layout, cohort.scheme.name, cohort.modalities) == ("brats-men-rt", "brats-men-rt", ("t1c",))
    (case,) = cohort.cases
    assert case.patient == "BraTS-MEN-RT-0000"
    assert case.label is not None


def test_inpainting_masks_are_no_channels(volume: Write, tmp_path: Path) -> None:
    for suffix in ("t1n", "t1n-voided", "mask", "mask-healthy", "mask-unhealthy"):
        volume(f"BraTS-GLI-00001-000/BraTS-GLI-00001-000-{suffix}.nii.gz")
    cohort = find_cases(tmp_path)
    assert (cohort.layout, cohort.modalities) == ("brats-inpainting", ("t1n",))
    (case,) = cohort.cases
    assert set(case.images) == {"t1n", "t1n-voided", "mask", "mask-healthy", "mask-unhealthy"}
    assert case.label is None


def test_inpainting_at_test_time(volume: Write, tmp_path: Path) -> None:
    for suffix in ("t1n-voided", "mask"):
        volume(f"BraTS-GLI-00001-000/BraTS-GLI-00001-000-{suffix}.nii.gz")
    cohort = find_cases(tmp_path)
    assert (cohort.layout, cohort.modalities) == ("brats-inpainting", ("t1n-voided",))


def test_originals_of_2015_lie_in_folders_of_their_own(volume: Write, tmp_path: Path) -> None:
    for name in ("MR_T1.54513", "MR_T1c.54514", "MR_T2.54515", "MR_Flair.54512"):
        volume(f"HGG/brats_2013_pat0001_1/VSD.Brain.XX.O.{name}/VSD.Brain.XX.O.{name}.nii.gz")
    volume("HGG/brats_2013_pat0001_1/VSD.Brain_3more.XX.O.OT.54517/VSD.Brain_3more.XX.O.OT.54517.nii.gz")
    cohort = find_cases(tmp_path)
    (case,) = cohort.cases
    assert cohort.scheme is not None
    assert (cohort.layout, cohort.scheme.name, tuple(case.images)) == ("brats2015", "brats2015", FOUR)
    assert case.label is not None


def test_the_same_id_in_two_folders_is_read_once_and_named(volume: Write, tmp_path: Path) -> None:
    for grade in ("HGG", "LGG"):
        volume(f"{grade}/Brats18_CBICA_AAB_1/Brats18_CBICA_AAB_1_t1.nii.gz")
    (case,) = find_cases(tmp_path).cases
    (problem,) = case.problems
    assert problem.is_fatal
    assert "also exists in" in problem.found
    assert "LGG" in problem.found


@pytest.mark.parametrize("suffix", ["mask", "lesion_mask", "manual", "label"])
def test_masks_that_no_year_of_brats_names_are_no_references(volume: Write, tmp_path: Path, suffix: str) -> None:
    name = "BraTS2021_00001/BraTS2021_00001"
    volume(f"{name}_t1.nii.gz")
    volume(f"{name}_{suffix}.nii.gz", (1,))
    volume(f"BraTS2021_00001/{suffix}.nii.gz", (1,))
    cohort = find_cases(tmp_path)
    assert cohort.cases[0].label is None
    note = next(problem for problem in cohort.problems if "brain masks" in problem.found)
    assert f"2 files left out, neither an image nor a reference (brain masks?): BraTS2021_00001_{suffix}" in note.found
    assert not note.is_fatal
    volume(f"{name}_seg.nii.gz", (1, 2, 4))
    (case,) = find_cases(tmp_path).cases
    assert case.label is not None
    assert case.label.path.name == "BraTS2021_00001_seg.nii.gz"
    assert case.problems == ()


def test_the_healthy_mask_of_inpainting_is_no_reference(volume: Write, tmp_path: Path) -> None:
    for suffix in (*FOUR, "mask"):
        volume(f"BraTS-GLI-00001-000/BraTS-GLI-00001-000-{suffix}.nii.gz")
    (case,) = find_cases(tmp_path).cases
    assert (case.label, tuple(case.images)) == (None, FOUR)


def test_predictions_in_another_tree_are_no_references(volume: Write, tmp_path: Path) -> None:
    for case_id in ("BraTS-GLI-00001-000", "BraTS-GLI-00002-000"):
        for suffix in FOUR:
            volume(f"data/{case_id}/{case_id}-{suffix}.nii.gz")
        volume(f"predictions/{case_id}-seg.nii.gz", (1,))
        volume(f"ensemble/{case_id}/{case_id}-seg.nii.gz", (1,))
    volume("data/BraTS-GLI-00001-000/BraTS-GLI-00001-000-seg.nii.gz", (1,))
    cohort = find_cases(tmp_path)
    labelled, unlabelled = cohort.cases
    assert labelled.label is not None
    assert labelled.label.path.parent == tmp_path / "data" / "BraTS-GLI-00001-000"
    assert unlabelled.label is None
    (note,) = cohort.problems
    assert "4 files left out, masks outside the folder of their case (predictions?)" in note.found


def test_a_case_split_between_grades_keeps_its_reference(volume: Write, tmp_path: Path) -> None:
    volume("HGG/Brats18_CBICA_AAB_1/Brats18_CBICA_AAB_1_t1.nii.gz")
    volume("LGG/Brats18_CBICA_AAB_1/Brats18_CBICA_AAB_1_seg.nii.gz", (1,))
    (case,) = find_cases(tmp_path).cases
    assert case.label is not None


def test_two_files_for_one_modality(volume: Write, tmp_path: Path) -> None:
    volume("BraTS2021_00001/BraTS2021_00001_t1.nii.gz")
    volume("BraTS2021_00001/BraTS2021_00001_t1.nii")
    (case,) = find_cases(tmp_path).cases
    assert [problem.found for problem in case.problems] == [
        "2 files for the modality t1n: BraTS2021_00001_t1.nii, BraTS2021_00001_t1.nii.gz"
    ]


@pytest.mark.parametrize(
    ("case_id", "patient"),
    [
        ("BraTS-GLI-00001-000", "BraTS-GLI-00001"),
        ("BraTS-GLI-00001-100", "BraTS-GLI-00001"),
        ("Brats17_CBICA_AAB_1", "CBICA_AAB"),
        ("Brats18_2013_21_1", "2013_21"),
        ("brats_2013_pat0004_1", "brats_2013_pat0004"),
        ("BraTS20_Training_001", "BraTS20_Training_001"),
        ("BraTS2021_00006", "BraTS2021_00006"),
        ("BraTS-MEN-RT-0003-1", "BraTS-MEN-RT-0003"),
    ],
)
def test_patients(case_id: str, patient: str) -> None:
    assert patient_of(case_id) == patient


def test_real_brats2021(shared_data: Path) -> None:
    for root in (shared_data / "brats2021", shared_data / "brats2021" / "BraTS2021_00006"):
        cohort = find_cases(root)
        assert cohort.scheme is not None
        assert (cohort.layout, cohort.scheme.name, cohort.modalities) == ("brats2021", "brats2017", FOUR)
        assert cohort.cases[0].problems == ()


def test_real_2015_folder(shared_data: Path) -> None:
    cohort = find_cases(shared_data / "deepmedic_brats2015" / "train")
    assert cohort.scheme is not None
    assert (cohort.layout, cohort.scheme.name, cohort.modalities) == ("brats2015", "brats2015", ("t1c", "t2f"))
    assert [case.label.path.name for case in cohort.cases if case.label] == ["OTMultiClass.nii.gz"] * 2
    assert any("brainmask" in problem.found for problem in cohort.problems)


def test_real_inpainting_folder_explains_itself(shared_data: Path) -> None:
    cohort = find_cases(shared_data / "brats2023_inpainting")
    (case,) = cohort.cases
    missing, lost = case.problems
    assert cohort.layout == "brats-inpainting"
    assert case.label is None
    assert "no expert reference" in missing.found
    assert "seg-BraTS23_1.nii.gz, seg-bratstoolkit_isen.nii.gz" in missing.found
    assert missing.remedy.endswith("BraTS-GLI-00001-000-seg.nii.gz`")
    assert lost.where.endswith("seg-BraTS23_1_mapped.nii.gz")
    assert "segkit convert headers" in lost.remedy
