"""Where weights come from: a run folder, a result folder of nnU-Net, or a file of tensors."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.model import read_weights
from segkit.checkpoint.run_folder import CARD_NAME, WEIGHTS_NAME, load_card, model_folders
from segkit.checkpoint.tensors import load_weights_file
from segkit.errors import CheckpointError
from segkit.reading.files import file_sha256

_log = logging.getLogger(__name__)

_OF_LVM_MED = re.compile(r"lvm[-_ ]?med", re.IGNORECASE)
"""How the names of LVM-Med's files begin: lvmmed_resnet.torch, lvmmed_vit.pth."""
_LVM_MED_NOTICE = (
    "LVM-Med's weights are for non-commercial use only "
    "(its licence texts say CC BY-NC-ND 2.0, CC BY-NC-SA 4.0 and CC BY-NC 2.0)"
)


@dataclass(frozen=True)
class WeightSource:
    """Tensors by name, the file they are in and, where one belongs to them, the card that says what they see."""

    file: Path
    tensors: Mapping[str, Tensor] = field(repr=False)
    card: ModelCard | None = None

    @property
    def notice(self) -> str | None:
        """What binds users of these weights, and of models that were trained from them; None where nothing is known."""
        if self.card is None:
            return _LVM_MED_NOTICE if _OF_LVM_MED.match(self.file.name) else None
        began: object = (self.card.training_data.model_extra or {}).get("initial_weights")
        notice = began.get("notice") if isinstance(began, dict) else None
        return notice if isinstance(notice, str) else None

    def facts(self) -> dict[str, str]:
        """What a model trained from these weights says about them: file, digest, origin and, where known, licence."""
        found = {"file": self.file.name, "sha256": file_sha256(self.file), "origin": "a weight file without a card"}
        if self.card is not None:
            network, data = self.card.network, self.card.training_data
            size = f" {network.size}" if network.size else ""
            found["origin"] = f"{network.family}{size} trained on {data.identity}"
            if data.licence is not None:
                found["licence"] = data.licence
        return found if self.notice is None else {**found, "notice": self.notice}


def read_source(path: Path) -> WeightSource:
    """The weights of a folder with one model, or of a file; what binds their users is logged as a warning.

    Raises:
        CheckpointError: nothing is there, several models are, or what is there is damaged or unsafe to read.
    """
    source = _read(path)
    if source.notice is not None:
        _log.warning("%s: %s", path, source.notice)
    return source


def _read(path: Path) -> WeightSource:
    if path.name == WEIGHTS_NAME and (path.parent / CARD_NAME).is_file():
        path = path.parent
    if not path.is_dir():
        return WeightSource(path, load_weights_file(path))
    folders = model_folders(path)
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise CheckpointError(f"holds {len(folders)} models ({names})", where=path, remedy="Name one of its folders")
    card = load_card(folders[0])
    tensors, file = read_weights(folders[0], card)
    return WeightSource(file, tensors, card)
