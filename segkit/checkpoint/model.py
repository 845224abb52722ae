"""Write and load run folders, and read weights from other sources."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from segkit.checkpoint import monai_bundle, nnunet
from segkit.checkpoint.bundle_config import is_bundle
from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.run_folder import CARD_NAME, RUN_FOLDER, WEIGHTS_NAME, load_card, only_folder
from segkit.checkpoint.tensors import load_weights_file, write_tensors
from segkit.errors import CheckpointError
from segkit.models.blocks import SegmentationNetwork
from segkit.models.table import build_model
from segkit.reading.files import file_sha256, written_atomically

_SPARE_VALUES = 10_000_000
"""A network may hold so many values more than its file: smaller differences are reported tensor by tensor."""

_OF_LVM_MED = re.compile(r"lvm[-_ ]?med", re.IGNORECASE)
"""File names of LVM-Med's weights: lvmmed_resnet.torch, lvmmed_vit.pth."""
_LVM_MED_NOTICE = (
    "LVM-Med's weights are for non-commercial use only "
    "(its licence texts say CC BY-NC-ND 2.0, CC BY-NC-SA 4.0 and CC BY-NC 2.0)"
)

_log = logging.getLogger(__name__)


def save_model(run_dir: Path, weights: Mapping[str, Tensor], card: ModelCard) -> ModelCard:
    """Write `model.safetensors` and its card; returns the card with the digest of the weights.

    Raises:
        DataError: the folder cannot be written.
    """
    with (
        written_atomically(run_dir / CARD_NAME) as card_path,
        written_atomically(run_dir / WEIGHTS_NAME) as weights_path,
    ):
        write_tensors(weights_path, weights)
        card = card.model_copy(update={"sha256": file_sha256(weights_path)})
        card_path.write_text(card.to_text(), encoding="utf-8")
    # Both files were complete before the first was renamed: they disagree only between the two renames.
    return card


def load_model(run_dir: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """The network of a run folder, of results of nnU-Net or of a MONAI bundle, with its best weights, for evaluation.

    Raises:
        CheckpointError: card or weights are missing, damaged, do not belong together or do not fit the network.
    """
    card = load_card(Path(run_dir))
    weights, source = _read_weights(Path(run_dir), card)
    try:
        _require_room_for(card, weights)
        network = build_network(card, downloads=False)
        spare = getattr(network, "spare_heads", ())
        own = {name: value for name, value in network.state_dict().items() if name.startswith(spare)}
        network.load_state_dict({**own, **weights}, strict=True)
    except RuntimeError as error:
        details = " ".join(str(error).split())[:300]
        found = f"the weights do not fit {card.network.family!r} as this version builds it ({details})"
        raise CheckpointError(found, where=source, remedy="Use the version of segkit that wrote it") from error
    return network.to(device).eval()


def _require_room_for(card: ModelCard, weights: Mapping[str, Tensor]) -> None:
    """RuntimeError if the network is much larger than its weights: one line of a card can ask for all memory."""
    with torch.device("meta"):
        wanted = build_network(card, downloads=False).state_dict()
    values, stored = (sum(tensor.numel() for tensor in tensors.values()) for tensors in (wanted, weights))
    if values > stored + _SPARE_VALUES:
        raise RuntimeError(f"the network holds {values} values and the file {stored}")


def _read_weights(run_dir: Path, card: ModelCard) -> tuple[dict[str, Tensor], Path]:
    if card.bundle is not None and is_bundle(run_dir):
        return monai_bundle.read_bundle_weights(run_dir)
    if not (run_dir / CARD_NAME).is_file():
        checkpoint = nnunet.checkpoint_path(only_folder(run_dir))
        if checkpoint is not None:
            return load_weights_file(checkpoint), checkpoint  # the card was just made from it
    path = run_dir / WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(f"holds no {WEIGHTS_NAME}", where=run_dir, expected=RUN_FOLDER)
    if file_sha256(path) != card.sha256:
        found = f"does not match the sha256 in {CARD_NAME}: the file is damaged or was swapped"
        raise CheckpointError(found, where=path, remedy="Copy the run folder again, both files together")
    return load_weights_file(path), path


def build_network(card: ModelCard, *, downloads: bool = True) -> SegmentationNetwork:
    """The network of a card with initial weights; with `downloads`, pretrained encoder weights that the card names."""
    network = card.network
    arguments = {k: v for k, v in network.arguments.items() if downloads or k != "encoder_weights"}
    arguments |= {"in_channels": network.in_channels, "out_channels": network.out_channels}
    return build_model(network.family, dims=card.dims, size=network.size, **arguments)


@dataclass(frozen=True)
class WeightSource:
    """Tensors by name, their file and, if there is one, their card."""

    file: Path
    tensors: Mapping[str, Tensor] = field(repr=False)
    card: ModelCard | None = None

    @property
    def notice(self) -> str | None:
        """Licence terms for users of these weights, and of models trained from them; None if none are known."""
        if self.card is None:
            return _LVM_MED_NOTICE if _OF_LVM_MED.match(self.file.name) else None
        initial: object = (self.card.training_data.model_extra or {}).get("initial_weights")
        notice = initial.get("notice") if isinstance(initial, dict) else None
        return notice if isinstance(notice, str) else None

    def facts(self) -> dict[str, str]:
        """File, SHA-256, origin and, if known, licence, for the card of a model trained from these weights."""
        found = {"file": self.file.name, "sha256": file_sha256(self.file), "origin": "a weight file without a card"}
        if self.card is not None:
            network, data = self.card.network, self.card.training_data
            size = f" {network.size}" if network.size else ""
            found["origin"] = f"{network.family}{size} trained on {data.identity}"
            if data.licence is not None:
                found["licence"] = data.licence
        return found if self.notice is None else {**found, "notice": self.notice}


def read_source(path: Path) -> WeightSource:
    """The weights of a folder with one model, or of a file; licence terms are logged as a warning.

    Raises:
        CheckpointError: there is no model or file, several models, or the weights are damaged or unsafe to read.
    """
    is_of_run = path.name == WEIGHTS_NAME and (path.parent / CARD_NAME).is_file()
    if path.is_dir() or is_of_run:
        folder = only_folder(path.parent if is_of_run else path)
        card = load_card(folder)
        tensors, file = _read_weights(folder, card)
        source = WeightSource(file, tensors, card)
    else:
        source = WeightSource(path, load_weights_file(path))
    if source.notice is not None:
        _log.warning("%s: %s", path, source.notice)
    return source
