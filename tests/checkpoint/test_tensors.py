"""Weight files: whole or refused, and never executed."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from segkit.checkpoint.tensors import load_weights_file, read_plain_pickle, read_torch
from segkit.errors import CheckpointError


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


_KINDS = [
    ("plain.pt", {"w": torch.zeros(1)}),
    ("model_final_checkpoint.model", {"state_dict": {"w": torch.zeros(1)}, "epoch": 3}),
    ("checkpoint_final.pth", {"network_weights": {"w": torch.zeros(1)}, "trainer_name": "STUNetTrainer_small"}),
]


@pytest.mark.parametrize("writes_zip", [True, False])
@pytest.mark.parametrize(("name", "document"), _KINDS)
def test_code_in_a_weight_file_is_not_run(
    tmp_path: Path, burglar: Callable[[Path], object], name: str, document: dict[str, object], writes_zip: bool
) -> None:
    path, trace = tmp_path / name, tmp_path / "was_here"
    document = {**document, "plot_stuff": burglar(trace)}
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


def test_numpy_values_beside_the_weights_are_read(tmp_path: Path) -> None:
    """Losses and scores in the files of nnU-Net, of every number type that numpy has."""
    numbers = [np.dtype(code).type(1) for code in "?bBhHiIlLqQefd"]
    document = {"state_dict": {"w": torch.ones(2)}, "plot_stuff": [numbers, np.arange(3.0), np.zeros((1, 2), "i4")]}
    torch.save(document, tmp_path / "x.model")
    read = read_torch(tmp_path / "x.model")
    assert read["plot_stuff"][0] == numbers
    assert read["plot_stuff"][1].tolist() == [0, 1, 2]
    assert load_weights_file(tmp_path / "x.model")["w"].tolist() == [1, 1]


def test_a_look_beside_the_tensors_leaves_them_in_the_file(tmp_path: Path) -> None:
    torch.save({"trainer_name": "x", "network_weights": {"w": torch.arange(4.0)}}, tmp_path / "x.pth")
    document = read_torch(tmp_path / "x.pth", is_mapped=True)
    assert document["trainer_name"] == "x"
    assert document["network_weights"]["w"].tolist() == [0, 1, 2, 3]


def test_a_pickle_of_plain_values_is_read(tmp_path: Path) -> None:
    plans = OrderedDict(spacing=np.array([1.5, 1.5, 3.0]), stage={0: np.int64(2)}, masks=[np.bool_(True), None, "x"])
    path = tmp_path / "plans.pkl"
    path.write_bytes(pickle.dumps(plans))
    read = read_plain_pickle(path)
    assert read["spacing"].tolist() == [1.5, 1.5, 3.0]
    assert read["stage"] == {0: 2}
    assert read["masks"] == [True, None, "x"]


def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path: Path, burglar: Callable[[Path], object]) -> None:
    path, trace = tmp_path / "plans.pkl", tmp_path / "was_here"
    path.write_bytes(pickle.dumps({"plans": burglar(trace)}))
    with pytest.raises(CheckpointError, match=r"carries code.*nothing in it was run.*plans as JSON"):
        read_plain_pickle(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.is_dir(), "the trap was never live"


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04K"])
def test_damaged_pickles_are_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plans.pkl").write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_plain_pickle(tmp_path / "plans.pkl")
    with pytest.raises(CheckpointError, match="is missing"):
        read_plain_pickle(tmp_path / "others.pkl")
