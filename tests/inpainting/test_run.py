"""`segkit pretrain --method inpainting`: from scans to a network that fills holes, and begins segmentation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from segkit.checkpoint.run_folder import load_card
from segkit.checkpoint.tensors import load_state
from segkit.config import build_config
from segkit.errors import RequestError
from segkit.inpainting.config import InpaintingConfig
from segkit.inpainting.predictor import InpaintingPredictor
from segkit.inpainting.run import InpaintingKind
from segkit.phantoms.layouts import write_inpainting_phantoms
from segkit.reading.pictures import save_picture
from segkit.reading.volume import Grid
from segkit.training.run import train
from segkit.training.task import Summary, TrainingRequest
from tests.helpers import run_segkit

SETTINGS = {
    "network": {"family": "inpainter", "size": "tiny", "arguments": {"widths": [4, 8], "context": "mirror"}},
    "patches": {"size": 16},
    "holes": {"diameter_range": [4, 8], "margin_voxels": 1, "min_voxels": 16},
    "batch_size": 1,
    "validation_holes": 3,
    "training": {"steps": 4, "steps_per_epoch": 2, "ema_decay": 0.9, "workers": 0},
    "data": {"folds": 2},
}


@pytest.fixture(scope="module")
def phantoms(phantom_data: Callable[[int], Path]) -> Path:
    return phantom_data(4)


def request(folder: Path, run: Path, **settings: object) -> TrainingRequest[InpaintingConfig]:
    config = build_config(InpaintingConfig, [("test", SETTINGS), ("changes", settings)])
    return TrainingRequest((folder,), run, config, torch.device("cpu"))


def inpainting_run(request: TrainingRequest[InpaintingConfig]) -> Summary:
    return train(request, InpaintingKind())


@pytest.fixture(scope="module")
def trained(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    run = tmp_path_factory.mktemp("inpainting") / "run"
    return run, inpainting_run(request(phantoms, run))


def test_a_run_folder_holds_the_network_and_what_it_does(trained: tuple[Path, Summary]) -> None:
    run, summary = trained
    card = load_card(run)
    assert (card.task, card.dims, card.patch_size, card.context) == ("inpainting", 3, (16, 16, 16), "mirror")
    assert card.modalities == ("t1n", "t1c", "t2w", "t2f")
    assert card.input_channels == 10
    assert "outputs" not in json.loads((run / "model.json").read_text())
    assert set(summary.scores["before"]) == set(summary.scores["after"]) == {"ssim", "mae", "mse", "mse_rough"}
    before, after = summary.scores["before"], summary.scores["after"]
    assert before["mse"] == pytest.approx(before["mse_rough"], rel=0.05)  # at first it is the fill
    assert after["mse"] != before["mse"]
    assert after["mse_rough"] == before["mse_rough"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    validated = [row for row in rows if "score" in row]
    assert [row["step"] for row in validated] == [2, 4]
    assert summary.scores["after"]["ssim"] == pytest.approx(max(row["score"] for row in validated))
    split = json.loads((run / "split.json").read_text())
    assert len(split["training"]) == len(split["validation"]) == 2


def test_its_network_fills_a_scan(trained: tuple[Path, Summary]) -> None:
    image = np.random.default_rng(0).uniform(1, 2, (4, 24, 24, 24)).astype(np.float32)
    hole = np.zeros((24,) * 3, bool)
    hole[8:13, 9:14, 10:12] = True
    filled = InpaintingPredictor.load(trained[0], "cpu").fill(image, hole, Grid(hole.shape, np.eye(4)))
    assert np.array_equal(filled[:, ~hole], image[:, ~hole])
    assert (filled[:, hole] != image[:, hole]).all()


class CutOffError(Exception):
    """The machine goes down."""


@pytest.mark.parametrize("adversarial", [0.0, 0.1])
def test_a_run_that_was_cut_off_ends_with_the_same_weights(adversarial: float, phantoms: Path, tmp_path: Path) -> None:
    changes: dict[str, object] = {"modalities": ["t1n"], "training": {"steps": 2, "steps_per_epoch": 1}}
    if adversarial:
        changes |= {"adversarial": {"weight": adversarial, "width": 2}, "patches": {"size": 24}}
    whole, cut = (request(phantoms, tmp_path / name, **changes) for name in ("whole", "cut"))
    inpainting_run(whole)

    def fall(done: float, message: str) -> None:
        if done > 0.9:
            raise CutOffError

    with pytest.raises(CutOffError):
        inpainting_run(TrainingRequest(cut.data, cut.run, cut.config, cut.device, on_progress=fall))
    resumed = inpainting_run(TrainingRequest(cut.data, cut.run, cut.config, cut.device, resume=True))
    assert resumed.scores["before"]
    states = [load_state(tmp_path / name)["model"] for name in ("whole", "cut")]
    assert any(name.startswith("discriminator.") for name in states[0]) == (adversarial > 0)
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    kept = load_file(tmp_path / "whole" / "model.safetensors")
    assert kept
    assert not any("discriminator" in name for name in kept)


def test_the_discriminator_changes_what_is_learnt(phantoms: Path, tmp_path: Path) -> None:
    weights = []
    for weight in (0.0, 10.0):
        changes = {"adversarial": {"weight": weight, "width": 2}, "patches": {"size": 24}, "modalities": ["t1n"]}
        inpainting_run(request(phantoms, tmp_path / str(weight), **changes))
        weights.append(load_file(tmp_path / str(weight) / "model.safetensors"))
    assert not torch.equal(weights[0]["head.weight"], weights[1]["head.weight"])


@pytest.mark.parametrize(
    ("network", "dims", "channels"),
    [
        ({"family": "revmbunet", "size": "tiny", "arguments": {"widths": [8, 12]}}, 3, 1),
        ({"family": "generator", "size": "tiny", "arguments": {"width": 4, "learning": "supervised"}}, 2, 2),
    ],
)
def test_other_networks_learn_it_too(
    network: dict[str, object], dims: int, channels: int, phantoms: Path, tmp_path: Path
) -> None:
    settings = {"network": network, "modalities": ["t1n"], "dims": dims}
    config = build_config(
        InpaintingConfig, [("test", {k: v for k, v in SETTINGS.items() if k != "network"}), ("changes", settings)]
    )
    summary = inpainting_run(TrainingRequest((phantoms,), tmp_path / "run", config, torch.device("cpu")))
    card = load_card(tmp_path / "run")
    assert (card.dims, card.input_channels) == (dims, channels)
    assert summary.scores["after"]["mae"] > 0


def test_rn_l_may_be_told_its_region(phantoms: Path, tmp_path: Path) -> None:
    """Another way of teaching leaves other weights of the detectors behind, from the same first ones."""
    weights = []
    for kind in ("affine", "supervised"):
        arguments = {"widths": [4, 8], "context": "hole", "learning": kind, "threshold": 0.5}
        changes: dict[str, object] = {"network": {"arguments": arguments}, "modalities": ["t1n"], "fill": "constant"}
        inpainting_run(request(phantoms, tmp_path / kind, **changes))
        weights.append(load_file(tmp_path / kind / "model.safetensors"))
    name = "decoder.0.0.norm.detector.weight"
    assert not torch.equal(weights[0][name], weights[1][name])


def test_pictures_are_learnt_from_without_a_mirror(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(3):
        picture = generator.integers(1, 255, (24, 32, 3)).astype(np.uint8)
        (tmp_path / "data" / "images").mkdir(parents=True, exist_ok=True)
        save_picture(tmp_path / "data" / "images" / f"{number}.png", picture)
    with pytest.raises(RequestError, match="mirrored-detail needs volumes"):
        inpainting_run(request(tmp_path / "data", tmp_path / "run", fill="mirrored-detail"))
    inpainting_run(request(tmp_path / "data", tmp_path / "run", data={"folds": 3}))
    card = load_card(tmp_path / "run")
    assert (card.dims, card.context, card.patch_size, card.input_channels) == (2, "hole", (16, 16), 4)


def test_folders_of_the_challenge_are_learnt_from_outside_their_tumours(tmp_path: Path) -> None:
    write_inpainting_phantoms(tmp_path / "data", range(1, 3), size=32)
    summary = inpainting_run(request(tmp_path / "data", tmp_path / "run"))
    assert load_card(tmp_path / "run").modalities == ("t1n",)
    assert summary.scores["images"] == {"data": 1}
    (cached,) = {path.parent for path in (tmp_path / "run" / "cache").glob("*/labels.npy")} & {
        path.parent for path in (tmp_path / "run" / "cache").glob("*/case.json") if "00001" in path.read_text()
    }
    marked = np.load(cached / "labels.npy")
    whole = nib.load(next((tmp_path / "data").glob("*00001*/*-mask-unhealthy.nii.gz")))
    assert marked.sum() == np.asarray(whole.dataobj).sum()


def test_segmentation_begins_with_it(trained: tuple[Path, Summary], phantoms: Path, tmp_path: Path) -> None:
    command = ["train", str(phantoms), "-o", str(tmp_path / "run"), "--weights", str(trained[0]), "--preset", "tiny"]
    settings = ["training.steps=1", "planning.patch_size=[16,16,16]", "planning.batch_size=1"]
    command += [*(f"--set={setting}" for setting in settings), "-d", "cpu", "--quiet"]
    assert run_segkit(*command) == 0
    card = load_card(tmp_path / "run")
    assert card.network.family == "inpainter"
    report = json.loads((tmp_path / "run" / "weights.json").read_text())["report"]
    assert report["encoder_share"] == 1
    assert not [name for name in report["missing"] if not name.startswith("head.")]


def test_the_verb_trains_resumes_and_tells(phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ("pretrain", phantoms, "-o", tmp_path / "run", "-d", "cpu")
    small = ("network.arguments={widths: [4, 8]}", "patches.size=16", "validation_holes=2", "training.steps=1")
    sets = [part for setting in small for part in ("--set", setting)]
    assert run_segkit(*base, "--method", "inpainting", "--preset", "tiny", *sets, "--json", "-q") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["method"], summary["steps"], summary["images"]) == ("inpainting", 1, {"data": 3})
    assert run_segkit(*base, "--resume", "--set", "training.steps=2") == 2
    assert "training.steps 1 -> 2" in capsys.readouterr().err
    more = ("--resume", "--allow-changes", "--set", "training.steps=2")
    assert run_segkit(*base, *more) == 0  # the run folder tells the method
    shown = capsys.readouterr().out
    assert "mse_rough" in shown
    assert f"segkit inpaint -m {tmp_path / 'run'}" in "".join(shown.splitlines())
    assert run_segkit(*base, "--method", "nonsense") == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modalities": ["t9"]}, "has no modality t9"),
        ({"patches": {"size": 17}}, r"patches.size 17 x 17 x 17 does not suit"),
        ({"network": {"arguments": {"learning": "supervised", "context": "none"}}}, "but the network has no context"),
        ({"preprocessing": {"normalisation": "zscore-nonzero"}}, "mixes background with tissue"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    settings: dict[str, object], message: str, phantoms: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        inpainting_run(request(phantoms, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()
