"""Networks with their weights: written to a run folder, and built again from one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from segkit.checkpoint import nnunet
from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.run_folder import CARD_NAME, RUN_FOLDER, WEIGHTS_NAME, load_card, only_fold
from segkit.checkpoint.tensors import load_weights_file, write_tensors
from segkit.errors import CheckpointError
from segkit.models.table import build_model
from segkit.reading.files import file_sha256, written_atomically

_SPARE_VALUES = 10_000_000


def save_model(run_dir: Path, weights: Mapping[str, Tensor], card: ModelCard) -> ModelCard:
    """Write `model.safetensors` and the card that fits it; gives back the card with its digest.

    Raises:
        DataError: the folder cannot be written.
    """
    with (
        written_atomically(run_dir / CARD_NAME) as card_path,
        written_atomically(run_dir / WEIGHTS_NAME) as weights_path,
    ):
        write_tensors(weights_path, weights)
        card = card.model_copy(update={"sha256": file_sha256(weights_path)})
        card_path.write_text(json.dumps(card.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    # Both were complete before either was moved, so they do not match only in the moment between two renames.
    return card


def load_model(run_dir: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """The network of a run folder, or of nnU-Net's results, with its best weights, in evaluation mode.

    Raises:
        CheckpointError: card or weights are missing, damaged, do not belong together or do not fit the network.
    """
    run_dir = Path(run_dir)
    card = load_card(run_dir)
    weights, source = read_weights(run_dir, card)
    try:
        _require_room_for(card, weights)
        network = build_network(card, downloads=False)
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        details = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the weights do not fit {card.network.family!r} as this version builds it ({details})",
            where=source,
            remedy="Use the version of segkit that wrote it",
        ) from error
    return network.to(device).eval()


def _require_room_for(card: ModelCard, weights: Mapping[str, Tensor]) -> None:
    """RuntimeError where a network is much larger than its weights: one line of a card can ask for all memory."""
    with torch.device("meta"):
        wanted = build_network(card, downloads=False).state_dict()
    values, stored = (sum(tensor.numel() for tensor in tensors.values()) for tensors in (wanted, weights))
    if values > stored + _SPARE_VALUES:  # what differs by less is named tensor by tensor when it is loaded
        raise RuntimeError(f"the network holds {values} values and the file {stored}")


def read_weights(run_dir: Path, card: ModelCard) -> tuple[dict[str, Tensor], Path]:
    """The weights that a card describes, by name, and the file that they come from.

    Raises:
        CheckpointError: they are missing, damaged or not those of the card.
    """
    if not (run_dir / CARD_NAME).is_file() and nnunet.is_result(run_dir):
        checkpoint = nnunet.checkpoint_path(only_fold(run_dir))
        return load_weights_file(checkpoint), checkpoint  # the card was made from it a moment ago
    path = run_dir / WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(f"holds no {WEIGHTS_NAME}", where=run_dir, expected=RUN_FOLDER)
    if file_sha256(path) != card.sha256:
        found = f"does not match the sha256 in {CARD_NAME}: the file is damaged or was swapped"
        raise CheckpointError(found, where=path, remedy="Copy the run folder again, both files together")
    return load_weights_file(path), path


def build_network(card: ModelCard, *, downloads: bool = True) -> nn.Module:
    """The network a card describes, with fresh weights; those of an encoder are fetched if the card asks for them.

    Without `downloads` they are not: for a network that is given other weights at once.
    """
    network = card.network
    arguments = {k: v for k, v in network.arguments.items() if downloads or k != "encoder_weights"}
    return build_model(
        network.family,
        in_channels=network.in_channels,
        out_channels=network.out_channels,
        dims=card.dims,
        size=network.size,
        **arguments,
    )
