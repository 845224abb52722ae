"""Load weights into a network with other image channels, other outputs, or the same encoder only.

All else must agree by name and shape; all tensors that fit are loaded, or none. The roles of a network's tensors are
its attributes `input_weights`, `head_prefixes` and `encoder_prefix`, see `segkit.models.table`.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from segkit.checkpoint.model import WeightSource, read_source
from segkit.errors import CheckpointError, some
from segkit.reading.case import plain_name

InputAdapt = Literal["mean", "repeat", "zero"]
"""How kernels are adapted to another number of image channels.

mean: the old kernels in turn, scaled by old over new channels, and their sum for a single new channel: the output for
an image that is the same in every channel stays the same (exactly if one number of channels is a multiple of the
other); repeat: the same unscaled, as in STU-Net's own fine-tuning; zero: the first channels keep their kernels, the
others are zero.
"""
HeadRule = Literal["fit", "skip"]
"""Segmentation heads. fit: loaded where their shape and, where known, the output names agree; skip: never loaded."""


@dataclass(frozen=True)
class LoadReport:
    """What was done with every tensor, with reasons in `notes`.

    `loaded`, `adapted` (to other image channels) and `missing` (unchanged) are all names of the network; `skipped` are
    the unused names of the file.
    """

    loaded: tuple[str, ...]
    adapted: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """The report in one line."""
        adapted = (self.adapted, "adapted to other image channels")
        others = (adapted, (self.skipped, "of the file not used"), (self.missing, "of the network unchanged"))
        parts = [f"{len(names)} {what} ({some(names, 2)})" for names, what in others if names]
        return ", ".join([f"{len(self.loaded)} tensors loaded", *parts]) + "".join(f"; {note}" for note in self.notes)

    __str__ = describe


@dataclass(frozen=True)
class TransferOptions:
    """The options of `load_weights`."""

    input_adapt: InputAdapt = "mean"
    heads: HeadRule = "fit"
    is_strict: bool = True
    source_modalities: Sequence[str] | None = None
    modalities: Sequence[str] | None = None
    outputs: Sequence[str] | None = None


def load_weights(
    model: nn.Module,
    path: Path | str,
    *,
    input_adapt: InputAdapt = "mean",
    heads: HeadRule = "fit",
    is_strict: bool = True,
    source_modalities: Sequence[str] | None = None,
    modalities: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
) -> LoadReport:
    """Load a run folder, a result folder of nnU-Net, a .safetensors file or a torch file into a network, in place.

    A file may hold an encoder only; the rest then keeps its weights.

    Args:
        model: A network of `build_model`, or any other, whose names and shapes must then agree exactly.
        path: The folder or file.
        input_adapt: See `InputAdapt`.
        heads: See `HeadRule`.
        is_strict: Whether every tensor that is neither head nor input kernel must be there in the same shape; else
            those that are not are skipped and reported.
        source_modalities: Names of the channels that the file was trained with; default: those of a folder's card.
        modalities: Names of the channels of `model`. Where both are known and `input_adapt` is "mean", a channel takes
            the kernel of its own modality.
        outputs: Names of the outputs of `model`; heads of a folder with other outputs are skipped.

    Raises:
        CheckpointError: the file is missing, damaged or unsafe, or does not fit; `model` is not changed.
    """
    options = TransferOptions(input_adapt, heads, is_strict, source_modalities, modalities, outputs)
    return transfer(model, read_source(Path(path)), options)


def transfer(model: nn.Module, source: WeightSource, options: TransferOptions | None = None) -> LoadReport:
    """Load weights into a network, in place; see `load_weights`."""
    report, tensors = plan_transfer(model, source, options)
    state = model.state_dict()
    if any(state[name].is_meta for name in tensors):
        raise ValueError("the network is on the meta device and holds no weights: build it on another")
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    return report


def plan_transfer(
    model: nn.Module, source: WeightSource, options: TransferOptions | None = None
) -> tuple[LoadReport, dict[str, Tensor]]:
    """The report of `transfer`, and the tensors to copy by their names in the network.

    Raises:
        CheckpointError: the weights do not fit.
    """
    work = _Transfer(model, source, options or TransferOptions())
    names = match_names(source.tensors, work.wanted, work.encoder_prefix)
    found = {names[name]: tensor for name, tensor in source.tensors.items() if names[name] in work.wanted}
    is_encoder = bool(work.encoder_prefix) and all(name.startswith(work.encoder_prefix) for name in found)
    work.leave_out([name for name in source.tensors if names[name] not in work.wanted], is_encoder=is_encoder)
    work.take_heads({name: tensor for name, tensor in found.items() if work.is_head(name)})
    for name, tensor in found.items():
        if not work.is_head(name):
            work.take(name, tensor)
    absent = [name for name in work.wanted if name not in found and work.must_be_there(name, is_encoder=is_encoder)]
    work.require_fit(absent)
    if is_encoder:
        work.notes.insert(0, "the file holds an encoder")
    in_file = {new: old for old, new in names.items()}
    report = LoadReport(
        loaded=tuple(name for name in work.taken if name not in work.adapted),
        adapted=tuple(work.adapted),
        skipped=(*work.skipped, *work.unknown, *(in_file[name] for name in (*work.headless, *work.misshapen))),
        missing=tuple(name for name in work.wanted if name not in work.taken),
        notes=tuple(dict.fromkeys(work.notes)),
    )
    return report, work.taken


@dataclass
class _Transfer:
    """The tensors of a file, sorted by what is done with them.

    Names are those of the network, in `skipped` (known parts of other networks) and `unknown` those of the file.
    """

    model: nn.Module
    source: WeightSource
    options: TransferOptions
    taken: dict[str, Tensor] = field(default_factory=dict)
    adapted: list[str] = field(default_factory=list)
    headless: list[str] = field(default_factory=list)
    misshapen: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wanted: Mapping[str, Tensor] = self.model.state_dict()
        # A network without these attributes takes files whose tensors all agree.
        self.input_weights: Sequence[str] = getattr(self.model, "input_weights", ())
        self.head_prefixes: tuple[str, ...] = tuple(getattr(self.model, "head_prefixes", ()))
        self.encoder_prefix: str = getattr(self.model, "encoder_prefix", "")

    def is_head(self, name: str) -> bool:
        return name.startswith(self.head_prefixes)

    def must_be_there(self, name: str, *, is_encoder: bool) -> bool:
        """False for heads, for tensors outside an encoder, and for batch counts, which old torch did not save."""
        is_counter = name.endswith(".num_batches_tracked")
        is_beyond = is_encoder and not name.startswith(self.encoder_prefix)
        return not (self.is_head(name) or is_counter or is_beyond)

    def leave_out(self, names: Iterable[str], *, is_encoder: bool) -> None:
        """Sort names that the network does not have: heads and known parts of encoder files are skipped."""
        for name in names:
            part = other_part(name) if is_encoder else None
            if part is not None:
                self.notes.append(part)
            (self.skipped if part is not None or self.is_head(name) else self.unknown).append(name)

    def take_heads(self, heads: Mapping[str, Tensor]) -> None:
        """Take heads that fit, each layer as a whole: a bias is useless without its weight."""
        trained = [output.name for output in self.source.card.outputs] if self.source.card else []
        wanted = self.options.outputs
        reason = "as requested" if self.options.heads == "skip" else None
        if reason is None and trained and wanted is not None and list(wanted) != trained:
            reason = f"the outputs of the file are {some(trained)}, not {some(wanted)}"
        layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in heads.items():
            layers[name.rpartition(".")[0]][name] = tensor
        for layer in layers.values():
            if reason is None and all(tensor.shape == self.wanted[name].shape for name, tensor in layer.items()):
                self.taken |= layer
            else:
                self.headless += layer
        if self.headless:
            self.notes.append(f"heads not loaded: {reason or 'their shapes differ'}")

    def take(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; input kernels are adapted to the image channels of the network."""
        wanted = self.wanted[name]
        kernels = [(kernel.dim(), kernel.shape[:1], kernel.shape[2:]) for kernel in (tensor, wanted)]
        if name in self.input_weights and wanted.dim() > 1 and kernels[0] == kernels[1]:
            made = self._for_channels(tensor, wanted.shape[1])
            if made is not tensor:
                self.adapted.append(name)
            tensor = made
        if tensor.shape == wanted.shape and tensor.is_floating_point() == wanted.is_floating_point():
            self.taken[name] = tensor
        else:
            self.misshapen[name] = f"{name}: {_kind(tensor)} in the file, {_kind(wanted)} in the network"

    def _for_channels(self, tensor: Tensor, channels: int) -> Tensor:
        before, after = self.options.source_modalities, self.options.modalities
        if before is None and self.source.card is not None:
            before = self.source.card.modalities
        if before is not None and after is not None and self.options.input_adapt == "mean":
            are_alike = [plain_name(name) for name in before] == [plain_name(name) for name in after]
            are_of_channels = (len(before), len(after)) == (tensor.shape[1], channels)
            by_name = adapt_by_modality(tensor, before, after) if are_of_channels and not are_alike else None
            if by_name is not None:
                self.notes.append(f"channels {some(after)} taken from {some(before)} by name")
                return by_name
        return tensor if tensor.shape[1] == channels else adapt_channels(tensor, channels, self.options.input_adapt)

    def require_fit(self, absent: Sequence[str]) -> None:
        """Refuse weights of another network: nothing fits or, if strict, not everything does."""
        kinds = (
            ("missing from the file", absent, some(absent)),
            ("unknown to the network", self.unknown, some(self.unknown)),
            ("of another shape", self.misshapen, some(self.misshapen.values(), 2)),
        )
        complaints = [f"tensors {what}: {len(names)} ({shown})" for what, names, shown in kinds if names]
        if self.taken and not (self.options.is_strict and complaints):
            self.notes += complaints
            return
        remedy = (
            "Choose the network.family and network.size that it was trained as, see `segkit models` "
            "(network.weights_share below 1, in Python is_strict=False, takes what fits)"
        )
        if self.source.card is not None:
            network = self.source.card.network
            size = [f"size {network.size}"] if network.size else []
            arguments = [f"{name}={value}" for name, value in network.arguments.items()]
            remedy = f"Build the network that it was trained as: {', '.join([network.family, *size, *arguments])}"
        found = f"does not fit {type(self.model).__name__}: {'; '.join(complaints) or 'it holds heads only'}"
        raise CheckpointError(found, where=self.source.file, remedy=remedy)


