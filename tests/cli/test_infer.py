"""`segkit infer` as a user types it, on phantoms and on a network of the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import segkit
import segkit.cli
from segkit.inference.predictor import Predictor
from segkit.labels import SCHEMES, translate
from tests.helpers import run_segkit, save_nifti, write_segmentation_run

SUFFIXES = ("t1", "t1ce", "t2", "flair")


@pytest.fixture(autouse=True)
def _only_these_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segkit.cli, "VERBS", {verb: segkit.cli.VERBS[verb] for verb in ("infer", "phantom")})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_segmentation_run(tmp_path / "run")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two whole cases of BraTS 2021 in LPS, and one without FLAIR."""
    rng = np.random.default_rng(0)
    for number in (1, 2, 3):
        name = f"BraTS2021_0000{number}"
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for suffix in SUFFIXES[: 3 if number == 3 else 4]:
            values = np.zeros((20, 22, 18), np.float32)
            values[2:18, 3:19, 1:17] = rng.normal(500, 100, (16, 16, 16))
            save_nifti(folder / f"{name}_{suffix}.nii.gz", values)
    return tmp_path / "data"


def call(*arguments: object, verb: str = "infer") -> int:
    """The exit code; torch computes unless another backend is named, for it needs no preparation."""
    if verb == "infer" and "--backend" not in arguments:
        arguments = (*arguments, "--backend", "torch")
    return run_segkit(verb, *arguments)


def test_folder_of_cases(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "masks of today"
    assert call("-m", run, "-i", data, "-o", out, "-d", "cpu", "--json") == 1
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document == json.loads((out / "manifest.json").read_text())
    assert [entry["status"] for entry in document["cases"]].count("done") == 2
    assert "BraTS2021_00003: failed: modality t2f is missing" in captured.err
    assert "[3/3] BraTS2021_00002: done (read" in captured.err
    assert "2 done, 0 skipped, 1 failed" in captured.err
    mask = nib.load(out / "BraTS2021_00001.nii.gz")
    assert mask.shape == (20, 22, 18)
    assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1, 2, 4}
    assert document["cases"][1]["label_scheme"] == "brats2017"


def test_folder_notebook_and_a_hand_written_pass_agree(run: Path, data: Path, tmp_path: Path) -> None:
    case = data / "BraTS2021_00001"
    assert call("-m", run, "-i", case, "-o", tmp_path / "out", "-d", "cpu", "-q", "--label-scheme", "brats2023") == 0
    mask = np.asarray(nib.load(tmp_path / "out" / "BraTS2021_00001.nii.gz").dataobj)
    assert np.array_equal(Predictor.load(run)(case).labels, mask)

    box = (slice(2, 18), slice(3, 19), slice(1, 17))
    planes = [nib.load(case / f"{case.name}_{suffix}.nii.gz").get_fdata(dtype=np.float32) for suffix in SUFFIXES]
    image = np.stack([plane[box][::-1, ::-1].copy() for plane in planes])  # LPS to RAS
    image = (image - image.mean((1, 2, 3), keepdims=True)) / image.std((1, 2, 3), keepdims=True)
    with torch.inference_mode():
        logits = segkit.load_model(run)(torch.from_numpy(image)[None])[0].numpy()
    expected = np.zeros((20, 22, 18), np.uint8)
    for plane, value in zip(logits, (2, 1, 3), strict=True):
        expected[box][plane[::-1, ::-1] > 0] = value  # RAS to LPS
    # One window: blending divides by its own weight, which rounds logits that are 0 but for the last digit.
    assert (mask == expected).mean() > 0.999
    assert len(np.unique(expected)) > 1


def test_the_yardstick_agrees(run: Path, data: Path, tmp_path: Path, shared_data: Path) -> None:
    yardstick = shared_data.parent / "tools" / "reference_infer.py"
    case = data / "BraTS2021_00002"
    command = [sys.executable, str(yardstick), str(run), str(case), str(tmp_path / "reference.nii.gz")]
    root = str(Path(segkit.__file__).parents[1])
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": root})
    assert call("-m", run, "-i", case, "-o", tmp_path, "-d", "cpu", "-q", "--label-scheme", "brats2023") == 0
    reference = nib.load(tmp_path / "reference.nii.gz")
    mask = nib.load(tmp_path / "BraTS2021_00002.nii.gz")
    assert np.array_equal(mask.affine, reference.affine)
    different = np.asarray(mask.dataobj) != np.asarray(reference.dataobj)
    assert different.mean() < 1e-4  # a logit of 0 but for the last digit may fall on either side


