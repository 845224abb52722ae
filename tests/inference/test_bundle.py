"""Masks of MONAI bundles: equal to those of MONAI's own evaluator."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

import segkit
from segkit.errors import DataError, RequestError
from segkit.inference.predictor import Predictor
from tests.helpers import LPS, read_voxels, run_segkit, save_nifti
from tests.monai_bundles import (
    BRATS,
    CT,
    SEGRESNET,
    SWINUNETR,
    UNET,
    WHOLE_BODY,
    evaluate_with_monai,
    inference,
    regions,
    softmax_first,
    transform,
    write_bundle,
)

BRATS_CHANNELS = ("T1c", "T1", "T2", "FLAIR")
BRATS_FILES = ("t1ce", "t1", "t2", "flair")
REGIONS = ("Tumor core", "Whole tumor", "Enhancing tumor")
CLASSES = ("background", "first", "second", "third")


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume of 26 x 30 x 15 voxels of 1.3 x 0.9 x 2.5 mm, blocks of noise around 0, turned by 10 degrees."""
    blocks = np.random.default_rng(0).normal(50, 120, (7, 8, 4))
    voxels = blocks.repeat(4, 0).repeat(4, 1).repeat(4, 2)[:26, :30, :15].astype(np.float32)
    voxels[:4] = voxels[:, 27:] = -1000.0
    turn = np.radians(10)
    affine = np.diag([-1.3, -0.9, 2.5, 1.0])
    affine[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]] @ affine[:2, :2]
    affine[:3, 3] = 40, -30, 7
    return save_nifti(tmp_path_factory.mktemp("scan") / "scan.nii.gz", voxels, affine)


def dice_by_label(one: np.ndarray, other: np.ndarray) -> dict[int, float]:
    found = {}
    for label in np.union1d(one, other):
        both = (one == label) & (other == label)
        found[int(label)] = 2 * float(both.sum()) / float((one == label).sum() + (other == label).sum())
    return found


