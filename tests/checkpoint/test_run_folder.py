"""Run folders: whole or refused."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from segkit.checkpoint import model
from segkit.checkpoint.card import ModelCard, NetworkCard
from segkit.checkpoint.model import load_model, save_model
from segkit.checkpoint.run_folder import load_card, model_folders
from segkit.checkpoint.tensors import load_weights_file, save_state, write_tensors
from segkit.errors import CheckpointError, DataError


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


def test_model_with_tied_weights_comes_back(
    tmp_path: Path, make_card: Callable[..., ModelCard], tied_network: Callable[..., nn.Module]
) -> None:
    network = tied_network(4, 3, 5)
    save_model(tmp_path, network.state_dict(), make_card())
    assert set(load_file(tmp_path / "model.safetensors")) == {"encoder.weight", "twin.weight", "head"}
    loaded = load_model(tmp_path)
    x = torch.randn(2, 4)
    assert torch.equal(loaded(x), network(x))
    assert not loaded.training


def test_saving_again_leaves_no_temporary_files(tmp_path: Path, make_card: Callable[..., ModelCard]) -> None:
    for value in (1.0, 2.0):
        save_model(tmp_path, {"w": torch.full((3,), value)}, make_card())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    assert load_weights_file(tmp_path / "model.safetensors")["w"].tolist() == [2.0, 2.0, 2.0]


def test_swapped_weights_are_refused(
    tmp_path: Path, make_card: Callable[..., ModelCard], tied_network: Callable[..., nn.Module]
) -> None:
    save_model(tmp_path, tied_network(4, 3, 5).state_dict(), make_card())
    write_tensors(tmp_path / "model.safetensors", tied_network(4, 3, 5).state_dict())
    with pytest.raises(CheckpointError, match="damaged or was swapped"):
        load_model(tmp_path)


def test_weights_of_another_size_are_refused(
    tmp_path: Path, make_card: Callable[..., ModelCard], tied_network: Callable[..., nn.Module]
) -> None:
    save_model(tmp_path, tied_network(4, 3, 2).state_dict(), make_card())
    with pytest.raises(CheckpointError, match=r"do not fit 'tiny'.*size mismatch for head"):
        load_model(tmp_path)


def test_missing_weights_are_named(tmp_path: Path, make_card: Callable[..., ModelCard]) -> None:
    save_model(tmp_path, {"w": torch.zeros(1)}, make_card())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        load_model(tmp_path)


def test_folds_are_found_in_order(tmp_path: Path, make_card: Callable[..., ModelCard]) -> None:
    for fold in (1, 0):
        save_model(tmp_path / f"fold_{fold}", {"w": torch.zeros(1)}, make_card())
    (tmp_path / "fold_2").mkdir()
    assert model_folders(tmp_path) == [tmp_path / "fold_0", tmp_path / "fold_1"]
    assert model_folders(tmp_path / "fold_1") == [tmp_path / "fold_1"]
    with pytest.raises(CheckpointError, match=r"holds no model\.json"):
        model_folders(tmp_path / "fold_2")
    with pytest.raises(CheckpointError, match="is not a folder"):
        model_folders(tmp_path / "nowhere")


def test_unwritable_folder_is_a_sentence(tmp_path: Path, make_card: Callable[..., ModelCard]) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="cannot be written"):
        save_model(tmp_path / "run", {"w": torch.zeros(1)}, make_card())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_a_run_folder_can_be_read_by_whom_the_umask_allows(
    tmp_path: Path, umask: int, mode: int, make_card: Callable[..., ModelCard]
) -> None:
    weights = {"layer": torch.ones(2)}
    before = os.umask(umask)
    try:
        save_model(tmp_path, weights, make_card())
        write_tensors(tmp_path / "encoder.safetensors", weights)
        save_state(tmp_path, weights)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    names = ("model.safetensors", "model.json", "encoder.safetensors", "last.ckpt")
    assert modes == dict.fromkeys(names, mode)


def test_weights_of_an_encoder_are_not_fetched_for_a_network_that_has_its_own(
    make_card: Callable[..., ModelCard], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(model, "build_model", lambda family, **arguments: asked.append(arguments) or nn.Identity())
    network = NetworkCard(family="smp", in_channels=1, out_channels=2, arguments={"encoder_weights": "imagenet"})
    described = make_card(network=network)
    model.build_network(described)
    model.build_network(described, downloads=False)
    assert [arguments.get("encoder_weights") for arguments in asked] == ["imagenet", None]