def test_the_same_scan_gets_the_same_mask_in_every_layout(run: Path, tmp_path: Path) -> None:
    masks = {}
    for convention in ("brats2021", "msd", "bids"):  # LPS, RAS and ASL; label schemes of 2017, Decathlon and 2023
        data, out = tmp_path / convention, tmp_path / f"masks-{convention}"
        assert call(data, "--cases", 1, "--size", 24, "--convention", convention, "--seed", 3, verb="phantom") == 0
        assert call("-m", run, "-i", data, "-o", out, "-d", "cpu", "-q") == 0
        (entry,) = json.loads((out / "manifest.json").read_text())["cases"]
        image = nib.as_closest_canonical(nib.load(out / f"{entry['case']}.nii.gz"))
        masks[entry["label_scheme"]] = np.asarray(image.dataobj)
    assert list(masks) == ["brats2017", "msd-brats", "brats2023"]
    assert len(np.unique(masks["brats2023"])) > 1
    for scheme, labels in masks.items():
        assert np.array_equal(translate(labels, SCHEMES[scheme], SCHEMES["brats2023"]), masks["brats2023"])


def test_chosen_cases_then_all_then_again(run: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "cases.txt").write_text("BraTS2021_00002  # the second\n")
    out, common = tmp_path / "out", ("-m", run, "-i", data, "-o", tmp_path / "out", "-d", "cpu", "-q")
    assert call(*common, "--cases", tmp_path / "cases.txt") == 0
    assert [path.name for path in out.glob("*.nii.gz")] == ["BraTS2021_00002.nii.gz"]
    assert call(*common, "--allow-missing") == 0
    statuses = {e["case"][-1]: e["status"] for e in json.loads((out / "manifest.json").read_text())["cases"]}
    assert statuses == {"1": "done", "2": "skipped", "3": "done"}


def test_dry_run_writes_nothing(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("-m", run, "-i", data, "-o", tmp_path / "out", "-d", "cpu", "--dry-run")
    assert call(*arguments, "--json") == 0
    cases = json.loads(capsys.readouterr().out)["cases"]
    assert {case["case"][-1]: case["status"] for case in cases} == {"1": "planned", "2": "planned", "3": "failed"}
    assert call(*arguments) == 0
    assert "modality t2f is missing" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "out").exists()


def test_several_models_are_an_ensemble(data: Path, tmp_path: Path) -> None:
    runs = [write_segmentation_run(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b"))]
    options = ("-i", data / "BraTS2021_00001", "-d", "cpu", "-q", "--tta", "--save-probabilities")
    assert call("-m", runs[0], "-m", runs[1], "-o", tmp_path / "both", *options) == 0
    for name, folder in zip("ab", runs, strict=True):
        assert call("-m", folder, "-o", tmp_path / f"out_{name}", *options) == 0
    first, second, both = (
        nib.load(tmp_path / name / "probabilities" / "BraTS2021_00001_WT.nii.gz").get_fdata()
        for name in ("out_a", "out_b", "both")
    )
    np.testing.assert_allclose(both, (first + second) / 2, atol=1e-5)
    assert len(json.loads((tmp_path / "both" / "manifest.json").read_text())["model"]["sha256"]) == 2


def test_interruption_keeps_the_manifest(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = Predictor.slabs, []

    def interrupted(self: Predictor, prepared: Any, axis: int | None = None) -> Any:
        calls.append(prepared.id)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(self, prepared, axis)

    monkeypatch.setattr(Predictor, "slabs", interrupted)
    assert call("-m", run, "-i", data, "-o", tmp_path / "out", "-d", "cpu", "-q") == 130
    document = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert document["summary"]["done"] == 1
    assert document["remaining"] == ["BraTS2021_00002"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"-m": "nowhere"}, "nowhere: is not a folder; expected a run folder"),
        ({"-i": "nowhere"}, "no such file or folder"),
        ({"-d": "abacus"}, "device 'abacus' is not known"),
        ({"--label-scheme": "brats1999"}, "label scheme 'brats1999' is not known"),
        ({"--cases": "nowhere.txt"}, "cannot read the list of cases"),
        ({"--backend": "tensorrt"}, "tensorrt"),
        ({"-i": Path(__file__)}, "no layout matches"),
    ],
)
def test_wrong_requests_run_nothing(
    run: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    sentence: str,
) -> None:
    arguments: dict[str, object] = {"-m": run, "-i": data, "-o": tmp_path / "out", "-d": "cpu"}
    for flag, value in changes.items():
        arguments[flag] = value
    assert call(*(part for pair in arguments.items() for part in pair)) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_damaged_model_is_a_wrong_request(run: Path, data: Path, tmp_path: Path) -> None:
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert call("-m", run, "-i", data, "-o", tmp_path / "out", "-d", "cpu") == 2


