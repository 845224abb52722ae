"""Whole training runs with transforms of the user, from the settings and from Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from monai.transforms import Compose, RandBiasFieldd, RandGibbsNoised, RandSpatialCropd

import segkit
from segkit.checkpoint.tensors import load_state
from segkit.errors import RequestError
from tests.helpers import run_segkit

SMALL: dict[str, Any] = {
    "network": {"size": "tiny", "arguments": {"widths": [4, 6]}},
    "data": {"folds": 2},
    "planning": {"patch_limit": 16, "batch_limit": 1},
    "training": {"steps": 4, "steps_per_epoch": 2, "validation_cases": 1},
}

_ON_DEVICE = "augmentation.on_device=true"


@pytest.fixture(scope="module")
def data(phantom_data: Callable[[int], Path]) -> Path:
    return phantom_data(2)


class _SwitchedOffError(Exception):
    """Stands for a machine that is switched off."""


def _cut_after_two(_: float, text: str) -> None:
    if text.startswith("step 4 ") or "step 3 " in text:
        raise _SwitchedOffError


def _weights(run: Path) -> dict[str, torch.Tensor]:
    state = load_state(run)
    assert state["progress"]["step"] == 4
    weights: dict[str, torch.Tensor] = state["model"]
    return weights


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine of one core
def test_a_yaml_with_transforms_of_monai_trains_and_resumes_exactly(data: Path, tmp_path: Path) -> None:
    """Bit for bit with 0 and 4 workers, after a stop, and with patches that are made on the device of the training."""
    transforms = [
        {"name": "RandBiasFieldd", "keys": ["image"], "prob": 0.5},
        {"name": "RandGibbsNoised", "prob": 0.5, "alpha": [0.0, 0.6], "place": "before"},
        {"name": "RandAffined", "prob": 0.5, "rotate_range": [0.2, 0.2, 0.2]},
    ]
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "training": {**SMALL["training"], "transforms": transforms}}))
    arguments = ("-d", "cpu", "--config", path)
    for name, setting in {"0": "training.workers=0", "4": "training.workers=4", "device": _ON_DEVICE}.items():
        assert run_segkit("train", data, "-o", tmp_path / name, *arguments, "-q", "--set", setting) == 0
    with pytest.raises(_SwitchedOffError):
        segkit.train(data, tmp_path / "cut", config=path, device="cpu", on_progress=_cut_after_two)
    assert run_segkit("train", data, "-o", tmp_path / "cut", *arguments, "-q", "--resume", "--allow-changes",
                      "--set", _ON_DEVICE) == 0  # fmt: skip
    assert run_segkit("train", data, "-o", tmp_path / "plain", "-d", "cpu", "--config", path, "-q",
                      "--set", "training.transforms=[]") == 0  # fmt: skip

    assert yaml.safe_load((tmp_path / "0" / "config.yaml").read_text())["training"]["transforms"] == transforms
    expected = _weights(tmp_path / "0")
    for name in ("4", "device", "cut"):
        assert all(torch.equal(tensor, expected[key]) for key, tensor in _weights(tmp_path / name).items())
    assert any(not torch.equal(tensor, expected[key]) for key, tensor in _weights(tmp_path / "plain").items())


def test_transforms_from_python_are_recorded_and_needed_again(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    transforms = Compose([RandBiasFieldd("image", prob=0.5), RandGibbsNoised("image", prob=0.5)])
    settings = {**SMALL, "training": {**SMALL["training"], "workers": 0}}
    with pytest.raises(_SwitchedOffError):
        segkit.train(data, run, device="cpu", transforms=transforms, on_progress=_cut_after_two, **settings)

    names = ["RandBiasFieldd", "RandGibbsNoised"]
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["python_transforms"] == names
    with pytest.raises(RequestError, match="the run uses transforms from Python: RandBiasFieldd, RandGibbsNoised"):
        segkit.train(data, run, device="cpu", resume=True)
    assert run_segkit("train", data, "-o", run, "-d", "cpu", "--resume", "-q") == 2
    with pytest.raises(RequestError, match=r"training\.python_transforms .*RandGibbsNoised.* -> \['RandBiasFieldd'\]"):
        segkit.train(data, run, device="cpu", resume=True, transforms=Compose([RandBiasFieldd("image")]))

    again = Compose([RandBiasFieldd("image", prob=0.5), RandGibbsNoised("image", prob=0.5)])
    assert segkit.train(data, run, device="cpu", resume=True, transforms=again).steps == 4
    segkit.train(data, tmp_path / "whole", device="cpu", transforms=again, **settings)
    expected = _weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in _weights(run).items())


def test_a_transform_that_changes_the_patch_size_is_refused_before_the_first_step(data: Path, tmp_path: Path) -> None:
    crop = Compose([RandSpatialCropd(("image", "label"), roi_size=(8, 8, 8), random_size=False)])
    with pytest.raises(RequestError, match="RandSpatialCropd changes the shape of the image"):
        segkit.train(data, tmp_path / "run", device="cpu", transforms=crop, **SMALL)
    assert not (tmp_path / "run" / "last.ckpt").exists()
