"""What is known of weights besides their numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.model import read_source, save_model
from segkit.checkpoint.transfer import load_weights

THEIRS = ["lvmmed_resnet.torch", "lvmmed_vit.pth", "LVM-Med_R50.pth", "lvm_med.pt"]
OTHERS = ["resnet50.pth", "not_lvmmed.pth", "lvm.pth"]


@pytest.mark.parametrize("name", [*THEIRS, *OTHERS])
def test_files_of_lvm_med_are_told_by_their_names(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / name)
    load_weights(nn.Linear(1, 1), tmp_path / name)
    assert bool(caplog.records) == (name in THEIRS)
    notice = read_source(tmp_path / name).facts().get("notice")
    assert (notice is not None and "CC BY-NC" in notice) == (name in THEIRS)


def test_a_notice_goes_on_with_the_models_that_were_trained_from_the_weights(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    make_card: Callable[..., ModelCard],
    tied_network: Callable[..., nn.Module],
) -> None:
    begun = {"file": "lvmmed_resnet.torch", "notice": "for non-commercial use only"}
    card = make_card(training_data={"identity": "phantom", "licence": "CC0", "initial_weights": begun})
    save_model(tmp_path / "run", tied_network(4, 3, 5).state_dict(), card)
    facts = read_source(tmp_path / "run" / "model.safetensors").facts()
    assert (facts["licence"], facts["notice"]) == ("CC0", "for non-commercial use only")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING


def test_other_models_have_no_notice(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    make_card: Callable[..., ModelCard],
    tied_network: Callable[..., nn.Module],
) -> None:
    for name, more in (("a", {}), ("b", {"initial_weights": {"file": "x.pth"}})):
        card = make_card(training_data={"identity": "phantom", **more})
        save_model(tmp_path / name, tied_network(4, 3, 5).state_dict(), card)
        assert "notice" not in read_source(tmp_path / name).facts()
    assert not caplog.records
