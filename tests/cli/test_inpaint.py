"""`segkit inpaint` as a user types it, with a network of the table whose weights are random."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import segkit
import segkit.cli
from segkit.batch.manifest import Manifest
from segkit.inference import graph
from segkit.inference.backends import Backend
from segkit.inpainting.predictor import InpaintingPredictor
from segkit.phantoms.phantom import make_phantom
from segkit.reading.files import read_grid
from tests.helpers import read_voxels, run_segkit, save_nifti, write_inpainting_run, write_segmentation_run

SIZE = 24


@pytest.fixture(autouse=True)
def _only_these_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segkit.cli, "VERBS", {verb: segkit.cli.VERBS[verb] for verb in ("inpaint", "export")})


def call(*arguments: object, verb: str = "inpaint") -> int:
    if verb == "inpaint" and "-d" not in arguments:
        arguments = (*arguments, "-d", "cpu")
    return run_segkit(verb, *arguments)


class SameWindows:
    """Torch, under a name that makes the predictor take windows of one size, as for a graph."""

    name = "torch in windows"

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __call__(self, windows: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.backend(windows)


def write_segmenter(folder: Path) -> Path:
    """A run folder of a network of FLAIR whose weights are random but for a bias, so that it marks a few voxels."""

    def mark_few(network: nn.Module) -> None:
        network.eval()
        with torch.no_grad():
            noise = torch.randn(1, 1, 16, 16, 16)
            bias = network.get_parameter("heads.0.bias")
            bias -= network(noise).flatten(2).quantile(0.97, 2)[0]

    return write_segmentation_run(folder, ("t2f",), widths=(4, 8), change=mark_few)


def hole() -> NDArray[np.uint8]:
    mask = np.zeros(make_phantom(1, size=SIZE).shape, np.uint8)
    mask[8:13, 10:14, 7:11] = 1
    return mask


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inpainting_run(tmp_path_factory.mktemp("model") / "run")


@pytest.fixture
def challenge(tmp_path: Path) -> Path:
    """A training case of the challenge, with the whole image, and a test case without."""
    for number in (1, 2):
        name = f"BraTS-GLI-0000{number}-000"
        image = make_phantom(number, size=SIZE).images["t1n"]
        save_nifti(
            tmp_path / "challenge" / name / f"{name}-t1n-voided.nii.gz", np.where(hole(), 0, image).astype(np.int16)
        )
        save_nifti(tmp_path / "challenge" / name / f"{name}-mask.nii.gz", hole())
        if number == 1:
            save_nifti(tmp_path / "challenge" / name / f"{name}-t1n.nii.gz", image)
    return tmp_path / "challenge"


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Two cases of BraTS 2023 with T1 and FLAIR, without references."""
    for number in (1, 2):
        name = f"BraTS-GLI-0000{number}-000"
        images = make_phantom(number, size=SIZE).images
        for modality in ("t1n", "t2f"):
            save_nifti(tmp_path / "scans" / name / f"{name}-{modality}.nii.gz", images[modality])
    return tmp_path / "scans"


