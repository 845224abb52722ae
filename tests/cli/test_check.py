from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from segkit.config import build_config, preset_layers
from segkit.labels import LabelScheme
from segkit.reading.case import Cohort
from segkit.training.config import TrainConfig
from tests.helpers import LPS, run_segkit, save_nifti


def _save(path: Path, affine: Any = LPS, values: tuple[int, ...] = (5, 6)) -> None:
    array = np.zeros((4, 4, 4), np.uint8)
    array[1, 1, : len(values)] = values
    save_nifti(path, array, affine)


def _brats(root: Path, number: int = 1) -> Path:
    folder = root / f"BraTS2021_{number:05d}"
    for suffix in ("t1", "t1ce", "t2", "flair"):
        _save(folder / f"{folder.name}_{suffix}.nii.gz")
    _save(folder / f"{folder.name}_seg.nii.gz", values=(1, 2, 4))
    return folder


def _check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_segkit("check", "--no-estimate", *arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_json_is_the_contract_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "my data"
    for number in range(1, 6):
        _brats(root, number)
    code, out, _ = _check(capsys, str(root), "--json")
    document = json.loads(out)
    assert code == 0
    assert list(document) == ["layout", "label_scheme", "cases", "problems", "files", "estimate", "next_command"]
    assert document["layout"] == "brats2021"
    assert document["label_scheme"] == {"name": "brats2017", "labels": {"NCR": 1, "ED": 2, "ET": 4}}
    assert document["cases"][0]["labels"] == [1, 2, 4]
    assert document["problems"] == []
    command = shlex.split(document["next_command"])
    assert command[:6] == ["segkit", "train", str(root), "-o", "run", "--preset"]


def test_estimate_comes_from_planning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str, str, float]] = []

    def estimate_training(
        cohort: Cohort, scheme: LabelScheme, config: TrainConfig, memory_gb: float, device: object
    ) -> tuple[SimpleNamespace, float]:
        asked.append((len(cohort.cases), scheme.name, config.network.family, memory_gb))
        return SimpleNamespace(memory_gb=3.14159), 12.34

    monkeypatch.setattr("segkit.training.segmentation_plan.estimate_training", estimate_training)
    for number in range(1, 7):
        _brats(tmp_path, number)
    run_segkit("check", tmp_path, "--memory", "8G", "--json")
    assert json.loads(capsys.readouterr().out)["estimate"] == {"memory_gb": 3.14, "minutes": 12.3}
    family = build_config(TrainConfig, preset_layers("cpu")).network.family
    assert asked == [(6, "brats2017", family, 8.0)]


def test_estimate_is_for_the_preset_and_settings_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str | None, int]] = []

    def estimate_training(*arguments: object) -> tuple[SimpleNamespace, float]:
        config = arguments[2]
        assert isinstance(config, TrainConfig)
        asked.append((config.network.size, config.training.steps))
        return SimpleNamespace(memory_gb=1), 2

    monkeypatch.setattr("segkit.training.segmentation_plan.estimate_training", estimate_training)
    _brats(tmp_path, 1)
    _brats(tmp_path, 2)
    run_segkit("check", tmp_path, "--preset", "tiny", "--set", "training.steps=7", "--json")
    assert asked == [("tiny", 7)]
    assert json.loads(capsys.readouterr().out)["next_command"].endswith("--preset tiny --set training.steps=7")


def test_two_patients_can_train_and_one_is_told_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _brats(tmp_path, 1)
    document = json.loads(_check(capsys, str(tmp_path), "--json")[1])
    assert document["next_command"].startswith("segkit train")
    assert "all references are of one patient" in document["problems"][0]["found"]
    _brats(tmp_path, 2)
    document = json.loads(_check(capsys, str(tmp_path), "--json")[1])
    assert document["next_command"].startswith("segkit train")
    assert document["problems"] == []


def test_text_report_ends_with_the_next_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _brats(tmp_path, 1)
    _brats(tmp_path, 2)
    code, out, _ = _check(capsys, str(tmp_path), "--fast")
    assert code == 0
    assert "Layout: brats2021" in out
    assert "BraTS2021_00001" in out
    assert out.splitlines()[-1].startswith(f"Next: segkit train {tmp_path} ")


def test_a_wrong_header_leads_to_its_repair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _brats(tmp_path / "in")
    _save(folder / "BraTS2021_00001_t2.nii.gz", np.eye(4))
    code, out, _ = _check(capsys, str(tmp_path / "in"), "--json")
    assert code == 1
    assert json.loads(out)["next_command"] == f"segkit convert headers {tmp_path / 'in'} -o in-repaired"


def test_an_ambiguous_scheme_leads_to_the_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("t1", "flair"):
        _save(tmp_path / "p1" / f"{name}.nii.gz")
    _save(tmp_path / "p1" / "seg.nii.gz", values=(1, 2, 3))
    code, out, _ = _check(capsys, str(tmp_path), "--json")
    document = json.loads(out)
    assert (code, document["label_scheme"]) == (1, None)
    assert document["next_command"] == f"segkit check {tmp_path} --label-scheme brats2023"
    code, out, _ = _check(capsys, str(tmp_path), "--json", "--label-scheme", "msd-brats")
    document = json.loads(out)
    assert (code, document["label_scheme"]["name"]) == (0, "msd-brats")
    assert document["next_command"].endswith("--label-scheme msd-brats")


def test_scans_without_references_lead_to_inference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _save(tmp_path / "p1" / "t1.nii.gz")
    code, out, _ = _check(capsys, str(tmp_path), "--json")
    assert code == 0
    assert json.loads(out)["next_command"] == f"segkit infer -m run -i {tmp_path} -o masks"


def test_scans_with_holes_lead_to_inpainting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for ending in ("t1n-voided", "mask"):
        _save(tmp_path / "BraTS-GLI-00001-000" / f"BraTS-GLI-00001-000-{ending}.nii.gz")
    _, out, _ = _check(capsys, str(tmp_path), "--json")
    assert json.loads(out)["next_command"] == f"segkit inpaint -m run -i {tmp_path} -o filled"


def test_nothing_recognised_is_a_wrong_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _check(capsys, str(tmp_path), "--json")
    assert (code, out) == (2, "")
    assert "no layout matches; the folder holds no files" in err
    assert _check(capsys, str(tmp_path / "missing"))[0] == 2


def test_a_hostile_disk_gives_problems_and_no_crash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _brats(tmp_path / "HGG")
    for suffix in ("t1", "seg"):
        _save(tmp_path / "LGG" / folder.name / f"{folder.name}_{suffix}.nii.gz")
    (tmp_path / "HGG" / "loop").symlink_to(tmp_path)
    os.truncate(folder / f"{folder.name}_flair.nii.gz", 40)
    code, out, _ = _check(capsys, str(tmp_path), "--json")
    document = json.loads(out)
    assert code == 1
    assert "is a link to a folder that contains it" in document["problems"][0]["found"]
    (case,) = document["cases"]
    found = [problem["found"] for problem in case["problems"]]
    assert any("also exists in" in line for line in found)
    assert any("truncated" in line or "damaged" in line for line in found)
