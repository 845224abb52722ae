"""`segkit train --weights BUNDLE`: a run that begins with the network and the weights of a MONAI bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import segkit
from segkit.metrics.overlap import dice_by_region
from segkit.training.folder import read_config
from tests.helpers import read_voxels, run_segkit
from tests.monai_bundles import (
    BRATS,
    SEGRESNET,
    UNET,
    WHOLE_BODY,
    inference,
    regions,
    softmax_first,
    write_bundle,
)

CHANNELS = ("T1c", "T1", "T2", "FLAIR")
STANDING_STILL = (
    *("-d", "cpu", "-q", "--set", "optimiser.lr=1e-12", "--set", "training.ema_decay=0", "--set", "training.steps=1"),
    *("--set", "training.steps_per_epoch=1", "--set", "training.workers=0", "--set", "postprocessing=none"),
    *("--set", "data.folds=2", "--set", "planning.batch_size=1"),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    document = inference(SEGRESNET, BRATS, regions(), roi_size=[24, 24, 24], overlap=0.5)
    names = ("Tumor core", "Whole tumor", "Enhancing tumor")
    return write_bundle(tmp_path_factory.mktemp("zoo") / "bundle", document, CHANNELS, names, seed=3)


@pytest.fixture(scope="module")
def begun(bundle: Path, phantom_data: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("begun") / "run"
    patch = ("--set", "planning.patch_size=[24, 24, 24]")
    assert run_segkit("train", phantom_data(2), "-o", run, "--weights", bundle, *patch, *STANDING_STILL) == 0
    return run


def test_the_run_has_network_and_preprocessing_of_the_bundle(bundle: Path, begun: Path) -> None:
    config = read_config(begun)
    assert (config.network.family, config.network.size) == ("monai", None)
    assert config.network.arguments["network_def"]["_target_"] == "SegResNet"
    assert (config.preprocessing.orientation, config.preprocessing.crop) == ("IJK", "none")
    assert config.overlap == 0.5
    weights = torch.load(bundle / "models" / "model.pt")
    report = json.loads((begun / "weights.json").read_text())["report"]
    assert {*report["loaded"], *report["adapted"]} == {f"network.{name}" for name in weights}
    assert report["encoder_share"] == 1


def test_the_first_validation_is_what_infer_gives(
    bundle: Path, begun: Path, phantom_data: Callable[[int], Path], tmp_path: Path
) -> None:
    """The run has the modalities in another order, and the same outputs."""
    data, (validated,) = phantom_data(2), json.loads((begun / "split.json").read_text())["validation"]
    for model, out in ((bundle, "bundle"), (begun, "run")):
        segkit.infer(model, data, tmp_path / out, backend="torch", device="cpu", cases=[validated], workers=0)
    mask = read_voxels(tmp_path / "bundle" / f"{validated}.nii.gz")
    assert len(np.unique(mask)) == 4
    np.testing.assert_array_equal(read_voxels(tmp_path / "run" / f"{validated}.nii.gz"), mask)
    (reference,) = data.rglob(f"{validated}-seg.nii.gz")
    members = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
    expected = dice_by_region(mask, read_voxels(reference), members)
    rows = [json.loads(line) for line in (begun / "metrics.jsonl").read_text().splitlines()]
    (found,) = [row["dice"] for row in rows if "dice" in row]
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_preprocessing_without_counterpart_must_be_chosen(
    phantom_data: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = inference(UNET, WHOLE_BODY, softmax_first(invert_labels=True), roi_size=[16, 16, 16])
    bundle = write_bundle(tmp_path / "bundle", document, ["T1"], ("background", "a", "b"))
    assert run_segkit("train", phantom_data(2), "-o", tmp_path / "run", "--weights", bundle, *STANDING_STILL) == 2
    assert "preprocessing::ScaleIntensityd of the bundle has no counterpart" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