@pytest.mark.parametrize("is_relative", [False, True])
def test_masks_inside_the_input_are_not_input(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_relative: bool
) -> None:
    scans = tmp_path / "all in one folder"
    scans.mkdir()
    for number, path in enumerate(sorted(data.rglob("*.nii.gz"))):
        path.rename(scans / f"p{number // 4}_{SUFFIXES[number % 4]}.nii.gz")
    monkeypatch.chdir(scans)
    out = Path("masks") if is_relative else scans / "masks"
    command = ("-m", run, "-i", scans, "-o", out, "-d", "cpu", "-q", "--allow-missing", "--save-probabilities")
    seen = []
    for _ in range(2):
        assert call(*command) == 0
        entries = json.loads((scans / "masks" / "manifest.json").read_text())["cases"]
        seen.append({entry["case"][-1]: entry["status"] for entry in entries})
    assert seen == [dict.fromkeys("012", "done"), dict.fromkeys("012", "skipped")]


def test_verbose_shows_tracebacks_of_failed_cases(run: Path, data: Path, tmp_path: Path) -> None:
    scan = data / "BraTS2021_00002" / "BraTS2021_00002_t1.nii.gz"
    scan.write_bytes(scan.read_bytes()[:-40])
    environment = {**os.environ, "PYTHONPATH": str(Path(segkit.__file__).parents[1])}
    traces = []
    for options in ((), ("-v",)):
        arguments = ("infer", "-m", run, "-i", data, "-o", tmp_path / "out", "--backend", "torch", "--json", *options)
        command = [sys.executable, "-m", "segkit", *map(str, arguments)]
        result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        assert result.returncode == 1
        assert json.loads(result.stdout)["summary"]["failed"] == 2
        traces.append(result.stderr)
    assert "Traceback" not in traces[0]
    assert traces[1].count("Traceback (most recent call last)") >= 2
    assert "in load_case" in traces[1]  # the damaged file, found when it was read
    assert "in match_modalities" in traces[1]  # the missing modality, found beforehand


@pytest.mark.skipif(sys.platform != "linux", reason="the system has no such limit")
@pytest.mark.parametrize("memory", ["150M", "600M"])
def test_memory_without_room_for_the_model_is_refused(run: Path, data: Path, tmp_path: Path, memory: str) -> None:
    """Before torch is loaded, and while it is."""
    arguments = ("infer", "-m", run, "-i", data, "-o", tmp_path / "out", "--backend", "torch", "--memory", memory)
    command = [sys.executable, "-m", "segkit", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(segkit.__file__).parents[1])}
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert "the models and what computes them take more than" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.returncode == 2
    assert not (tmp_path / "out").exists()


def test_one_name_that_is_not_utf8_does_not_stop_the_others(run: Path, data: Path, tmp_path: Path) -> None:
    odd = data / "BraTS2021_00003"
    try:
        for path in odd.iterdir():
            path.rename(path.with_name(path.name.replace("00003", os.fsdecode(b"Andr\xe9"))))
        odd.rename(data / os.fsdecode(b"BraTS2021_Andr\xe9"))
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    assert call("-m", run, "-i", data, "-o", tmp_path / "out", "-d", "cpu", "--layout", "folder") == 1
    document = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert (document["summary"]["done"], document["summary"]["failed"]) == (2, 1)


def test_an_address_without_the_engine_is_refused(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("-m", run, "-i", data, "-o", tmp_path / "out", "--ray-address", "auto") == 2
    assert "Add --engine ray" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
