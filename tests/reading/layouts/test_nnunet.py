from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from segkit.errors import DataError
from segkit.labels import LabelScheme, outputs_of
from segkit.reading.layouts.table import find_cases
from tests.zoo.build import scans

Write = Callable[..., Path]
BRATS = {"0": "FLAIR", "1": "T1", "2": "T1ce", "3": "T2"}


def _raw(volume: Write, tmp_path: Path, document: dict[str, Any], channels: int) -> Path:
    for channel in range(channels):
        volume(f"imagesTr/A_1_{channel:04d}.nii.gz")
    volume("labelsTr/A_1.nii.gz", (1, 2, 3))
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    return tmp_path


@pytest.mark.parametrize(
    "document",
    [
        {"channel_names": BRATS, "labels": {"background": 0, "edema": 1, "necrosis": 2, "enhancing": 3}},
        {"modality": BRATS, "labels": {"0": "background", "1": "edema", "2": "necrosis", "3": "enhancing"}},
    ],
    ids=["version 2", "version 1"],
)
def test_channels_by_name_and_swapped_values_by_name(volume: Write, tmp_path: Path, document: dict[str, Any]) -> None:
    cohort = find_cases(_raw(volume, tmp_path, document, 4))
    assert cohort.scheme is not None
    assert (cohort.layout, cohort.scheme.name) == ("nnunet", "msd-brats")
    (case,) = cohort.cases
    assert case.id == "A_1"
    assert {name: image.path.name for name, image in case.images.items()} == {
        "t1n": "A_1_0001.nii.gz",
        "t1c": "A_1_0002.nii.gz",
        "t2w": "A_1_0003.nii.gz",
        "t2f": "A_1_0000.nii.gz",
    }
    assert case.label is not None


def test_other_images_in_the_tree_change_nothing(volume: Write, tmp_path: Path) -> None:
    labels = {"0": "background", "1": "a"}
    listed = [{"image": "./imagesTr/A_1.nii.gz", "label": "./labelsTr/A_1.nii.gz"}]
    document = {"modality": {"0": "T2"}, "labels": labels, "training": listed}
    root = _raw(volume, tmp_path, document, 2)
    volume("predictions/A_1.nii.gz")
    volume("predictions/A_7_0000.nii.gz")
    cohort = find_cases(root)
    assert cohort.layout == "nnunet"
    assert [(case.id, tuple(case.images), case.label is not None) for case in cohort.cases] == [("A_1", ("t2w",), True)]
    beyond, others = (problem.found for problem in cohort.problems)
    assert beyond == "1 file left out, channel numbers beyond the 1 that dataset.json names: A_1_0001.nii.gz"
    assert others.endswith("A_1.nii.gz, A_7_0000.nii.gz")


def test_time_points_share_their_patient(volume: Write, tmp_path: Path) -> None:
    for time in (100, 101):
        volume(f"imagesTr/BraTS-GLI-00005-{time}_0000.nii.gz")
    document = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "a": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    assert [case.patient for case in find_cases(tmp_path).cases] == ["BraTS-GLI-00005"] * 2


def test_regions_of_brats_are_recognised(volume: Write, tmp_path: Path) -> None:
    labels = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]}
    document = {"channel_names": BRATS, "labels": labels, "regions_class_order": [1, 2, 3]}
    cohort = find_cases(_raw(volume, tmp_path, document, 4))
    assert cohort.scheme is not None
    assert cohort.scheme.name == "msd-brats"


def test_own_regions_keep_their_members_and_their_painting_order(volume: Write, tmp_path: Path) -> None:
    labels = {"background": 0, "organ": [1, 2], "tumour": [2]}
    document = {"channel_names": {"0": "CT"}, "labels": labels, "regions_class_order": [1, 2]}
    cohort = find_cases(_raw(volume, tmp_path, document, 1))
    assert cohort.scheme is not None
    outputs = [(output.name, output.label, output.members) for output in outputs_of(cohort.scheme)]
    assert outputs == [("organ", 1, (1, 2)), ("tumour", 2, (2,))]


def test_regions_without_their_order_are_refused(volume: Write, tmp_path: Path) -> None:
    document = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": [1, 2]}}
    with pytest.raises(DataError, match="regions_class_order"):
        find_cases(_raw(volume, tmp_path, document, 1))


def test_ignore_label_is_no_class(volume: Write, tmp_path: Path) -> None:
    document = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1, "Ignore": 2}}
    cohort = find_cases(_raw(volume, tmp_path, document, 1))
    assert cohort.scheme == LabelScheme("classes", {"organ": 1}, ignore=2)
    assert not cohort.problems


@pytest.mark.parametrize(("ignore", "found"), [([3, 4], "several values"), (1, "also the value of a class")])
def test_an_ignore_label_is_one_value_of_its_own(volume: Write, tmp_path: Path, ignore: object, found: str) -> None:
    document = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1, "ignore": ignore}}
    with pytest.raises(DataError, match=found):
        find_cases(_raw(volume, tmp_path, document, 1))


def test_bare_inference_folder_and_named_channels(volume: Write, tmp_path: Path) -> None:
    for case in ("A", "B"):
        for channel in range(2):
            volume(f"{case}_{channel:04d}.nii.gz")
    nameless = find_cases(tmp_path)
    assert (nameless.layout, nameless.modalities) == ("nnunet", ("channel_0", "channel_1"))
    assert "--modality" in nameless.problems[0].remedy
    named = find_cases(tmp_path, modalities={"t2f": "0000", "t1c": "0001"})
    assert named.modalities == ("t1c", "t2f")
    assert named.cases[0].images["t2f"].path.name == "A_0000.nii.gz"
    assert named.problems == ()


def test_numbered_cases_are_no_channels(volume: Write, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        volume(f"scan_{number:04d}.nii.gz")
    cohort = find_cases(tmp_path)
    assert (cohort.layout, len(cohort.cases)) == ("folder", 3)


def test_pictures_with_three_channels_in_one_file(tmp_path: Path) -> None:
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    PIL.Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(tmp_path / "imagesTr" / "a_0000.png")
    PIL.Image.fromarray(np.eye(4, dtype=np.uint8)).save(tmp_path / "labelsTr" / "a.png")
    document = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "road": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(document | {"file_ending": ".png"}))
    cohort = find_cases(tmp_path)
    assert (cohort.dims, cohort.modalities) == (2, ("R", "G", "B"))
    assert [image.channel for image in cohort.cases[0].images.values()] == [0, 1, 2]


def test_numbered_scans_are_no_channels(tmp_path: Path) -> None:
    scans(tmp_path, "images/scan_{0000,0001,0002,0003}.nii.gz")
    cohort = find_cases(tmp_path / "images")
    assert [(case.id, tuple(case.images)) for case in cohort.cases] == [
        (f"scan_000{number}", ("image",)) for number in range(4)
    ]


def test_channel_numbers_of_four_digits_in_dataset_json(volume: Write, tmp_path: Path) -> None:
    labels = {"background": 0, "a": 1}
    root = _raw(volume, tmp_path, {"channel_names": {"0000": "T1", "0001": "T2"}, "labels": labels}, 2)
    assert find_cases(root).modalities == ("t1n", "t2w")
    (root / "dataset.json").write_text(json.dumps({"channel_names": {"1": "T1", "2": "T2"}, "labels": labels}))
    with pytest.raises(DataError, match=r"numbers its channels 1, 2; expected 0 to 1\. Correct the numbers"):
        find_cases(root)
