"""`segkit train --weights`: a run that begins with weights from elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import segkit
import segkit.cli
from segkit.checkpoint.tensors import load_state
from segkit.reading.files import file_sha256
from segkit.training.folder import read_config
from segkit.training.run import begin, plan_run
from segkit.training.segmentation import SegmentationKind
from segkit.training.task import TrainingRequest
from tests.helpers import run_segkit

SMALL = (
    *("--preset", "tiny", "-d", "cpu", "-q", "--set", "network.arguments.widths=[8, 12]"),
    *("--set", "planning.patch_limit=16", "--set", "planning.batch_limit=1", "--set", "data.folds=2"),
    *("--set", "training.steps=2", "--set", "training.steps_per_epoch=1", "--set", "training.workers=0"),
)
STANDING_STILL = ("--set", "optimiser.lr=1e-12", "--set", "training.ema_decay=0")


@pytest.fixture(scope="module")
def phantoms(phantom_data: Callable[[int], Path]) -> Path:
    return phantom_data(2)


@pytest.fixture(scope="module")
def first(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with other weights than any fresh network has."""
    run = tmp_path_factory.mktemp("first") / "run"
    assert train(phantoms, run, "--set", "training.seed=7") == 0
    return run


def train(data: Path, run: Path, *more: object) -> int:
    return run_segkit("train", data, "-o", run, *(() if "--resume" in more else SMALL), *more)


def facts_of(run: Path) -> dict[str, str]:
    document: dict[str, dict[str, dict[str, str]]] = json.loads((run / "model.json").read_text())
    return document["training_data"]["initial_weights"]


@pytest.fixture(scope="module")
def begun(first: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that began with the weights of `first`, which are not there any more, and stood still."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(first, folder / "before")
    assert train(phantoms, folder / "run", "--weights", folder / "before", *STANDING_STILL) == 0
    shutil.rmtree(folder / "before")
    return folder / "run"


def test_a_run_begins_where_another_ended(first: Path, begun: Path) -> None:
    ours, theirs = load_file(begun / "model.safetensors"), load_file(first / "model.safetensors")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-6)
    facts = facts_of(begun)
    assert facts["sha256"] == file_sha256(first / "model.safetensors")
    assert (facts["file"], facts["origin"]) == ("model.safetensors", "revmbunet tiny trained on brats2023: data")
    kept = json.loads((begun / "weights.json").read_text())
    assert set(kept["report"]["loaded"]) == set(theirs)
    assert kept["sha256"] == facts["sha256"]
    assert str(begun.parent / "before") in (begun / "config.yaml").read_text()


def test_a_resumed_run_goes_on_with_its_own_weights(begun: Path, phantoms: Path, tmp_path: Path) -> None:
    """The file that it began with may be gone; the card still tells of it."""
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    assert train(phantoms, run, "--resume", "--allow-changes", "--set", "training.steps=3", "-d", "cpu", "-q") == 0
    assert json.loads((run / "validation.json").read_text())["steps"] == 3
    request = TrainingRequest((phantoms,), run, read_config(run), torch.device("cpu"), resume=True)
    card, resumed = begin(plan_run(request, SegmentationKind()), SegmentationKind())
    assert card.training_data.model_dump()["initial_weights"] == facts_of(begun)
    assert not resumed.report
    assert train(phantoms, run, "--resume", "--weights", begun) == 2


