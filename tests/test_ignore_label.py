"""Voxels of unknown tissue, nnU-Net's label "ignore": no part in planning, sampling, validation, scores and choices."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from segkit.checkpoint.run_folder import load_card
from segkit.config import build_config
from segkit.errors import RequestError
from segkit.evaluation.score_folder import evaluate_folders
from segkit.labels import SCHEMES, LabelScheme, classes_scheme, outputs_of, scheme_from_json, translate, without_ignored
from segkit.metrics.overlap import dice_by_region
from segkit.preparing.augmentation import AugmentationConfig, training_transforms
from segkit.preparing.cache import PreparedStore, StoredCases, foreground_voxels
from segkit.preparing.fingerprint import take_fingerprint
from segkit.preparing.patch_sampling import PatchDataset
from segkit.preparing.preprocessing import PreprocessingConfig
from segkit.reading.layouts.table import find_cases
from segkit.training.choose_postprocessing import ScoredCases, choose_postprocessing
from segkit.training.config import TrainConfig
from segkit.training.run import train
from segkit.training.segmentation import SegmentationKind
from segkit.training.task import TrainingRequest
from tests.helpers import read_voxels, run_segkit, save_nifti

IGNORE = 3
SHAPE = (20, 16, 12)
SCHEME = LabelScheme("classes", {"core": 1, "shell": 2}, ignore=IGNORE)


def scan(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A ball of 200 in a shell of 100 on noise, and its label map, known in every third plane of axis 2 only."""
    places = np.indices(SHAPE).transpose(1, 2, 3, 0)
    distance = np.linalg.norm(places - (9 + number % 3, 7, 6), axis=-1)
    labels = np.select([distance < 3, distance < 5], [1, 2], 0).astype(np.uint8)
    noise = np.random.default_rng(number).normal(10, 1, SHAPE)
    image = (noise + np.array([0, 200, 100])[labels]).astype(np.float32)
    labels[..., np.arange(SHAPE[2]) % 3 != 0] = IGNORE
    return image, labels


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six cases in nnU-Net's layout."""
    folder = tmp_path_factory.mktemp("ignore") / "Dataset001_Balls"
    for number in range(6):
        image, labels = scan(number)
        save_nifti(folder / "imagesTr" / f"ball{number}_0000.nii.gz", image)
        save_nifti(folder / "labelsTr" / f"ball{number}.nii.gz", labels)
    labels = {"background": 0, "core": 1, "shell": 2, "ignore": IGNORE}
    document = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 6, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(document))
    return folder


def test_a_scheme_keeps_its_ignored_value() -> None:
    assert scheme_from_json(SCHEME.to_json()) == SCHEME
    assert scheme_from_json({"name": "brats2023", "labels": {}, "ignore": 9}).ignore == 9
    assert "ignore" not in SCHEMES["brats2023"].to_json()
    with pytest.raises(ValueError, match="ignored value 2 is also the value of a class"):
        LabelScheme("classes", {"core": 1, "shell": 2}, ignore=2)


def test_translated_voxels_stay_ignored() -> None:
    source = scheme_from_json({"name": "brats2023", "labels": {}, "ignore": 9})
    assert translate(np.array([0, 3, 9], np.uint8), source, SCHEMES["brats2017"]).tolist() == [0, 4, 9]


@pytest.mark.parametrize("name", ["brats2023,ignore=9", "classes,ignore=3"])
def test_any_label_scheme_can_be_named_with_an_ignored_value(data: Path, name: str) -> None:
    cohort = find_cases(data, label_scheme=name)
    assert cohort.scheme is not None
    assert cohort.scheme.ignore == int(name[-1])
    assert IGNORE not in cohort.scheme.values.values() or name.startswith("brats")


@pytest.mark.parametrize("name", ["brats2023,ignore=3", "brats2023,ignore=0", "classes,ignore=256", "classes,ignore=x"])
def test_a_value_that_cannot_be_ignored_is_refused(data: Path, name: str) -> None:
    with pytest.raises(RequestError, match=r"cannot ignore the value '.*expected a value from 1 to 255"):
        find_cases(data, label_scheme=name)


