"""`segkit pretrain` from unlabelled volumes to an encoder that `segkit train` begins with."""

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
from segkit.pretraining.methods import PretrainConfig
from segkit.pretraining.run import PretrainingKind
from segkit.training.run import train
from segkit.training.task import Summary, TrainingRequest
from tests.helpers import run_segkit

SETTINGS = {
    "network": {"family": "revmbunet", "size": "tiny", "arguments": {"widths": [8, 12]}},
    "views": {"size": 8},
    "images": {"neighbours": 2},
    "graph_matching": {"nodes": 4, "edges": 2},
    "batch_size": 8,
    "validation_groups": 2,
    "training": {"steps": 4, "steps_per_epoch": 2, "ema_decay": 0.9, "workers": 0},
    "data": {"folds": 2},
}


@pytest.fixture(scope="module")
def phantoms(phantom_data: Callable[[int], Path]) -> Path:
    return phantom_data(4)


def request(folder: Path, run: Path, **settings: object) -> TrainingRequest[PretrainConfig]:
    config = build_config(PretrainConfig, [("test", SETTINGS), ("changes", settings)])
    return TrainingRequest((folder,), run, config, torch.device("cpu"))


def pretrain_run(request: TrainingRequest[PretrainConfig]) -> Summary:
    return train(request, PretrainingKind())