def test_a_fresh_start_forgets_the_weights_of_the_run_before(begun: Path, phantoms: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    assert train(phantoms, run, "--overwrite") == 0
    assert not (run / "weights.json").exists()
    assert "initial_weights" not in json.loads((run / "model.json").read_text())["training_data"]


def test_every_fold_begins_with_the_weights(first: Path, phantoms: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(phantoms, run, "-f", "all", "--weights", first) == 0
    assert {facts_of(run / f"fold_{fold}")["sha256"] for fold in (0, 1)} == {facts_of(run / "fold_0")["sha256"]}
    assert len(segkit.Predictor.load(run).digests) == 2


def test_a_frozen_encoder_stays_also_when_resumed(first: Path, phantoms: Path, tmp_path: Path) -> None:
    run, theirs = tmp_path / "run", load_file(first / "model.safetensors")
    frozen = ("--set", "optimiser.encoder_lr=0", "--set", "training.ema_decay=0.5")
    assert train(phantoms, run, "--weights", first, *frozen) == 0
    for steps in (2, 3):
        if steps == 3:
            more = ("--set", "training.steps=3", "-d", "cpu", "-q")
            assert train(phantoms, run, "--resume", "--allow-changes", *more) == 0
        for weights in (load_file(run / "model.safetensors"), load_state(run)["model"]):
            moved = {name for name, tensor in theirs.items() if not torch.equal(weights[name], tensor)}
            assert moved
            assert not [name for name in moved if name.startswith("encoder.")]


def test_a_resumed_run_cannot_thaw_its_encoder(
    first: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(phantoms, run, "--weights", first, "--set", "optimiser.encoder_lr=0") == 0
    thawed = ("--set", "optimiser.encoder_lr=1", "--set", "training.steps=3")
    assert train(phantoms, run, "--resume", "--allow-changes", *thawed, "-d", "cpu", "-q") == 2
    assert "Resume with the optimiser.encoder_lr that the run began with" in " ".join(capsys.readouterr().err.split())


def test_a_resumed_run_cannot_freeze_its_encoder(
    first: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(first, run)
    frozen = ("--set", "optimiser.encoder_lr=0", "--set", "training.steps=3")
    assert train(phantoms, run, "--resume", "--allow-changes", *frozen, "-d", "cpu", "-q") == 2
    assert "Resume with the optimiser.encoder_lr that the run began with" in " ".join(capsys.readouterr().err.split())


def test_the_least_share_of_the_encoder(
    first: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second level is wider than that of the file, so only the first level is found."""
    wider = ("--weights", first, "--set", "network.arguments.widths=[8, 16]")
    assert train(phantoms, tmp_path / "a", *wider, "--set", "network.weights_share=0.5") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "of the encoder's parameters; without encoder." in error
    assert "expected at least 50 % (network.weights_share)" in error
    assert train(phantoms, tmp_path / "b", *wider, "--set", "network.weights_share=0.01") == 0
    report = json.loads((tmp_path / "b" / "weights.json").read_text())["report"]
    assert 0.01 <= report["encoder_share"] < 0.5
    assert {name.split(".")[0] for name in report["loaded"]} >= {"encoder"}


def _stunet_file(folder: Path, **arguments: object) -> Path:
    torch.manual_seed(3)
    network = segkit.build_model("stunet", in_channels=1, out_channels=105, width=2, **arguments)
    document = {"epoch": 4000, "state_dict": network.state_dict(), "plot_stuff": [np.float64(0.1)]}
    torch.save(document, folder / "small_ep4k.model")
    return folder / "small_ep4k.model"


def test_an_official_file_for_other_channels_and_outputs(phantoms: Path, tmp_path: Path) -> None:
    path, run = _stunet_file(tmp_path), tmp_path / "run"
    family = ("--set", "network.family=stunet", "--set", "network.size=S", "--set", "network.arguments={width: 2}")
    repeat = ("--set", "network.input_adapt=repeat", "--set", "planning.patch_limit=32")
    assert train(phantoms, run, *family, *repeat, "--weights", path, *STANDING_STILL) == 0
    kept = json.loads((run / "weights.json").read_text())
    assert (len(kept["report"]["loaded"]), len(kept["report"]["adapted"]), len(kept["report"]["skipped"])) == (
        118,
        2,
        10,
    )
    before: dict[str, Tensor] = torch.load(path, weights_only=False)["state_dict"]
    name = "conv_blocks_context.0.0.conv3.weight"
    torch.testing.assert_close(load_file(run / "model.safetensors")[name], before[name].repeat(1, 4, 1, 1, 1))
    assert facts_of(run)["origin"] == "a weight file without a card"


class Burglar:
    """Pickles to a call that makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.mkdir, (self.trace,)


def _no_file(folder: Path) -> Path:
    return folder / "nowhere.pth"


def _other_network(folder: Path) -> Path:
    return _stunet_file(folder)


def _code(folder: Path) -> Path:
    torch.save({"state_dict": {"w": torch.ones(1)}, "extra": Burglar(folder / "was_here")}, folder / "x.model")
    return folder / "x.model"


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (_no_file, "nowhere.pth: is not a file"),
        (_other_network, "does not fit RevMBUNet: tensors missing from the file"),
        (_code, "carries code and not only weights; nothing in it was run"),
    ],
)
@pytest.mark.parametrize("more", [(), ("-f", "all"), ("--dry-run",)])
def test_weights_that_cannot_be_used_are_a_wrong_request(
    make: Callable[[Path], Path],
    found: str,
    more: tuple[str, ...],
    phantoms: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(phantoms, tmp_path / "run", "--weights", make(tmp_path), *more) == 2
    assert found in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("run/**/*.ckpt"))
    assert not list(tmp_path.glob("run/**/cache"))
    assert not (tmp_path / "was_here").exists()


def test_a_run_of_another_size_says_how_to_build_it(
    first: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wider = ("--set", "network.arguments.widths=[8, 16]")
    assert train(phantoms, tmp_path / "run", "--weights", first, *wider) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "Build the network that it was trained as: revmbunet, size tiny, widths=[8, 12]" in error