def masks(bundle: Path, images: Sequence[Path], scans: Path, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """The mask of MONAI's evaluator and that of `segkit infer`."""
    expected = evaluate_with_monai(bundle, images, out / "monai")
    manifest = segkit.infer(bundle, scans, out / "segkit", backend="torch", device="cpu", workers=0)
    assert manifest["summary"]["done"] == 1, manifest["cases"]
    (mask,) = (out / "segkit").glob("*.nii.gz")
    return expected, read_voxels(mask)


@pytest.mark.parametrize(
    ("network", "preprocessing", "postprocessing", "windows"),
    [
        pytest.param(UNET, CT, softmax_first(), {"roi_size": [16, 16, 16], "overlap": 0.5}, id="unet"),
        pytest.param(
            UNET,
            WHOLE_BODY,
            softmax_first(invert_labels=True),
            {"roi_size": [16, 24, 32], "overlap": 0.25, "mode": "gaussian", "padding_mode": "replicate"},
            id="labels-inverted",
        ),
        pytest.param(
            UNET,
            [*CT[:5], transform("CropForegroundd", source_key="@image_key"), CT[5]],
            softmax_first(),
            {"roi_size": 16},
            id="cropped",
        ),
        pytest.param(SWINUNETR, CT, softmax_first(), {"roi_size": [32, 32, 64], "overlap": 0.25}, id="swinunetr"),
    ],
)
def test_masks_are_those_of_the_evaluator_of_monai(
    network: dict[str, Any],
    preprocessing: list[Any],
    postprocessing: list[Any],
    windows: dict[str, Any],
    scan: Path,
    tmp_path: Path,
) -> None:
    document = inference(network, preprocessing, postprocessing, **windows)
    bundle = write_bundle(tmp_path / "bundle", document, ["image"], CLASSES[: network["out_channels"]])
    expected, found = masks(bundle, [scan], scan, tmp_path)
    assert len(np.unique(expected)) == network["out_channels"]
    assert min(dice_by_label(expected, found).values()) >= 0.999


@pytest.fixture(scope="module")
def brats_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    document = inference(SEGRESNET, BRATS, regions(), roi_size=[32, 32, 16], overlap=0.5)
    return write_bundle(tmp_path_factory.mktemp("brats") / "bundle", document, BRATS_CHANNELS, REGIONS, seed=3)


@pytest.fixture(scope="module")
def brats_case(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 x 48 x 24 voxels at the edge of the tumour of a real case, files in the naming of BraTS 2021."""
    source = shared_data / "brats2021" / "BraTS2021_00006"
    folder = tmp_path_factory.mktemp("case") / source.name
    folder.mkdir()
    seg = read_voxels(source / f"{source.name}_seg.nii.gz")
    centre = [int(place.mean()) for place in np.nonzero(seg)]
    box = tuple(slice(max(middle - 24, 0), middle + 24) for middle in centre[:2])
    for name in (*BRATS_FILES, "seg"):
        image = nib.load(source / f"{source.name}_{name}.nii.gz")
        image.slicer[(*box, slice(centre[2] - 12, centre[2] + 12))].to_filename(folder / f"{source.name}_{name}.nii.gz")
    return folder


def test_regions_of_a_real_case_with_modalities_by_name(brats_bundle: Path, brats_case: Path, tmp_path: Path) -> None:
    """The bundle wants T1c first; its outputs are TC, WT, ET, its labels 1, 2, 4."""
    images = [brats_case / f"{brats_case.name}_{name}.nii.gz" for name in BRATS_FILES]
    expected, found = masks(brats_bundle, images, brats_case, tmp_path)
    assert {1, 2, 4} <= set(np.unique(expected))
    assert min(dice_by_label(expected, found).values()) >= 0.999
    swapped = evaluate_with_monai(brats_bundle, [images[1], images[0], *images[2:]], tmp_path / "swapped")
    assert min(dice_by_label(swapped, found).values()) < 0.999


def test_other_paths_of_the_predictor(brats_bundle: Path, scan: Path, tmp_path: Path) -> None:
    document = inference(UNET, CT, softmax_first(), roi_size=[16, 16, 16], overlap=0.5)
    bundle = write_bundle(tmp_path / "bundle", document, ["image"], CLASSES[:3])
    predictor = Predictor.load(bundle)
    prediction = predictor(scan, with_probabilities=True)
    assert prediction.probabilities is not None
    np.testing.assert_allclose(prediction.probabilities.sum(0), 1, atol=1e-3)
    disagrees = prediction.probabilities.argmax(0) != prediction.labels
    assert disagrees.mean() < 1e-3  # ties of 16-bit probabilities
    assert predictor.card.outputs[1].name == "first"
    copied = pickle.loads(pickle.dumps(predictor))  # as Ray sends it
    np.testing.assert_array_equal(copied(scan).labels, prediction.labels)
    with pytest.raises(RequestError, match=r"cannot be part of an ensemble of 2 models"):
        Predictor.load([bundle, bundle])
    with pytest.raises(RequestError, match=r"does not say along which axes its training mirrored\. Omit --tta"):
        Predictor.load(bundle, uses_tta=True)
    missing = np.random.default_rng(0).normal(5, 1, (16, 16, 16)).astype(np.float32)
    for name in BRATS_FILES[:3]:
        save_nifti(tmp_path / "scans" / "Case_1" / f"Case_1_{name}.nii.gz", missing, LPS)
    manifest = segkit.infer(brats_bundle, tmp_path / "scans", tmp_path / "masks", backend="torch", device="cpu")
    assert "modality FLAIR is missing" in manifest["cases"][0]["error"]


def test_inverted_labels_have_no_probabilities(scan: Path, tmp_path: Path) -> None:
    document = inference(UNET, WHOLE_BODY, softmax_first(invert_labels=True), roi_size=[16, 16, 16])
    predictor = Predictor.load(write_bundle(tmp_path / "bundle", document, ["image"], CLASSES[:3]))
    with pytest.raises(DataError, match=r"brings labels back .*, not probabilities\. Omit --save-probabilities"):
        predictor(scan, with_probabilities=True)


def test_a_changed_configuration_makes_other_masks(scan: Path, tmp_path: Path) -> None:
    document = inference(UNET, CT, softmax_first(), roi_size=[16, 16, 16], overlap=0.5)
    bundle = write_bundle(tmp_path / "bundle", document, ["image"], CLASSES[:3])
    before = Predictor.load(bundle).identity
    document["inferer"]["overlap"] = 0.25
    (bundle / "configs" / "inference.json").write_text(json.dumps(document))
    assert Predictor.load(bundle).identity != before


def test_infer_as_typed(
    brats_bundle: Path, brats_case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the fastest backend that is installed, and probabilities."""
    out = tmp_path / "masks"
    code = run_segkit(
        "infer",
        "-m",
        brats_bundle,
        "-i",
        brats_case,
        "-o",
        out,
        "-d",
        "cpu",
        "--backend",
        "torch",
        "--save-probabilities",
        "--json",
    )
    manifest = json.loads(capsys.readouterr().out)
    assert code == 0
    assert manifest["model"]["family"] == "monai"
    assert manifest["model"]["modalities"] == list(BRATS_CHANNELS)
    assert manifest["model"]["label_scheme"] == manifest["cases"][0]["label_scheme"] == "brats2017"
    assert {path.name.rpartition("_")[2] for path in (out / "probabilities").iterdir()} == {
        f"{name}.nii.gz" for name in ("WT", "TC", "ET")
    }
