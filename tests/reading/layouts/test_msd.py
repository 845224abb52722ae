from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from segkit.errors import DataError
from segkit.reading.layouts.table import find_cases

Write = Callable[..., Path]
TASK01 = {
    "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
    "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
    "licence": "CC-BY-SA 4.0",
    "training": [{"image": "./imagesTr/BRATS_001.nii.gz", "label": "./labelsTr/BRATS_001.nii.gz"}],
    "test": ["./imagesTs/BRATS_485.nii.gz"],
}


@pytest.fixture
def task01(volume: Write, tmp_path: Path) -> Path:
    volume("imagesTr/BRATS_001.nii.gz", channels=4)
    volume("labelsTr/BRATS_001.nii.gz", (1, 2, 3))
    volume("imagesTs/BRATS_485.nii.gz", channels=4)
    (tmp_path / "dataset.json").write_text(json.dumps(TASK01))
    return tmp_path


def test_task01_channels_come_in_canonical_order(task01: Path) -> None:
    cohort = find_cases(task01)
    assert cohort.scheme is not None
    assert (cohort.layout, cohort.scheme.name, cohort.licence) == ("msd", "msd-brats", "CC-BY-SA 4.0")
    train, test = cohort.cases
    assert {name: image.channel for name, image in train.images.items()} == {"t1n": 1, "t1c": 2, "t2w": 3, "t2f": 0}
    assert tuple(train.images) == cohort.modalities == ("t1n", "t1c", "t2w", "t2f")
    assert train.label is not None
    assert (test.id, test.label) == ("BRATS_485", None)


def test_images_folder_or_file_on_its_own_finds_the_document_above(task01: Path) -> None:
    (from_folder,) = find_cases(task01 / "imagesTr").cases
    (from_file,) = find_cases(task01 / "imagesTs" / "BRATS_485.nii.gz").cases
    assert from_folder.label is not None
    assert from_file.images["t2f"].channel == 0


def test_named_classes_and_one_modality_stay_as_they_are(volume: Write, tmp_path: Path) -> None:
    volume("imagesTr/h_1.nii.gz")
    volume("labelsTr/h_1.nii.gz")
    volume("imagesTr/h_2.nii.gz")
    document = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "training": [{"image": "./imagesTr/h_1.nii.gz", "label": "./labelsTr/h_1.nii.gz"}],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    cohort = find_cases(tmp_path)
    assert cohort.scheme is not None
    assert dict(cohort.scheme.values) == {"Anterior": 1, "Posterior": 2}
    assert cohort.modalities == ("MRI",)
    assert cohort.cases[0].images["MRI"].channel is None
    assert ["not listed in dataset.json" in problem.found for problem in cohort.problems] == [True]


def test_four_digit_numbers_of_listed_cases_are_no_channels(volume: Write, tmp_path: Path) -> None:
    entries = []
    for number in (0, 1):
        volume(f"imagesTr/case_{number:04d}.nii.gz")
        volume(f"labelsTr/case_{number:04d}.nii.gz", (1,))
        entries.append({kind: f"./{kind}sTr/case_{number:04d}.nii.gz" for kind in ("image", "label")})
    document = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "a"}, "training": entries}
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    for root in (tmp_path, tmp_path / "imagesTr"):
        cohort = find_cases(root)
        assert cohort.layout == "msd"
        assert [(case.id, case.label is not None) for case in cohort.cases] == [
            ("case_0000", True),
            ("case_0001", True),
        ]


def test_time_points_share_their_patient(volume: Write, tmp_path: Path) -> None:
    entries = [{"image": f"imagesTr/BraTS-GLI-00005-{time}.nii.gz"} for time in (100, 101)]
    for entry in entries:
        volume(entry["image"])
    document = {"modality": {"0": "T1"}, "labels": {"0": "background", "1": "a"}, "training": entries}
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    assert [case.patient for case in find_cases(tmp_path).cases] == ["BraTS-GLI-00005"] * 2


def test_damaged_document_and_entries_that_lead_out(task01: Path) -> None:
    document = dict(TASK01, training=[{"image": "../../secret.nii.gz"}, *TASK01["training"]])
    (task01 / "dataset.json").write_text(json.dumps(document))
    cohort = find_cases(task01)
    assert [case.id for case in cohort.cases] == ["BRATS_001", "BRATS_485"]
    assert "names no image inside the data set" in cohort.problems[0].found
    (task01 / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="not readable JSON"):
        find_cases(task01)


def test_real_hippocampus(real_data: Path) -> None:
    cohort = find_cases(real_data / "Task04_Hippocampus")
    assert cohort.scheme is not None
    assert (cohort.layout, len(cohort.cases), dict(cohort.scheme.values)) == (
        "msd",
        4,
        {"Anterior": 1, "Posterior": 2},
    )
    assert all(case.label is not None for case in cohort.cases)


def test_backslashes_of_windows_are_separators(task01: Path, volume: Write) -> None:
    entry = {"image": r".\imagesTr\BRATS_001.nii.gz", "label": r"labelsTr\BRATS_001.nii.gz"}
    odd = {"image": r"imagesTr\odd.nii.gz"}
    document = dict(TASK01, training=[entry, odd, {"image": r"..\secret.nii.gz"}], test=[r"imagesTs\BRATS_485.nii.gz"])
    (task01 / "dataset.json").write_text(json.dumps(document))
    volume(r"imagesTr\odd.nii.gz", channels=4)  # here a name and not a folder
    cohort = find_cases(task01)
    paths = {case.id: case.images["t2f"].path.relative_to(task01).as_posix() for case in cohort.cases}
    assert paths == {
        "BRATS_001": "imagesTr/BRATS_001.nii.gz",
        "BRATS_485": "imagesTs/BRATS_485.nii.gz",
        r"imagesTr\odd": r"imagesTr\odd.nii.gz",
    }
    assert [case.label is not None for case in cohort.cases] == [True, False, False]
    assert [r"..\\secret" in problem.found for problem in cohort.problems] == [True]


def test_backslashes_in_the_list_of_nnunet(volume: Write, tmp_path: Path) -> None:
    for name in ("images/a.nii.gz", "masks/a.nii.gz", "imagesTr/b_0000.nii.gz"):
        volume(name, (1,))
    listed = {"a": {"images": [r"images\a.nii.gz"], "label": r"masks\a.nii.gz"}}
    document = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "dataset": listed}
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    (case,) = find_cases(tmp_path, layout="nnunet").cases
    assert case.label is not None
    assert (case.images["CT"].path.name, case.label.path.parent.name) == ("a.nii.gz", "masks")