def test_check_names_it(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_segkit("check", data, "--no-estimate") == 0
    assert "(1 core, 2 shell; 3 is ignored)" in capsys.readouterr().out
    assert run_segkit("check", data, "--no-estimate", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["label_scheme"] == {"name": "classes", "labels": {"core": 1, "shell": 2}, "ignore": IGNORE}
    assert not document["problems"]


def test_intensities_are_planned_from_annotated_voxels(data: Path) -> None:
    """All labelled voxels are brighter than 90, most ignored ones are near 10."""
    assert take_fingerprint(find_cases(data)).foreground.low > 90


def test_voxels_for_patch_centres() -> None:
    labels = np.array([[0, 1, 3], [3, 2, 0]], np.uint8)
    found = {value: places.tolist() for value, places in foreground_voxels(labels, 0, IGNORE).items()}
    assert found == {1: [1], 2: [4], 0: [0, 1, 4, 5]}
    assert foreground_voxels(np.full((2, 2), IGNORE, np.uint8), 0, IGNORE) == {}
    assert 0 not in foreground_voxels(labels % 3, 0, IGNORE)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_patches_have_annotated_voxels(data: Path, tmp_path: Path, fraction: float) -> None:
    """With planes of 4 voxels around a centre, three of them ignored, only patches on ignored planes have none."""
    cohort = find_cases(data)
    config = PreprocessingConfig(normalisation="zscore", crop="none")
    folders, _ = PreparedStore(tmp_path).entries(cohort.cases, cohort.modalities, cohort.scheme, config)
    transforms = training_transforms(AugmentationConfig(enabled=False), (4, 4, 1), foreground_fraction=fraction)
    patches = PatchDataset(StoredCases(list(folders.values())), transforms, seed=0, length=100)
    found = [patches[index]["label"] for index in range(100)]
    assert all(bool((labels != IGNORE).any()) for labels in found)
    assert any(bool((labels == 0).all()) for labels in found) == (fraction == 0)


def test_dice_of_annotated_voxels_only() -> None:
    reference = np.array([1, 1, 0, IGNORE, IGNORE], np.uint8)
    regions = {"core": (1,)}
    assert dice_by_region(np.array([1, 0, 0, 1, 1], np.uint8), reference, regions, IGNORE) == {"core": 2 / 3}
    assert dice_by_region(np.array([1, 0, 0, 0, 2], np.uint8), reference, regions, IGNORE) == {"core": 2 / 3}


@pytest.mark.parametrize("protocol", ["legacy", "brats2026"])
def test_ignored_voxels_change_no_score(tmp_path: Path, protocol: str) -> None:
    """A wrong prediction at ignored voxels costs nothing; elsewhere it does."""
    documents = []
    _, reference = scan(0)
    exact = np.where(reference == IGNORE, 0, reference).astype(np.uint8)
    wrong = np.where(reference == IGNORE, 1, reference).astype(np.uint8)
    worse = wrong.copy()
    worse[:4, :4, 0] = 1
    save_nifti(tmp_path / "references" / "ball0.nii.gz", reference)
    for name, prediction in (("exact", exact), ("wrong", wrong), ("worse", worse)):
        save_nifti(tmp_path / name / "ball0.nii.gz", prediction)
        found = evaluate_folders(
            tmp_path / name, tmp_path / "references", protocol=protocol, label_scheme="classes,ignore=3"
        )
        assert not found.errors
        documents.append(found.to_json())
    regions = [document["cases"][0]["regions"] for document in documents]
    assert documents[0]["label_scheme"] == {"name": "classes", "labels": {"label_1": 1, "label_2": 2}, "ignore": 3}
    assert regions[0] == regions[1]
    assert regions[2]["label_1"]["dice"] < regions[1]["label_1"]["dice"] == 1


def test_a_prediction_never_has_it(tmp_path: Path) -> None:
    _, reference = scan(0)
    for name in ("references", "predictions"):
        save_nifti(tmp_path / name / "ball0.nii.gz", reference)
    (tmp_path / "predictions" / "other.txt").write_text("")
    document = {"channel_names": {"0": "MRI"}, "labels": {"core": 1, "shell": 2, "ignore": IGNORE}}
    save_nifti(tmp_path / "data" / "imagesTr" / "ball0_0000.nii.gz", scan(0)[0])
    save_nifti(tmp_path / "data" / "labelsTr" / "ball0.nii.gz", reference)
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(document))
    found = evaluate_folders(tmp_path / "predictions", tmp_path / "data")
    assert "holds label values 3" in found.errors["ball0"]


def test_copies_in_another_scheme_keep_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[0, 0] = [0, 1, 3, 9]
    document = {"channel_names": {"0": "t1n", "1": "t1c"}, "labels": {"NCR": 1, "ED": 2, "ET": 3, "ignore": 9}}
    for channel in range(2):
        save_nifti(tmp_path / "data" / "imagesTr" / f"a_000{channel}.nii.gz", labels * 10.0)
    save_nifti(tmp_path / "data" / "labelsTr" / "a.nii.gz", labels)
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(document))
    convert = ("convert", "labels", tmp_path / "data", "-o", tmp_path / "out", "--to")
    assert run_segkit(*convert, "brats2017") == 0
    assert read_voxels(tmp_path / "out" / "a.nii.gz")[0, 0].tolist() == [0, 1, 4, 9]
    assert json.loads((tmp_path / "out" / "label_scheme.json").read_text())["ignore"] == 9
    assert run_segkit(*convert, "brats2017,ignore=7", "--overwrite") == 0
    assert read_voxels(tmp_path / "out" / "a.nii.gz")[0, 0].tolist() == [0, 1, 4, 7]
    document["labels"] = {"NCR": 1, "ED": 2, "ET": 3, "ignore": 4}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(document))
    capsys.readouterr()
    assert run_segkit(*convert, "brats2017") == 2
    assert "label scheme brats2017 cannot ignore the value '4'" in capsys.readouterr().err


