"""Images of no case: named, counted in the last line, listed, exit code 1, by every command; the others are done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from segkit.labels import classes_scheme
from segkit.models.table import MODELS
from tests.helpers import run_segkit
from tests.step_models import STEPS, write_steps_run
from tests.zoo.build import masks, scans

SMALL = ("training.steps=2", "training.steps_per_epoch=1", "training.live_page=false", "training.workers=0")
SMALL_WORDS = [word for setting in (*SMALL, "network.arguments.widths=[8, 12]") for word in ("--set", setting)]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(MODELS, "steps", STEPS)
    return write_steps_run(tmp_path / "run", ("image",), classes_scheme("classes", {"label_1": 1}))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two cases with references, and a link to an image that is gone."""
    folder = tmp_path / "data"
    scans(folder, "{anna,berta}.nii.gz")
    masks(folder, "{anna,berta}_seg.nii.gz")
    (folder / "carla.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    (folder / "readme.txt").touch()
    return folder


def last_line(text: str) -> str:
    return text.rstrip().splitlines()[-1]


def test_infer_and_evaluate(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    infer = ("infer", "-m", model, "-i", data, "-o", tmp_path / "masks", "-d", "cpu", "--workers", 0)
    assert run_segkit(*infer) == 1
    err = capsys.readouterr().err
    assert last_line(err) == "2 done, 0 skipped, 0 failed, 1 left out"
    assert "left out: 1 file belongs to no usable case: carla.nii.gz" in err
    manifest = json.loads((tmp_path / "masks" / "manifest.json").read_text())
    assert manifest["left_out"] == ["carla.nii.gz"]
    assert manifest["files"] == {"images": 2, "references": 2, "companions": 0, "others": 1}
    assert run_segkit(*infer, "-q") == 1
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "ids.txt").write_text("anna\nberta\n")
    assert run_segkit(*infer, "--cases", tmp_path / "ids.txt") == 0
    assert last_line(capsys.readouterr().err) == "0 done, 2 skipped, 0 failed"
    assert run_segkit("evaluate", "-p", tmp_path / "masks", "-r", data) == 1
    assert "carla.nii.gz" in capsys.readouterr().err
    (data / "carla.nii.gz").unlink()
    assert run_segkit(*infer) == 0
    assert run_segkit("evaluate", "-p", tmp_path / "masks", "-r", data) == 0


def test_check_and_train(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_segkit("check", data, "--no-estimate") == 1
    assert "Files: images 2, references 2, other images 0, other files 1, left out 1" in capsys.readouterr().out
    assert run_segkit("check", data, "--no-estimate", "-q") == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"ERROR {data / 'carla.nii.gz'}")
    train = ("train", data, "-o", tmp_path / "run", "--preset", "tiny", "-d", "cpu", *SMALL_WORDS)
    assert run_segkit(*train) == 1
    assert last_line(capsys.readouterr().err) == "left out: 1 file belongs to no usable case: carla.nii.gz"
    document = json.loads((tmp_path / "run" / "validation.json").read_text())
    assert document["left_out"] == ["carla.nii.gz"]
