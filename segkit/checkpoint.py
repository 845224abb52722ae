"""Weights and the card that says what they are: safetensors + JSON, and the resume state.

The only caller of `torch.load`, always with `weights_only=True`: nothing is ever executed from a weight file. A run
folder holds `model.safetensors` (best weights), `model.json` (the card) and `last.ckpt` with `previous.ckpt` (the
exact resume state). Everything is written to a temporary file first and moved into place, so a killed process leaves
the old file or the new one, never half of one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from pydantic import ConfigDict, Field, ValidationError
from torch import Tensor, nn

from segkit.config.base import Config
from segkit.data.files import written_atomically
from segkit.data.preprocessing import Crop, Normalisation, PreprocessingConfig
from segkit.errors import CheckpointError
from segkit.labels import LabelScheme, Output, scheme_from_json
from segkit.models.table import build_model

CARD_NAME = "model.json"
WEIGHTS_NAME = "model.safetensors"
LAST_NAME = "last.ckpt"
PREVIOUS_NAME = "previous.ckpt"

_RUN_FOLDER = "a run folder of `segkit train`"
_log = logging.getLogger(__name__)


class NetworkCard(Config):
    """The network to build: a family and size of `segkit models`, its channels and its other arguments."""

    family: str
    size: str | None = None
    in_channels: int
    out_channels: int
    arguments: dict[str, Any] = Field(default_factory=dict)


class OutputCard(Config):
    """One output: its name, the label value it paints, the label values it covers (empty: only `label`)."""

    name: str
    label: int
    members: tuple[int, ...] = ()


class SchemeCard(Config):
    """The label scheme of the training data: tissue names with their values, background left out."""

    name: str
    labels: dict[str, int]


class TrainingData(Config):
    """What the weights were trained on; further facts (fold, seed ...) may be added."""

    model_config = ConfigDict(extra="allow")

    identity: str
    """Name or digest by which the data can be told again."""
    licence: str | None = None
    cases: int = 0


class ModelCard(Config):
    """The contents of `model.json`: everything needed to use the weights beside it.

    Sizes and patches are in voxels, spacings in mm, both in the axis order of `segkit.shapes` after orientation.
    `activation`, `outputs` and `label_scheme` belong to segmentation only.
    """

    task: Literal["segmentation", "pretraining", "inpainting"] = "segmentation"
    network: NetworkCard
    dims: Literal[2, 3] = 3
    modalities: tuple[str, ...]
    """Names of the input channels, in order."""
    patch_size: tuple[int, ...]
    overlap: float = 0.5
    """Fraction of a window shared with its neighbour."""
    divisor: tuple[int, ...]
    """The network takes sizes that are multiples of this."""
    spacing_mm: tuple[float, ...] | None = None
    """Grid on which the network works; null keeps the spacing of the source."""
    orientation: str = "RAS"
    normalisation: Normalisation = "zscore-nonzero"
    ct_window: tuple[float, float] | None = None
    ct_mean: float | None = None
    ct_std: float | None = None
    crop: Crop = "nonzero"
    mirror_axes: tuple[int, ...] | None = None
    """Axes that training mirrored, which test-time mirroring may use; null means all of them."""
    activation: Literal["sigmoid", "softmax"] | None = None
    outputs: tuple[OutputCard, ...] = ()
    label_scheme: SchemeCard | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    sha256: str = ""
    """Digest of `model.safetensors`."""
    training_data: TrainingData

    def preprocessing(self) -> PreprocessingConfig:
        """How a case is prepared for this network."""
        return PreprocessingConfig(
            spacing_mm=self.spacing_mm,
            orientation=self.orientation,
            normalisation=self.normalisation,
            ct_window=self.ct_window,
            ct_mean=self.ct_mean,
            ct_std=self.ct_std,
            crop=self.crop,
        )

    def scheme(self) -> LabelScheme:
        """The label scheme in which the outputs are defined.

        Raises:
            CheckpointError: the task is not segmentation.
        """
        if self.label_scheme is None:
            raise CheckpointError(f"a {self.task} model has no label scheme", expected="a segmentation model")
        return scheme_from_json(self.label_scheme.model_dump())

    def output_list(self) -> tuple[Output, ...]:
        """The outputs in painting order."""
        return tuple(Output(output.name, output.label, output.members or (output.label,)) for output in self.outputs)

    def to_json(self) -> dict[str, Any]:
        """The document written as `model.json`."""
        document = self.model_dump(mode="json")
        if self.task != "segmentation":
            for key in ("activation", "outputs", "label_scheme"):
                del document[key]
        return document


def save_model(run_dir: Path, weights: Mapping[str, Tensor], card: ModelCard) -> ModelCard:
    """Write `model.safetensors` and the card that fits it; gives back the card with its digest.

    Raises:
        DataError: the folder cannot be written.
    """
    with (
        written_atomically(run_dir / CARD_NAME) as card_path,
        written_atomically(run_dir / WEIGHTS_NAME) as weights_path,
    ):
        _write_tensors(weights_path, weights)
        card = card.model_copy(update={"sha256": file_sha256(weights_path)})
        card_path.write_text(json.dumps(card.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    # Both were complete before either was moved, so they do not match only in the moment between two renames.
    return card


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> str:
    """Write tensors as safetensors, atomically; gives back the file's SHA-256.

    Tensors that share memory are written once each, so every name can be loaded on its own.

    Raises:
        DataError: the file cannot be written.
    """
    with written_atomically(path) as partial:
        _write_tensors(partial, weights)
        return file_sha256(partial)


def load_card(run_dir: Path) -> ModelCard:
    """Read `model.json` of a run folder.

    Raises:
        CheckpointError: there is no card, or it is not one this version understands.
    """
    path = run_dir / CARD_NAME
    if not path.is_file():
        is_begun = (run_dir / LAST_NAME).exists()
        remedy = "Resume the training with --resume, up to its first validation" if is_begun else "Check the path"
        raise CheckpointError(f"holds no {CARD_NAME}", where=run_dir, expected=_RUN_FOLDER, remedy=remedy)
    try:
        return ModelCard.model_validate_json(path.read_bytes())
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'document'}: {e['msg']}" for e in error.errors())
        found = f"is not a model card this version can read ({details})"
        remedy = "Use the version of segkit that wrote it, or train again"
        raise CheckpointError(found, where=path, remedy=remedy) from error


def model_folders(path: Path) -> list[Path]:
    """The folders with one model each: `path` itself, or its `fold_*` sub-folders after cross-validation.

    Raises:
        CheckpointError: neither holds a model.
    """
    if not path.is_dir():
        raise CheckpointError("is not a folder", where=path, expected=_RUN_FOLDER)
    folds = sorted(fold for fold in path.glob("fold_*") if (fold / CARD_NAME).is_file())
    if (path / CARD_NAME).is_file() or not folds:
        load_card(path)
        return [path]
    return folds


def load_model(run_dir: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """The network of a run folder with its best weights, in evaluation mode.

    Raises:
        CheckpointError: card or weights are missing, damaged, do not belong together or do not fit the network.
    """
    run_dir = Path(run_dir)
    card = load_card(run_dir)
    weights_path = run_dir / WEIGHTS_NAME
    if not weights_path.is_file():
        raise CheckpointError(f"holds no {WEIGHTS_NAME}", where=run_dir, expected=_RUN_FOLDER)
    if file_sha256(weights_path) != card.sha256:
        found = f"does not match the sha256 in {CARD_NAME}: the file is damaged or was swapped"
        raise CheckpointError(found, where=weights_path, remedy="Copy the run folder again, both files together")
    network = build_network(card)
    try:
        network.load_state_dict(load_weights_file(weights_path), strict=True)
    except RuntimeError as error:
        details = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the weights do not fit {card.network.family!r} as this version builds it ({details})",
            where=weights_path,
            remedy="Use the version of segkit that wrote it",
        ) from error
    return network.to(device).eval()


def build_network(card: ModelCard) -> nn.Module:
    """The network a card describes, with fresh weights."""
    network = card.network
    return build_model(
        network.family,
        in_channels=network.in_channels,
        out_channels=network.out_channels,
        dims=card.dims,
        size=network.size,
        **network.arguments,
    )


_INNER_KEYS = ("state_dict", "network_weights", "model_state_dict", "model")
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")


def load_weights_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a weight file by name, on the CPU: safetensors, or a torch file read without running its code.

    Of files that hold more than weights (nnU-Net's `state_dict` and `network_weights`, plain trainers' `model`) the
    weights are taken; prefixes that wrappers add (`module.`, `_orig_mod.`) are dropped.

    Raises:
        CheckpointError: missing, damaged, holds no tensors, or could only be read by running code from it.
    """
    if not path.is_file():
        raise CheckpointError("is not a file", where=path, expected="a .safetensors or torch weight file")
    if path.suffix == ".safetensors":
        try:
            return dict(safetensors.torch.load_file(path))
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot be read as safetensors ({error})", where=path) from error
    document = _read_torch(path)
    for key in _INNER_KEYS:
        if isinstance(document, Mapping) and isinstance(document.get(key), Mapping):
            document = document[key]
            break
    if not isinstance(document, Mapping):
        document = {}
    tensors = {_WRAPPERS.sub("", str(name)): value for name, value in document.items() if isinstance(value, Tensor)}
    if not tensors:
        expected = f"a state dict, or one under {', '.join(_INNER_KEYS)}"
        raise CheckpointError("holds no tensors by name", where=path, expected=expected)
    return tensors


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the resume state as `last.ckpt`; the one before becomes `previous.ckpt`.

    Raises:
        TypeError: the state holds something that could not be read back without running code.
        DataError: the folder cannot be written.
    """
    _check_plain(state, "state")
    last = folder / LAST_NAME
    with written_atomically(last) as partial:
        torch.save(dict(state), partial)
        if last.exists():
            last.replace(folder / PREVIOUS_NAME)


def load_state(folder: Path) -> dict[str, Any]:
    """The resume state, tensors on the CPU: `last.ckpt`, or `previous.ckpt` where the last one is damaged.

    Raises:
        CheckpointError: neither is there and whole.
    """
    reasons = []
    for name in (LAST_NAME, PREVIOUS_NAME):
        try:
            state = _read_torch(folder / name)
        except CheckpointError as error:
            reasons.append(f"{name} {error.found}")
            continue
        if not isinstance(state, dict):
            reasons.append(f"{name} is no resume state")
            continue
        if reasons:
            _log.warning("%s: %s; going on from %s", folder, reasons[0], name)
        return state
    found = f"no resume state can be used: {'; '.join(reasons)}"
    raise CheckpointError(found, where=folder, remedy="Start the training afresh")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_tensors(path: Path, weights: Mapping[str, Tensor]) -> None:
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in weights.items():
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        if address in storages:  # safetensors refuses tensors that share memory, such as tied weights
            plain = plain.clone()
        storages.add(address)
        tensors[name] = plain
    path.touch()
    permissions = path.stat().st_mode  # those of ordinary files; safetensors takes all but the owner's away
    safetensors.torch.save_file(tensors, path)
    path.chmod(permissions)


def _harmless_numpy() -> list[Any]:
    """What numpy scalars in other trainers' checkpoints need to be read: makers of plain numbers, no code."""
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    kinds = [type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)]
    return [np.dtype, *kinds, (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]


def _read_torch(path: Path) -> Any:
    """A file of `torch.save`, tensors on the CPU, after its checksums were verified; never runs its code."""
    if not path.is_file():
        raise CheckpointError("is missing", where=path)
    try:
        broken = _broken_part(path)
        if broken is None:
            with torch.serialization.safe_globals(_harmless_numpy()), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # about pickle protocols, ahead of the refusal itself
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "is damaged, or carries code and not only weights; nothing in it was run",
            where=path,
            expected="a file of tensors and plain values",
            remedy="Convert it to safetensors where it was made",
        ) from error
    except Exception as error:  # reading damaged files, torch and zipfile raise whatever they stumble over
        raise CheckpointError(f"is damaged ({type(error).__name__}: {error})", where=path) from error
    raise CheckpointError(f"is damaged (wrong checksum of {broken})", where=path)


def _broken_part(path: Path) -> str | None:
    """The first part whose checksum is wrong: torch does not look, and would load a flipped bit as a weight."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


_PLAIN = (str, int, float, bool, type(None))


def _check_plain(value: object, name: str) -> None:
    if isinstance(value, Mapping) and type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"key {key!r} of {name}")
            _check_plain(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for position, item in enumerate(value):  # type: ignore[arg-type]
            _check_plain(item, f"{name}[{position}]")
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN:
        raise TypeError(f"{name} is {type(value).__name__}: a state holds tensors, numbers, strings, lists and dicts")