def _kind(tensor: Tensor) -> str:
    shape = " x ".join(str(size) for size in tensor.shape) or "a single number"
    return shape if tensor.is_floating_point() else f"{shape} of {str(tensor.dtype).removeprefix('torch.')}"


def adapt_channels(weight: Tensor, channels: int, rule: InputAdapt) -> Tensor:
    """Kernels (outputs, old, *kernel) adapted to image channels: (outputs, channels, *kernel)."""
    old = weight.shape[1]
    if rule == "zero":
        added = weight.new_zeros(weight.shape[0], max(channels - old, 0), *weight.shape[2:])
        return torch.cat([weight[:, :channels], added], dim=1)
    if rule == "mean" and channels == 1:
        return weight.sum(1, keepdim=True)
    in_turn = torch.cat([weight] * -(-channels // old), dim=1)[:, :channels]
    return in_turn if rule == "repeat" else in_turn * (old / channels)


def adapt_by_modality(weight: Tensor, before: Sequence[str], after: Sequence[str]) -> Tensor | None:
    """Kernels (outputs, len(before), *kernel) for channels named `after`; None if they have no modality in common.

    A channel takes the kernel of its modality (`t1ce` is `t1c`), else the mean of all kernels.
    """
    known = {plain_name(name): channel for channel, name in enumerate(before)}
    if not any(plain_name(name) in known for name in after):
        return None
    mean = weight.mean(1)
    channels = [known.get(plain_name(name)) for name in after]
    return torch.stack([mean if channel is None else weight[:, channel] for channel in channels], dim=1)


_PREFIXES = ("", "image_encoder.", "encoder.", "backbone.")
"""Prefixes of an encoder's names in files of an encoder, or of a network with another kind of decoder."""

_OTHER_PARTS = {
    "fc.": "the classifier that it was trained with",
    "head.": "the classifier that it was trained with",
    "prompt_encoder.": "SAM's prompt encoder",
    "mask_decoder.": "SAM's mask decoder",
    "pos_embed": "a table of positions, which this encoder does not use",
}
"""Prefix of a name beside the encoder in encoder files, and what it is."""


def match_names(file: Collection[str], network: Collection[str], encoder_prefix: str) -> dict[str, str]:
    """Match checkpoint keys to model keys: unchanged or, for encoder files, below `encoder_prefix`.

    Of the possible prefixes, that with most matches is used; keys without a match stay unchanged.
    """
    known = set(network)
    readings: list[dict[str, str]] = [{name: name for name in file}]
    for prefix in _PREFIXES if encoder_prefix else ():
        below = {name: encoder_prefix + name.removeprefix(prefix) for name in file if name.startswith(prefix)}
        readings.append({name: below[name] if below.get(name) in known else name for name in file})
    return max(readings, key=lambda reading: sum(name in known for name in reading.values()))


def other_part(name: str) -> str | None:
    """What a tensor beside the encoder belongs to, as a sentence; None if unknown."""
    plain = min((name.removeprefix(prefix) for prefix in _PREFIXES), key=len)
    known = (f"{part.rstrip('.')} is {what}" for part, what in _OTHER_PARTS.items() if plain.startswith(part))
    return next(known, None)
