"""Folders with a trained model: our run folders, and nnU-Net's results where their network is STU-Net."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from segkit.checkpoint import nnunet
from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.state import LAST_NAME
from segkit.checkpoint.tensors import file_sha256, load_weights_file, write_tensors
from segkit.data.files import written_atomically
from segkit.errors import CheckpointError
from segkit.models.table import build_model

CARD_NAME = "model.json"
WEIGHTS_NAME = "model.safetensors"

_RUN_FOLDER = "a run folder of `segkit train`"


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


def load_card(run_dir: Path) -> ModelCard:
    """The model card of a run folder, or that of a result folder of nnU-Net, made from its plans.

    Raises:
        CheckpointError: there is no card, or it is not one this version understands.
    """
    path = run_dir / CARD_NAME
    if path.is_file():
        return _read_card(path)
    if nnunet.is_result(run_dir):
        return nnunet.make_card(_only_fold(run_dir))
    is_begun = (run_dir / LAST_NAME).exists()
    remedy = "Resume the training with --resume, up to its first validation" if is_begun else "Check the path"
    raise CheckpointError(f"holds no {CARD_NAME}", where=run_dir, expected=_RUN_FOLDER, remedy=remedy)


def model_folders(path: Path) -> list[Path]:
    """The folders with one model each: `path` itself, or its `fold_*` sub-folders after cross-validation.

    Raises:
        CheckpointError: neither holds a model.
    """
    if not path.is_dir():
        raise CheckpointError("is not a folder", where=path, expected=_RUN_FOLDER)
    folds = sorted(fold for fold in path.glob("fold_*") if (fold / CARD_NAME).is_file())
    if (path / CARD_NAME).is_file():
        folds = []
    elif not folds and nnunet.is_result(path):
        folds = nnunet.fold_folders(path)
    if not folds:
        load_card(path)
        return [path]
    return folds


def load_model(run_dir: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """The network of a run folder, or of nnU-Net's results, with its best weights, in evaluation mode.

    Raises:
        CheckpointError: card or weights are missing, damaged, do not belong together or do not fit the network.
    """
    run_dir = Path(run_dir)
    card = load_card(run_dir)
    weights, source = read_weights(run_dir, card)
    network = build_network(card, downloads=False)
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        details = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the weights do not fit {card.network.family!r} as this version builds it ({details})",
            where=source,
            remedy="Use the version of segkit that wrote it",
        ) from error
    return network.to(device).eval()


def read_weights(run_dir: Path, card: ModelCard) -> tuple[dict[str, Tensor], Path]:
    """The weights that a card describes, by name, and the file that they come from.

    Raises:
        CheckpointError: they are missing, damaged or not those of the card.
    """
    if not (run_dir / CARD_NAME).is_file() and nnunet.is_result(run_dir):
        checkpoint = nnunet.checkpoint_path(_only_fold(run_dir))
        return load_weights_file(checkpoint), checkpoint  # the card was made from it a moment ago
    path = run_dir / WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(f"holds no {WEIGHTS_NAME}", where=run_dir, expected=_RUN_FOLDER)
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


def _read_card(path: Path) -> ModelCard:
    try:
        return ModelCard.model_validate_json(path.read_bytes())
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'document'}: {e['msg']}" for e in error.errors())
        found = f"is not a model card this version can read ({details})"
        remedy = "Use the version of segkit that wrote it, or train again"
        raise CheckpointError(found, where=path, remedy=remedy) from error


def _only_fold(result: Path) -> Path:
    """The one fold of a result folder of nnU-Net."""
    folds = nnunet.fold_folders(result)
    if len(folds) > 1:
        names = ", ".join(fold.name for fold in folds)
        raise CheckpointError(f"holds {len(folds)} models ({names})", where=result, remedy="Name one of its folders")
    return folds[0]