@pytest.fixture(scope="module")
def matched(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """A finished run of graph matching on slices."""
    run = tmp_path_factory.mktemp("matched") / "run"
    return run, pretrain_run(request(phantoms, run, dims=2))


def test_a_run_folder_holds_the_encoder_and_what_it_learnt(matched: tuple[Path, Summary]) -> None:
    run, summary = matched
    card = load_card(run)
    assert (card.task, card.dims, card.modalities, card.patch_size) == ("pretraining", 2, ("image",), (8, 8))
    names = set(load_file(run / "model.safetensors"))
    assert names
    assert all(name.startswith("encoder.") for name in names)
    assert summary.steps == 4
    assert (
        set(summary.scores["before"])
        == set(summary.scores["after"])
        == {"matching", "noisy", "retrieval", "encoder_retrieval"}
    )
    assert all(0 <= value <= 1 for value in summary.scores["after"].values())
    kept = json.loads((run / "validation.json").read_text())
    assert kept["before"] == summary.scores["before"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    best = max(row["score"] for row in rows if "score" in row)
    assert summary.scores["after"]["matching"] == pytest.approx(best)  # the best weights, measured as they were then
    assert {path.name for path in (run / "figures").iterdir()} == {"curves.png", "graph.png", "pairs.png"}


def test_nobody_held_out_is_learnt_from(matched: tuple[Path, Summary]) -> None:
    split = json.loads((matched[0] / "split.json").read_text())
    assert len(split["training"]) == len(split["validation"]) == 2
    assert not set(split["training"]) & set(split["validation"])


class CutOffError(Exception):
    """The machine goes down."""


@pytest.mark.parametrize("method", ["graph-matching", "masked", "contrastive"])
def test_a_run_that_was_cut_off_ends_with_the_same_weights(method: str, phantoms: Path, tmp_path: Path) -> None:
    whole, cut = (
        request(phantoms, tmp_path / "whole", method=method),
        request(phantoms, tmp_path / "cut", method=method),
    )
    pretrain_run(whole)

    def fall(done: float, message: str) -> None:
        if done > 0.7:
            raise CutOffError

    with pytest.raises(CutOffError):
        pretrain_run(TrainingRequest(cut.data, cut.run, cut.config, cut.device, on_progress=fall))
    resumed = pretrain_run(TrainingRequest(cut.data, cut.run, cut.config, cut.device, resume=True))
    assert resumed.scores["before"]  # measured when the run began
    for name, tensor in load_state(tmp_path / "whole")["model"].items():
        assert torch.equal(tensor, load_state(tmp_path / "cut")["model"][name]), name
    rows = [(tmp_path / run / "metrics.jsonl").read_text().count("\n") for run in ("whole", "cut")]
    assert rows == [4, 4]


def test_masked_learning_keeps_the_decoder_but_no_head(phantoms: Path, tmp_path: Path) -> None:
    summary = pretrain_run(request(phantoms, tmp_path / "run", method="masked", images={"channels": "all"}))
    assert set(summary.scores["after"]) == {"explained", "error"}
    card = load_card(tmp_path / "run")
    assert card.modalities == ("t1n", "t1c", "t2w", "t2f")
    assert card.dims == 3
    names = load_file(tmp_path / "run" / "model.safetensors")
    assert {name.partition(".")[0] for name in names} == {"encoder", "decoder"}


def test_training_begins_with_the_encoder_and_its_network(phantoms: Path, tmp_path: Path) -> None:
    pretrain_run(request(phantoms, tmp_path / "encoder"))
    options = ("--preset", "tiny", "-d", "cpu", "-q", "--set", "training.steps=1", "--set", "optimiser.lr=1e-12")
    few = ("--set", "training.ema_decay=0", "--set", "planning.patch_limit=16", "--set", "data.folds=2")
    run = tmp_path / "run"
    assert run_segkit("train", phantoms, "-o", run, "--weights", tmp_path / "encoder", *options, *few) == 0
    assert load_card(run).network.arguments["widths"] == [8, 12]  # not those of the preset
    encoder, trained = load_file(tmp_path / "encoder" / "model.safetensors"), load_file(run / "model.safetensors")
    for name, tensor in encoder.items():
        if name != "encoder.stem.weight":  # of one channel there, of four here
            assert torch.allclose(tensor, trained[name], atol=1e-6), name
    report = json.loads((run / "weights.json").read_text())["report"]
    assert report["encoder_share"] == 1.0
    assert report["adapted"] == ["encoder.stem.weight"]


def test_an_encoder_paints_no_masks(
    matched: tuple[Path, Summary], phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_segkit("infer", "-m", matched[0], "-i", phantoms, "-o", tmp_path / "out", "-q") == 2
    assert "a pretraining model" in capsys.readouterr().err


def test_the_command_line_tells_what_was_learnt(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = ("--set", "views.size=8", "--set", "network.arguments.widths=[8, 12]", "--set", "images.neighbours=2")
    groups = ("--set", "graph_matching.nodes=4", "--set", "graph_matching.edges=2", "--set", "batch_size=4")
    length = ("--set", "training.steps=1", "--set", "validation_groups=1", "--set", "data.folds=2")
    arguments = (
        "pretrain",
        phantoms,
        "-o",
        tmp_path / "run",
        "--preset",
        "tiny",
        "--encoder",
        "revmbunet",
        "-d",
        "cpu",
    )
    assert run_segkit(*arguments, *shapes, *groups, *length, "--method", "contrastive", "--json", "-q") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["method"], summary["steps"]) == ("contrastive", 1)
    assert run_segkit(*arguments) == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 6}, r"batch_size 6 is not a multiple of the 4 images of a group"),
        ({"views": {"size": 9}}, r"views.size 9 x 9 x 9 does not suit the network.*multiples of 2 x 2 x 2"),
        ({"images": {"neighbours": 9}}, "a group of 4 images cannot hold 9 neighbours"),
        ({"data": {"folds": 2, "exclude": ["nobody"]}, "network": {"family": "none"}}, "'none' is not known"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_written(
    settings: dict[str, object], message: str, phantoms: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        pretrain_run(request(phantoms, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def write_single_modality(folder: Path) -> None:
    """An nnU-Net folder of four volumes of one modality, without references."""
    (folder / "imagesTr").mkdir(parents=True)
    for number in range(4):
        volume = np.random.default_rng(number).normal(100, 20, (16, 16, 12)).astype(np.float32)
        nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / "imagesTr" / f"case_{number:03}_0000.nii.gz")
    document = {"channel_names": {"0": "PD"}, "labels": {"background": 0}, "numTraining": 4, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(document))


def test_folders_with_different_modalities_are_images_of_one_channel_or_refused(phantoms: Path, tmp_path: Path) -> None:
    write_single_modality(tmp_path / "other")
    both = request(phantoms, tmp_path / "run", images={"channels": "all"})
    with pytest.raises(RequestError, match=r"different modalities.*images.channels=each"):
        pretrain_run(TrainingRequest((phantoms, tmp_path / "other"), both.run, both.config, both.device))
    each = request(phantoms, tmp_path / "run")
    summary = pretrain_run(TrainingRequest((phantoms, tmp_path / "other"), each.run, each.config, each.device))
    assert set(summary.scores["images"]) == {"data", "other"}
