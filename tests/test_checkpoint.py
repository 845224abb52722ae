"""Weights, model cards and resume states: whole or refused, and never executed."""

from __future__ import annotations

import json
import logging
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from segkit import checkpoint
from segkit.checkpoint import (
    ModelCard,
    load_card,
    load_model,
    load_state,
    load_weights_file,
    save_model,
    save_state,
    save_weights,
)
from segkit.config.base import Config
from segkit.errors import CheckpointError, DataError
from segkit.labels import SCHEMES, Output, outputs_of
from segkit.models.table import MODELS, ModelEntry


class TinyConfig(Config):
    width: int = 2


class TiedNetwork(nn.Module):
    """Two layers that share one weight, and a weight that is a transposed view."""

    def __init__(self, in_channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(in_channels, width, bias=False)
        self.twin = nn.Linear(in_channels, width, bias=False)
        self.twin.weight = self.encoder.weight
        self.head = nn.Parameter(torch.randn(width, out_channels).T)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = (self.encoder(x) + self.twin(x)) @ self.head.T
        return logits


@pytest.fixture(autouse=True)
def _tiny_family(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(config: TinyConfig, in_channels: int, out_channels: int, dims: int) -> nn.Module:
        return TiedNetwork(in_channels, out_channels, config.width)

    entry = ModelEntry(TinyConfig, build, {"base": {}, "wide": {"width": 5}}, (2, 3), "none")
    monkeypatch.setitem(MODELS, "tiny", entry)


def make_card(**changes: Any) -> ModelCard:
    scheme = SCHEMES["brats2017"]
    document: dict[str, Any] = {
        "task": "segmentation",
        "network": {"family": "tiny", "size": "wide", "in_channels": 4, "out_channels": 3},
        "modalities": ["t1n", "t1c", "t2w", "t2f"],
        "patch_size": [16, 16, 16],
        "divisor": [8, 8, 8],
        "activation": "sigmoid",
        "outputs": [{"name": o.name, "label": o.label, "members": o.members} for o in outputs_of(scheme)],
        "label_scheme": scheme.to_json(),
        "training_data": {"identity": "phantom", "licence": "CC0", "cases": 3, "fold": 1},
    }
    return ModelCard.model_validate({**document, **changes})


def test_card_has_the_keys_that_other_programs_read(tmp_path: Path) -> None:
    save_model(tmp_path, {"w": torch.zeros(2)}, make_card())
    document = json.loads((tmp_path / "model.json").read_text())
    assert document["network"]["family"] == "tiny"
    assert document["patch_size"] == [16, 16, 16]
    assert document["spacing_mm"] is None
    assert document["orientation"] == "RAS"
    assert document["overlap"] == 0.5
    assert [(output["name"], output["label"]) for output in document["outputs"]] == [("WT", 2), ("TC", 1), ("ET", 4)]
    assert document["label_scheme"] == {"name": "brats2017", "labels": {"NCR": 1, "ED": 2, "ET": 4}}
    assert document["training_data"]["fold"] == 1
    assert len(document["sha256"]) == 64


def test_card_comes_back_with_its_scheme_outputs_and_preprocessing(tmp_path: Path) -> None:
    saved = save_model(tmp_path, {"w": torch.zeros(2)}, make_card(spacing_mm=[1, 1, 2.5]))
    card = load_card(tmp_path)
    assert card == saved
    assert card.scheme() is SCHEMES["brats2017"]
    assert card.output_list()[0] == Output("WT", 2, (1, 2, 4))
    assert card.preprocessing().spacing_mm == (1.0, 1.0, 2.5)
    assert card.preprocessing().normalisation == "zscore-nonzero"


def test_card_of_another_task_has_no_masks() -> None:
    document = {key: value for key, value in make_card().to_json().items() if key not in ("outputs", "activation")}
    card = ModelCard.model_validate({**document, "task": "pretraining", "label_scheme": None})
    assert not {"activation", "outputs", "label_scheme"} & card.to_json().keys()
    with pytest.raises(CheckpointError, match="pretraining model has no label scheme"):
        card.scheme()


def test_folder_without_card_names_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no model\.json.*Check the path"):
        load_card(tmp_path)
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(CheckpointError, match="Resume the training with --resume"):
        load_card(tmp_path)


@pytest.mark.parametrize(
    ("text", "found"),
    [("{", "document"), ('{"task": "segmentation"}', "network: Field required"), ('{"colour": 1}', "colour: Extra")],
)
def test_card_that_cannot_be_read_is_refused(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(CheckpointError, match=found):
        load_card(tmp_path)


def test_model_with_tied_weights_comes_back(tmp_path: Path) -> None:
    network = TiedNetwork(4, 3, 5)
    save_model(tmp_path, network.state_dict(), make_card())
    assert set(load_file(tmp_path / "model.safetensors")) == {"encoder.weight", "twin.weight", "head"}
    loaded = load_model(tmp_path)
    x = torch.randn(2, 4)
    assert torch.equal(loaded(x), network(x))
    assert not loaded.training


def test_saving_again_leaves_no_temporary_files(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        save_model(tmp_path, {"w": torch.full((3,), value)}, make_card())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    assert load_weights_file(tmp_path / "model.safetensors")["w"].tolist() == [2.0, 2.0, 2.0]


def test_swapped_weights_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, TiedNetwork(4, 3, 5).state_dict(), make_card())
    checkpoint.save_weights(tmp_path / "model.safetensors", TiedNetwork(4, 3, 5).state_dict())
    with pytest.raises(CheckpointError, match="damaged or was swapped"):
        load_model(tmp_path)


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, TiedNetwork(4, 3, 2).state_dict(), make_card())
    with pytest.raises(CheckpointError, match=r"do not fit 'tiny'.*size mismatch for head"):
        load_model(tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    save_model(tmp_path, {"w": torch.zeros(1)}, make_card())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        load_model(tmp_path)


def test_folds_are_found_in_order(tmp_path: Path) -> None:
    for fold in (1, 0):
        save_model(tmp_path / f"fold_{fold}", {"w": torch.zeros(1)}, make_card())
    (tmp_path / "fold_2").mkdir()
    assert checkpoint.model_folders(tmp_path) == [tmp_path / "fold_0", tmp_path / "fold_1"]
    assert checkpoint.model_folders(tmp_path / "fold_1") == [tmp_path / "fold_1"]
    with pytest.raises(CheckpointError, match=r"holds no model\.json"):
        checkpoint.model_folders(tmp_path / "fold_2")
    with pytest.raises(CheckpointError, match="is not a folder"):
        checkpoint.model_folders(tmp_path / "nowhere")


def test_unwritable_folder_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="cannot be written"):
        save_model(tmp_path / "run", {"w": torch.zeros(1)}, make_card())


@pytest.mark.parametrize("key", ["state_dict", "network_weights", "model"])
def test_weights_are_taken_out_of_other_trainers_checkpoints(tmp_path: Path, key: str) -> None:
    weights = {"module.encoder.w": torch.ones(2), "module._orig_mod.b": torch.zeros(1)}
    torch.save({key: weights, "epoch": 7, "plot_stuff": [np.float64(0.5), np.float32(0.25)]}, tmp_path / "other.pth")
    assert set(load_weights_file(tmp_path / "other.pth")) == {"encoder.w", "b"}


def test_weight_files_without_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(CheckpointError, match="holds no tensors by name"):
        load_weights_file(tmp_path / "empty.pt")
    (tmp_path / "text.safetensors").write_text("not weights at all")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_weights_file(tmp_path / "text.safetensors")
    with pytest.raises(CheckpointError, match="is not a file"):
        load_weights_file(tmp_path / "nothing.pt")


class Burglar:
    """Pickles to a call that makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("writes_zip", [True, False])
def test_code_in_a_weight_file_is_not_run(tmp_path: Path, writes_zip: bool) -> None:
    path, trace = tmp_path / "model.pth", tmp_path / "was_here"
    document = {"state_dict": {"w": torch.zeros(1)}, "extra": Burglar(trace)}
    if writes_zip:
        torch.save(document, path)
    else:
        path.write_bytes(pickle.dumps(document))
    with pytest.raises(CheckpointError, match=r"carries code.*nothing in it was run"):
        load_weights_file(path)
    assert not trace.exists()
    if writes_zip:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert trace.is_dir(), "the trap was never live"


def test_state_comes_back_and_the_one_before_is_kept(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        save_state(tmp_path, {"epoch": epoch, "rng": torch.tensor([epoch]), "lr": [0.1, None, (1, "x")]})
    state = load_state(tmp_path)
    assert state["epoch"] == 3
    assert state["rng"].tolist() == [3]
    assert state["lr"] == [0.1, None, (1, "x")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    position = content.find(torch.arange(64.0).numpy().tobytes()[16:48])
    content[position + 3] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, Path.unlink])
def test_damaged_state_falls_back_to_the_previous_one(
    tmp_path: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    for epoch in (1, 2):
        save_state(tmp_path, {"epoch": epoch, "w": torch.arange(64.0)})
    damage(tmp_path / "last.ckpt")
    with caplog.at_level(logging.WARNING):
        assert load_state(tmp_path)["epoch"] == 1
    assert "going on from previous.ckpt" in caplog.text


def test_no_usable_state_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"last\.ckpt is missing; previous\.ckpt is missing"):
        load_state(tmp_path)


def test_a_file_that_is_no_state_is_not_used(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt is no resume state; previous\.ckpt is missing"):
        load_state(tmp_path)


def test_state_with_code_is_neither_run_nor_used(tmp_path: Path) -> None:
    torch.save({"epoch": Burglar(tmp_path / "was_here")}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="carries code"):
        load_state(tmp_path)
    assert not (tmp_path / "was_here").exists()


def test_state_that_could_not_be_read_back_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\['rng'\]\[0\] is ndarray"):
        save_state(tmp_path, {"rng": [np.zeros(3)]})
    with pytest.raises(TypeError, match=r"state\['best'\] is float64"):
        save_state(tmp_path, {"best": np.float64(1.0)})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_a_run_folder_can_be_read_by_whom_the_umask_allows(tmp_path: Path, umask: int, mode: int) -> None:
    weights = {"layer": torch.ones(2)}
    before = os.umask(umask)
    try:
        save_model(tmp_path, weights, make_card())
        save_weights(tmp_path / "encoder.safetensors", weights)
        save_state(tmp_path, weights)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    names = ("model.safetensors", "model.json", "encoder.safetensors", "last.ckpt")
    assert modes == dict.fromkeys(names, mode)