def test_pictures_show_annotated_voxels() -> None:
    reference = np.array([0, 1, IGNORE], np.uint8)
    assert without_ignored(reference, SCHEME).tolist() == [0, 1, 0]
    assert without_ignored(reference, None) is reference


def test_postprocessing_is_chosen_on_annotated_voxels() -> None:
    """A false component of 27 voxels is removed if it is annotated, and left alone if all of it is ignored."""
    reference = np.zeros((16, 16, 16), np.uint8)
    reference[2:8, 2:8, 2:8] = 1
    prediction = reference.copy()
    prediction[12:15, 12:15, 12:15] = 1
    outputs = outputs_of(classes_scheme("classes", {"core": 1}))

    def chosen(known: np.ndarray, ignore: int | None) -> object:
        cases = ScoredCases()
        for number in range(3):
            cases.add(str(number), prediction, known, (1, 1, 1))
        return choose_postprocessing(cases, outputs, ignore)

    partly, wholly = reference.copy(), reference.copy()
    partly[12:15, 12:15, 12] = IGNORE  # 9 of its 27 voxels
    wholly[12:15, 12:15, 12:15] = IGNORE
    whole, part = chosen(reference, None), chosen(partly, IGNORE)
    assert whole is not None
    assert part is not None
    assert whole.rules[0].smallest_mm3 == part.rules[0].smallest_mm3 == 50  # type: ignore[attr-defined]
    assert chosen(wholly, IGNORE) is None


def test_training_on_a_third_of_the_planes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "network": {"size": "tiny", "arguments": {"widths": [8, 12]}},
        "planning": {"patch_size": [8, 8, 8], "batch_size": 2},
        "training": {"steps": 80, "steps_per_epoch": 40, "ema_decay": 0},
        "optimiser": {"lr": 0.02},
        "augmentation": {"enabled": False},
    }
    config = build_config(TrainConfig, [("test", settings)])
    run = tmp_path / "run"
    summary = train(TrainingRequest((data,), run, config, torch.device("cpu")), SegmentationKind())
    assert summary.scores["dice"]["core"] > 0.8
    card = load_card(run)
    assert card.scheme().ignore == IGNORE
    assert [output.label for output in card.outputs] == [0, 1, 2]
    assert run_segkit("infer", "-m", run, "-i", data / "imagesTr", "-o", tmp_path / "masks", "-d", "cpu") == 0
    masks = [read_voxels(path) for path in sorted((tmp_path / "masks").glob("*.nii.gz"))]
    assert len(masks) == 6
    assert all(IGNORE not in mask for mask in masks)
    assert any((mask[..., np.arange(SHAPE[2]) % 3 != 0] == 1).any() for mask in masks)
    assert run_segkit("evaluate", "-p", tmp_path / "masks", "-r", data, "--json") == 0
    capsys.readouterr()
