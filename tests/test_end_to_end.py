"""The verbs one after the other, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.helpers import run_segkit

_TINY = ["--preset", "tiny", "--set", "network.arguments={widths: [8, 12]}", "--set", "planning.patch_limit=16"]
_SHORT = ["--set", "training.steps=4", "--set", "training.steps_per_epoch=2", "--set", "data.folds=3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    assert run_segkit("phantom", folder / "data", "--cases", 3, "--size", 24, "--convention", "brats2023") == 0
    assert run_segkit("train", folder / "data", "-o", folder / "run", *_TINY, *_SHORT, "-q") == 0
    return folder / "run"


def test_twelve_cases_three_of_them_bad(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_segkit("phantom", tmp_path / "scans", "--cases", 12, "--size", 24, "--with-problems", "--seed", 4) == 0
    capsys.readouterr()
    assert run_segkit("infer", "-m", run, "-i", tmp_path / "scans", "-o", tmp_path / "masks", "--json") == 1
    printed = capsys.readouterr().out
    manifest = json.loads((tmp_path / "masks" / "manifest.json").read_text())
    assert json.loads(printed)["summary"] == manifest["summary"]
    failed = {case["case"]: case["error"] for case in manifest["cases"] if case["status"] == "failed"}
    assert len(list((tmp_path / "masks").glob("*.nii.gz"))) == 9
    assert len(failed) == 3
    reasons = " | ".join(failed.values())
    assert "t1c is missing" in reasons
    assert "oriented" in reasons  # the flipped affine
    assert "truncated" in reasons
    assert "Traceback" not in reasons

    # A second call does only what is not done: nothing but the three that still fail.
    assert run_segkit("infer", "-m", run, "-i", tmp_path / "scans", "-o", tmp_path / "masks", "-q") == 1
    again = json.loads((tmp_path / "masks" / "manifest.json").read_text())
    assert sorted(case["status"] for case in again["cases"]) == ["failed"] * 3 + ["skipped"] * 9


def test_masks_lie_on_the_grid_and_in_the_labels_of_their_input(run: Path, tmp_path: Path) -> None:
    """Trained on BraTS 2023 (ET = 3), segmenting BraTS 2021 (ET = 4, LPS)."""
    assert run_segkit("phantom", tmp_path / "scans", "--cases", 1, "--size", 24, "--convention", "brats2021") == 0
    assert run_segkit("infer", "-m", run, "-i", tmp_path / "scans", "-o", tmp_path / "masks", "-q") == 0
    (path,) = (tmp_path / "masks").glob("*.nii.gz")
    mask, scan = nib.load(path), nib.load(next((tmp_path / "scans").rglob("*_flair.nii.gz")))
    np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-6)
    for code in ("qform_code", "sform_code", "xyzt_units"):
        assert mask.header[code] == scan.header[code]
    assert mask.get_data_dtype() == np.uint8
    assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1, 2, 4}


def test_scores_of_the_masks(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scans = tmp_path / "scans"
    assert run_segkit("phantom", scans, "--cases", 2, "--size", 24, "--convention", "msd", "--seed", 8) == 0
    assert run_segkit("infer", "-m", run, "-i", scans, "-o", tmp_path / "masks", "-q") == 0
    capsys.readouterr()
    assert run_segkit("evaluate", "-p", tmp_path / "masks", "-r", scans, "-o", tmp_path / "scores", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [case["case"] for case in document["cases"]] == ["BRATS_001", "BRATS_002"]
    assert set(document["summary"]) == {"WT", "TC", "ET"}
    assert document["summary"]["WT"]["dice"]["n"] == 2
    written = json.loads((tmp_path / "scores" / "scores.json").read_text(encoding="utf-8"))
    assert (written.pop("predictions"), written.pop("references")) == ("../masks", "../scans")
    assert written == document


def test_dry_run_plans_and_writes_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run.parent / "data"
    assert run_segkit("train", data, "-o", tmp_path / "new", *_TINY, "--dry-run", "-q") == 0
    assert "# chosen: " in capsys.readouterr().out
    assert not (tmp_path / "new").exists()
