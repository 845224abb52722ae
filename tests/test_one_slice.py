"""Volumes of one slice, along any axis: train, resume, infer, evaluate; and figures that cannot be drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segkit.reading.volume import Grid
from segkit.report import figures
from segkit.report.figures import drawing, overlay_figure
from tests.helpers import LPS, read_voxels, run_segkit, save_nifti

INFERENCE = ("-d", "cpu", "--backend", "torch", "-q")
SETTINGS = ("--set", "network.arguments={widths: [4, 8]}", "--set", "training.steps_per_epoch=2", "-d", "cpu")


def write_slices(folder: Path, axis: int) -> Path:
    """Four cases of 24 x 24 voxels and one slice along `axis`: a bright square on noise."""
    affine = LPS.copy()
    affine[axis, axis] *= 5
    for number in range(4):
        labels = np.zeros((24, 24), np.uint8)
        labels[6 + number : 14, 6:14] = 1
        image = np.random.default_rng(number).normal(20, 3, (24, 24)) + 80 * labels
        save_nifti(folder / "imagesTr" / f"c{number}_0000.nii.gz", np.expand_dims(image, axis).astype("f4"), affine)
        save_nifti(folder / "labelsTr" / f"c{number}.nii.gz", np.expand_dims(labels, axis), affine)
    document = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "square": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_train_resume_infer_evaluate(tmp_path: Path, axis: int, capsys: pytest.CaptureFixture[str]) -> None:
    data, run, masks = write_slices(tmp_path / "data", axis), tmp_path / "run", tmp_path / "masks"
    training = ("train", data, "-o", run, "--preset", "tiny", *SETTINGS, "--set")
    assert run_segkit(*training, "training.steps=2") == 0
    assert run_segkit(*training, "training.steps=4", "--resume", "--allow-changes") == 0
    assert json.loads((run / "validation.json").read_text())["steps"] == 4
    with Image.open(run / "figures" / "validation_0.png") as picture:
        assert picture.width > 2 * picture.height  # one plane: image, prediction and reference side by side
    assert run_segkit("infer", "-m", run, "-i", data / "imagesTr", "-o", masks, *INFERENCE) == 0
    shape = tuple(np.insert([24, 24], axis, 1).tolist())
    assert [read_voxels(path).shape for path in sorted(masks.glob("*.nii.gz"))] == [shape] * 4
    assert run_segkit("evaluate", "-p", masks, "-r", data, "-o", tmp_path / "eval", "--figures", 1, "-q") == 0
    assert len(list((tmp_path / "eval" / "figures").glob("c*.png"))) == 1
    assert "cannot be drawn" not in capsys.readouterr().err


def test_a_line_of_voxels_is_drawn_too(tmp_path: Path) -> None:
    line = np.ones((6, 1, 1), np.uint8)
    overlay_figure(tmp_path / "line.png", line * 3.0, line, Grid((6, 1, 1), LPS), reference=line)
    assert (tmp_path / "line.png").exists()


def test_a_figure_never_ends_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no font")

    monkeypatch.setattr(figures, "_legend", fail)
    monkeypatch.setattr(figures, "_save", fail)
    data, run = write_slices(tmp_path / "data", 2), tmp_path / "run"
    assert run_segkit("train", data, "-o", run, "--preset", "tiny", *SETTINGS, "--set", "training.steps=2") == 0
    assert f"{run / 'figures' / 'validation_0.png'} cannot be drawn: unexpected ValueError: no font" in caplog.text
    assert json.loads((run / "validation.json").read_text())["steps"] == 2
    with pytest.raises(KeyboardInterrupt), drawing(run):  # stopping is no failure of a figure
        raise KeyboardInterrupt
