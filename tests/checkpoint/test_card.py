"""What `model.json` says, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.model import save_model
from segkit.checkpoint.run_folder import load_card
from segkit.errors import CheckpointError
from segkit.labels import SCHEMES, Output


def test_card_has_the_keys_that_other_programs_read(tmp_path: Path, make_card: Callable[..., ModelCard]) -> None:
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


def test_card_comes_back_with_its_scheme_outputs_and_preprocessing(
    tmp_path: Path, make_card: Callable[..., ModelCard]
) -> None:
    saved = save_model(tmp_path, {"w": torch.zeros(2)}, make_card(spacing_mm=[1, 1, 2.5]))
    card = load_card(tmp_path)
    assert card == saved
    assert card.scheme() is SCHEMES["brats2017"]
    assert card.output_list()[0] == Output("WT", 2, (1, 2, 4))
    assert card.preprocessing().spacing_mm == (1.0, 1.0, 2.5)
    assert card.preprocessing().normalisation == "zscore-nonzero"


def test_card_of_another_task_has_no_masks(make_card: Callable[..., ModelCard]) -> None:
    document = {key: value for key, value in make_card().to_json().items() if key not in ("outputs", "activation")}
    card = ModelCard.model_validate({**document, "task": "pretraining", "label_scheme": None})
    assert not {"activation", "outputs", "label_scheme"} & card.to_json().keys()
    with pytest.raises(CheckpointError, match="pretraining model has no label scheme"):
        card.scheme()
