"""What `model.json` says, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from segkit.checkpoint.card import ExportCard, GraphCard, ModelCard
from segkit.checkpoint.model import save_model
from segkit.checkpoint.run_folder import load_card, require_segmentation
from segkit.errors import CheckpointError, RequestError
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
    assert card.outputs[0] == Output("WT", 2, (1, 2, 4))
    assert card.preprocessing.spacing_mm == (1.0, 1.0, 2.5)
    assert card.preprocessing.normalisation == "zscore-nonzero"


KEYS = [
    *("task", "network", "dims", "modalities", "patch_size", "overlap", "divisor"),
    *("spacing_mm", "orientation", "normalisation", "ct_window", "ct_mean", "ct_std", "crop"),
    *("mirror_axes", "activation", "outputs", "label_scheme", "postprocessing", "modality_dropout"),
    *("versions", "sha256", "training_data"),
]
OF_MASKS = ("activation", "outputs", "label_scheme", "postprocessing")


def test_the_file_holds_no_nan(make_card: Callable[..., ModelCard]) -> None:
    graph = GraphCard(file="model.onnx", precision="fp32", sha256={})
    export = ExportCard(opset=20, graphs=(graph,), parity={"openvino": {"dice": float("nan")}})
    text = make_card().model_copy(update={"export": export}).to_text()
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert document["export"]["parity"] == {"openvino": {"dice": None}}


def test_the_file_has_flat_keys_in_a_fixed_order(make_card: Callable[..., ModelCard]) -> None:
    card = make_card(mirror_axes=[0, 2], modality_dropout=0.25, crop="none")
    document = card.to_json()
    assert list(document) == KEYS
    assert (document["mirror_axes"], document["modality_dropout"], document["crop"]) == ([0, 2], 0.25, "none")
    assert ModelCard.model_validate_json(json.dumps(document)) == card
    assert (card.inpainting, card.context, card.input_channels) == (None, "none", 4)


def test_card_of_another_task_has_no_masks(make_card: Callable[..., ModelCard]) -> None:
    document = {key: value for key, value in make_card().to_json().items() if key not in ("outputs", "activation")}
    card = ModelCard.model_validate({**document, "task": "pretraining", "label_scheme": None})
    assert card.segmentation is None
    assert list(card.to_json()) == [key for key in KEYS if key not in OF_MASKS]
    assert ModelCard.model_validate({**make_card().to_json(), "task": "pretraining"}) == card
    with pytest.raises(CheckpointError, match="pretraining model has no label scheme"):
        card.scheme()


def test_card_of_an_inpainting_network_has_its_context(make_card: Callable[..., ModelCard]) -> None:
    document = {key: value for key, value in make_card().to_json().items() if key not in OF_MASKS}
    card = ModelCard.model_validate({**document, "task": "inpainting", "context": "mirror"})
    assert card.segmentation is None
    assert card.input_channels == 4 + 2 + 4
    keys = list(card.to_json())
    assert keys[keys.index("mirror_axes") :][:3] == ["mirror_axes", "context", "modality_dropout"]


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", "none", [], {}])
def test_keys_of_later_versions_are_ignored_where_the_model_does_without_them(
    tmp_path: Path, make_card: Callable[..., ModelCard], value: object
) -> None:
    document = make_card().to_json()
    network = {**document["network"], "later": value}
    (tmp_path / "model.json").write_text(json.dumps({**document, "later": value, "network": network}))
    assert load_card(tmp_path) == make_card()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"later": 0.5}, "later: Extra inputs are not permitted"),
        ({"later": "some"}, "later: Extra inputs are not permitted"),
        ({"preprocessing": {"crop": "none"}}, "`preprocessing` is not a key"),
        ({"segmentation": {}}, "`segmentation` is not a key"),
        ({"activation": None}, r"\(activation: Input should be 'sigmoid' or 'softmax'\)"),
        ({"crop": None}, r"\(crop: Input should be 'nonzero' or 'none'\)"),
        ({"mirror_axes": [3]}, r"mirror_axes are \(3,\) of 3 axes"),
    ],
)
def test_damaged_values_are_refused(
    tmp_path: Path, make_card: Callable[..., ModelCard], change: dict[str, object], message: str
) -> None:
    (tmp_path / "model.json").write_text(json.dumps({**make_card().to_json(), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_card(tmp_path)


def test_card_without_masks_is_of_no_use_for_segmentation(make_card: Callable[..., ModelCard]) -> None:
    document = {key: value for key, value in make_card().to_json().items() if key not in OF_MASKS}
    card = ModelCard.model_validate(document)
    assert list(card.to_json()) == KEYS
    with pytest.raises(RequestError, match="lacks `activation` or `label_scheme`"):
        require_segmentation(card)
