"""Model cards, beside the weights that they describe."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fuzzing import seeds
from fuzzing.mutators.documents import mutated_json
from fuzzing.parser import Files, Parser


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _card(folder: Path, path: Path) -> None:
    from segkit.checkpoint.model import load_model
    from segkit.checkpoint.run_folder import load_card

    card = load_card(folder)
    assert len(card.outputs) == 0 or card.segmentation is not None
    card.to_json()
    document = json.loads(path.read_bytes())
    document["sha256"] = digest(folder / "model.safetensors")
    path.write_bytes(seeds.as_json(document))
    load_model(folder)


def _weights() -> Files:
    import safetensors.torch

    from segkit.checkpoint.card import ModelCard
    from segkit.checkpoint.model import build_network

    network = build_network(ModelCard.model_validate(seeds.CARD))
    return {"model.safetensors": safetensors.torch.save(dict(network.state_dict()))}


PARSERS = (
    Parser(
        "model-card",
        lambda: [{"model.json": seeds.as_json(seeds.CARD)}],
        {"": mutated_json},
        _card,
        _weights,
        first_check="Invalid JSON",
    ),
)
