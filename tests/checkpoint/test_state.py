"""Resume states: whole or refused, and never executed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from segkit.checkpoint.tensors import load_state, save_state
from segkit.errors import CheckpointError


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
    assert "resuming from previous.ckpt" in caplog.text


def test_a_byte_turned_over_anywhere_is_noticed_or_means_nothing(tmp_path: Path) -> None:
    weights = torch.randn(300, generator=torch.Generator().manual_seed(0))
    for epoch in (1, 2):
        save_state(tmp_path, {"epoch": epoch, "w": weights * epoch, "random": torch.arange(40)})
    content = (tmp_path / "last.ckpt").read_bytes()
    noticed = 0
    for position in range(0, len(content), 29):
        changed = bytearray(content)
        changed[position] ^= 0xFF
        (tmp_path / "last.ckpt").write_bytes(bytes(changed))
        state = load_state(tmp_path)
        noticed += state["epoch"] == 1
        assert torch.equal(state["w"], weights * state["epoch"]), position
        assert torch.equal(state["random"], torch.arange(40)), position
    assert noticed > 4 * weights.numel() / 29


def test_a_damaged_state_is_put_aside_and_never_takes_the_place_of_the_previous_one(tmp_path: Path) -> None:
    for epoch in (1, 2):
        save_state(tmp_path, {"epoch": epoch})
    truncate(tmp_path / "last.ckpt")
    assert load_state(tmp_path)["epoch"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.ckpt", "previous.ckpt"]
    save_state(tmp_path, {"epoch": 3})
    truncate(tmp_path / "last.ckpt")
    assert load_state(tmp_path)["epoch"] == 1


def test_no_usable_state_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"last\.ckpt is missing; previous\.ckpt is missing"):
        load_state(tmp_path)


def test_a_file_that_is_no_state_is_not_used(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt is not a resume state; previous\.ckpt is missing"):
        load_state(tmp_path)


def test_state_with_code_is_neither_run_nor_used(tmp_path: Path, burglar: Callable[[Path], object]) -> None:
    torch.save({"epoch": burglar(tmp_path / "was_here")}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="carries code"):
        load_state(tmp_path)
    assert not (tmp_path / "was_here").exists()


def test_state_that_could_not_be_read_back_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\['rng'\]\[0\] is ndarray"):
        save_state(tmp_path, {"rng": [np.zeros(3)]})
    with pytest.raises(TypeError, match=r"state\['best'\] is float64"):
        save_state(tmp_path, {"best": np.float64(1.0)})
    assert not list(tmp_path.iterdir())