def test_the_challenge(run: Path, challenge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call("-m", run, "-i", challenge, "-o", out, "--json") == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document == json.loads((out / "manifest.json").read_text())
    assert [(entry["status"], entry["made_up_voxels"]) for entry in document["cases"]] == [("done", 80)] * 2
    assert "[2/2] BraTS-GLI-00002-000: done (read" in captured.err
    name = "BraTS-GLI-00002-000"
    before, after = (
        read_voxels(challenge / name / f"{name}-t1n-voided.nii.gz"),
        read_voxels(out / f"{name}-t1n-inference.nii.gz"),
    )
    assert after.dtype == before.dtype
    assert np.array_equal(after[hole() == 0], before[hole() == 0])
    assert len(np.unique(after[hole() == 1])) > 20
    assert call("-m", run, "-i", challenge, "-o", out, "-q") == 0
    assert [entry["status"] for entry in json.loads((out / "manifest.json").read_text())["cases"]] == ["skipped"] * 2


def test_anomaly_of_the_challenge_needs_the_whole_image(
    run: Path, challenge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call("-m", run, "-i", challenge, "-o", out, "--anomaly") == 1
    assert (
        "BraTS-GLI-00002-000: failed: BraTS-GLI-00002-000: there is no complete image to compare with"
        in capsys.readouterr().err
    )
    anomaly = read_voxels(out / "BraTS-GLI-00001-000_anomaly.nii.gz")
    assert anomaly[hole() == 1].max() > 0
    assert not (out / "BraTS-GLI-00002-000-t1n-inference.nii.gz").exists()


def test_one_scan_with_one_mask(run: Path, scans: Path, tmp_path: Path) -> None:
    scan = scans / "BraTS-GLI-00001-000" / "BraTS-GLI-00001-000-t1n.nii.gz"
    mask = save_nifti(tmp_path / "drawn.nii.gz", hole())
    assert call("-m", run, "-i", scan, "-o", tmp_path / "out", "--mask", mask, "-q") == 0
    (found,) = (tmp_path / "out").glob("*.nii.gz")
    assert found.name == "BraTS-GLI-00001-000_t1n-inference.nii.gz"
    changed = read_voxels(found) != read_voxels(scan)
    assert changed.any()
    assert not changed[hole() == 0].any()


def test_lesions_that_a_model_finds(scans: Path, tmp_path: Path) -> None:
    """The model of lesions sees FLAIR, the other one T1."""
    run, segmenter = write_inpainting_run(tmp_path / "run"), write_segmenter(tmp_path / "segmenter")
    bank = tmp_path / "bank"
    options = ("--lesions", segmenter, "--margin", 2, "--anomaly", "--bank", bank, "--backend", "torch", "-q")
    assert call("-m", run, "-i", scans, "-o", tmp_path / "out", *options) == 0
    document = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert document["holes"]["margin_mm"] == 2
    assert len(document["holes"]["sha256"][0]) == 64
    name = "BraTS-GLI-00002-000"
    made_up = read_voxels(tmp_path / "out" / f"{name}_hole.nii.gz")
    scan, filled = (
        read_voxels(scans / name / f"{name}-t1n.nii.gz"),
        read_voxels(tmp_path / "out" / f"{name}_t1n-inference.nii.gz"),
    )
    marked = segkit.Predictor.load(segmenter)(scans / name).labels != 0
    assert 0 < marked.sum() < made_up.sum()
    assert made_up[marked].all()
    assert np.array_equal(scan[made_up == 0], filled[made_up == 0])
    assert np.array_equal(read_voxels(bank / name / f"{name}_t1n.nii.gz"), filled)
    assert np.array_equal(read_voxels(bank / name / f"{name}_lesion.nii.gz"), made_up)
    banked = json.loads((bank / "bank.json").read_text())
    assert [case["patient"] for case in banked["cases"]] == ["BraTS-GLI-00001", "BraTS-GLI-00002"]


def test_dry_run_writes_nothing(run: Path, challenge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (challenge / "BraTS-GLI-00002-000" / "BraTS-GLI-00002-000-mask.nii.gz").unlink()
    options = ("-m", run, "-i", challenge, "-o", tmp_path / "out", "--bank", tmp_path / "bank", "--dry-run")
    assert call(*options, "--json") == 0
    cases = json.loads(capsys.readouterr().out)["cases"]
    assert [case["status"] for case in cases] == ["planned", "failed"]
    assert cases[0]["files"][0] == str(tmp_path / "out" / "BraTS-GLI-00001-000-t1n-inference.nii.gz")
    assert len(cases[0]["files"]) == 3
    assert "has no mask" in cases[1]["error"]
    assert call(*options) == 0
    table = capsys.readouterr().out
    assert "BraTS-GLI-00001-000-t1n-inference.nii.gz" in table
    assert "failed" in table
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "bank").exists()


def test_wrong_requests_run_nothing(
    run: Path, scans: Path, challenge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask, out = save_nifti(tmp_path / "drawn.nii.gz", hole()), tmp_path / "out"
    segmenter = write_segmenter(tmp_path / "segmenter")
    (tmp_path / "list.txt").write_text("BraTS-GLI-00009-000\n")
    requests: list[tuple[tuple[object, ...], str]] = [
        ((run, scans), "nothing says what is missing: no voided scan is there"),
        ((run, scans), "--mask FILE_OR_FOLDER for what is missing, --lesions MASKS_OR_MODEL for lesions to fill"),
        ((run, scans, "--layout", "brats2023"), "nothing says what is missing of scans in another layout"),
        ((run, challenge, "--modality", "t1n=_T1"), "nothing says what is missing of scans in another layout"),
        ((run, scans, "--mask", mask, "--lesions", mask), "--mask and --lesions both say what is filled"),
        ((run, scans, "--mask", mask), "is one mask, and there are 2 cases"),
        ((run, scans, "--lesions", tmp_path / "nowhere"), "no such file or folder"),
        ((segmenter, challenge), "this is a segmentation model, which fills no holes"),
        ((tmp_path / "nowhere", challenge), "holds no model.json"),
        ((run, challenge, "--bank", challenge / "bank"), "lies in the input folder"),
        ((run, challenge, "--cases", tmp_path / "list.txt"), "1 of the requested cases do not exist"),
    ]
    for (model, data, *options), sentence in requests:
        assert call("-m", model, "-i", data, "-o", out, *options) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_the_folder_of_masks_is_no_folder_for_images(
    run: Path, challenge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Manifest(tmp_path / "out", ["a"], {"model": {}}, "m1").write()  # as `segkit infer` does
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    for options in ((), ("--overwrite",), ("--dry-run",)):
        assert call("-m", run, "-i", challenge, "-o", tmp_path / "out", *options) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "manifest.json: was written by `segkit infer`, and `segkit inpaint` replaces its records" in said
        assert said.endswith("Choose another output folder")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_an_archive_is_known_again(
    run: Path, challenge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, challenge.name))
    assert call("-m", run, "-i", archive, "-o", tmp_path / "out", "-q") == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert call("-m", run, "-i", archive.name, "-o", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["summary"]["skipped"] == 2


def test_options_for_a_cluster_without_one_are_refused(
    run: Path, challenge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in (("--ray-address", "auto"), ("--results", "store")):
        assert call("-m", run, "-i", challenge, "-o", tmp_path / "out", *options) == 2
        assert "--ray-address and --results are for a Ray cluster. Add --engine ray" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_memory_that_does_not_hold_the_model_is_refused(
    run: Path, challenge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits: list[float] = []
    monkeypatch.setattr("segkit.process_memory.limit_memory", lambda memory_gb: memory_gb and limits.append(memory_gb))
    monkeypatch.setattr("segkit.process_memory.room_mb", lambda: 1024 * limits[-1] - 400)
    assert call("-m", run, "-i", challenge, "-o", tmp_path / "out", "--memory", "300M") == 2
    assert "the models and what computes them take more than 0.293 GB. Pass a larger" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert call("-m", run, "-i", challenge, "-o", tmp_path / "out", "--memory", "500M", "-q") == 0
    assert limits == [300 / 1024, 500 / 1024]


def test_an_export_fills_as_the_network_does(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_by_capture", graph._by_tracing)  # takes seconds, and cannot write the other family
    modalities = ("t1n", "t2f")
    run, exported = write_inpainting_run(tmp_path / "run", modalities, "hole", "generator"), tmp_path / "export"
    _compare_with_export(run, exported, scans, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("modalities", "context"), [(("t1n",), "mirror"), (("t1n", "t2f"), "hole")])
def test_an_export_of_the_inpainter_fills_as_the_network_does(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], modalities: tuple[str, ...], context: str
) -> None:
    run, exported = write_inpainting_run(tmp_path / "run", modalities, context), tmp_path / "export"
    _compare_with_export(run, exported, scans, tmp_path, capsys)


def _compare_with_export(
    run: Path, exported: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("-m", run, "-o", exported, "--json", verb="export") == 0
    (written,) = json.loads(capsys.readouterr().out)["models"]
    parity = written["export"]["parity"]
    assert set(parity) == {"torch", "onnxruntime", "openvino"}
    assert parity["onnxruntime"]["dice"] is None
    assert parity["onnxruntime"]["windows"] == 4
    mask = np.zeros(hole().shape, np.uint8)
    mask[11:13, 11:13, 9:11] = 1
    save_nifti(tmp_path / "masks" / "BraTS-GLI-00001-000.nii.gz", mask)
    predictor = InpaintingPredictor.load(run, "cpu", "torch")
    scan = scans / "BraTS-GLI-00001-000"
    names = predictor.card.modalities
    image = np.stack([read_voxels(scan / f"{scan.name}-{name}.nii.gz") for name in names]).astype(np.float32)
    grid = read_grid(scan / f"{scan.name}-{names[0]}.nii.gz")
    predictor = replace(predictor, backend=SameWindows(predictor.backend))
    expected = np.rint(predictor.fill(image, mask > 0, grid))
    for model, backend in ((exported, "onnxruntime"), (exported, "openvino"), (run, "onnxruntime")):
        options = ("--mask", tmp_path / "masks", "--backend", backend, "--overwrite", "-q")
        assert call("-m", model, "-i", scan, "-o", tmp_path / backend, *options) == 0
        document = json.loads((tmp_path / backend / "manifest.json").read_text())
        assert document["cases"][0]["backend"] == backend
        for name, plane in zip(names, expected, strict=True):
            found = read_voxels(tmp_path / backend / f"{scan.name}_{name}-inference.nii.gz")
            assert np.abs(found - plane).max() <= 1  # rounded to integers
            assert len(np.unique(found[mask > 0])) > 1


def test_an_export_of_inpainting_has_no_other_precision(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("-m", run, "-o", tmp_path / "export", "--precision", "fp16", verb="export") == 2
    assert "fp16 and cases are judged by masks" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "export").exists()
