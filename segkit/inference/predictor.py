"""The predictor: a network, its card, and the whole way from files to a mask on the grid of those files.

The network only computes; geometry there and back is the predictor's. Validation during training, the folder runner
and notebooks all go through the same three steps: prepare, `predict_prepared`, `decode`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from segkit.checkpoint import ModelCard, load_card, load_model, model_folders
from segkit.data.case import BRATS_MODALITIES, Case, ImageFile
from segkit.data.layouts.modality import canonical_modality
from segkit.data.layouts.table import find_cases
from segkit.data.preprocessing import LoadedCase, Preparation, PreparedCase, load_case, prepare
from segkit.data.volume import Grid, Volume
from segkit.errors import DataError, RequestError
from segkit.inference.decode import Activation, decode, mean_logits, probability_planes
from segkit.inference.windows import predict_logits
from segkit.labels import LabelScheme, painted_values, translation
from segkit.runtime import pick_device
from segkit.shapes import Affine, Image, LabelMap

BACKENDS = ("auto", "torch")

_UNSPECIFIC = ("image", "mr", "mri")
"""Modalities of a model that say nothing of the sequence."""

Scan: TypeAlias = Volume | str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]
"""One case: a volume in memory, a path to it (file or case folder), or paths by modality name."""


@dataclass(frozen=True)
class Prediction:
    """A mask on the grid of the input: labels (*source) uint8 in the values of `label_scheme`.

    `probabilities` (K, *source) float32 in 0..1, one plane per output of the card, where they were asked for.
    """

    labels: LabelMap = field(repr=False)
    grid: Grid
    label_scheme: LabelScheme
    probabilities: Image | None = field(default=None, repr=False)

    @property
    def affine(self) -> Affine:
        """Voxel indices of `labels` to millimetres in RAS+ world space, (4, 4)."""
        return self.grid.affine


class Predictor:
    """One network with its card, on one device."""

    def __init__(
        self, network: nn.Module, card: ModelCard, device: torch.device | str = "cpu", *, uses_tta: bool = False
    ) -> None:
        if card.activation is None or card.label_scheme is None:
            raise RequestError(
                f"this is a {card.task} model, which paints no masks",
                expected="a model of `segkit train`",
                remedy="Give its encoder to `segkit train --weights`, or fill holes with `segkit inpaint`"
                if card.task != "segmentation"
                else "Its model.json lacks `activation` or `label_scheme`: train again",
            )
        self.network = network
        self.card = card
        self.device = torch.device(device)
        self.uses_tta = uses_tta
        self.scheme = card.scheme()
        self.activation: Activation = card.activation

    @classmethod
    def load(
        cls,
        run_dir: str | os.PathLike[str] | Sequence[Path],
        device: torch.device | str = "cpu",
        backend: str = "torch",
        *,
        uses_tta: bool = False,
    ) -> Predictor:
        """The predictor of a run folder; of several, or of a cross-validation, their ensemble.

        Raises:
            CheckpointError: a model is missing or damaged.
            RequestError: unknown backend or device, or models that do not belong together.
        """
        if backend not in BACKENDS:
            raise RequestError(f"backend {backend!r} is not known", expected=f"one of {', '.join(BACKENDS)}")
        torch_device = pick_device(str(device))
        paths = [Path(run_dir)] if isinstance(run_dir, (str, os.PathLike)) else list(run_dir)
        folders = [folder for path in paths for folder in model_folders(path)]
        cards = [load_card(folder) for folder in folders]
        check_agreement(cards, folders)
        members = [
            Predictor(load_model(folder, torch_device), card, torch_device, uses_tta=uses_tta)
            for folder, card in zip(folders, cards, strict=True)
        ]
        return members[0] if len(members) == 1 else Ensemble(members)

    @property
    def digests(self) -> list[str]:
        """SHA-256 of each weight file in use."""
        return [self.card.sha256]

    @property
    def identity(self) -> str:
        """Tells one way of predicting from another: short digests of the weights, and whether mirroring is on."""
        return "+".join(sorted(digest[:16] for digest in self.digests)) + ("+tta" if self.uses_tta else "")

    def __call__(self, scan: Scan, *, with_probabilities: bool = False) -> Prediction:
        """Segment one case, in the label scheme of the training data.

        Raises:
            DataError: the files cannot be read or are not what the network was trained on.
        """
        return self.predict_loaded(self._load(scan), with_probabilities=with_probabilities)

    def predict_loaded(
        self, loaded: LoadedCase, scheme: LabelScheme | None = None, *, with_probabilities: bool = False
    ) -> Prediction:
        """Segment one case already in memory, in the values of `scheme` (default: that of the training data)."""
        prepared = self.prepare(loaded)
        logits = self.predict_prepared(prepared)
        labels = self.decode(logits, prepared.preparation, scheme)
        probabilities = None
        if with_probabilities:
            planes = probability_planes(logits, prepared.preparation, self.activation)
            probabilities = np.stack(list(planes))
        return Prediction(labels, loaded.grid, scheme or self.scheme, probabilities)

    def prepare(self, loaded: LoadedCase) -> PreparedCase:
        """Orient, crop, normalise and resample one case as the training did.

        Raises:
            DataError: a picture for a network of volumes, or the reverse.
        """
        if loaded.grid.dims != self.card.dims:
            kinds = {2: "a picture", 3: "a volume"}
            raise DataError(
                f"is {kinds.get(loaded.grid.dims, 'neither picture nor volume')}",
                where=loaded.grid.source or loaded.id,
                expected=f"{kinds[self.card.dims]}, as this model was trained on",
                remedy="Choose another model, or convert the images",
            )
        return prepare(loaded, self.card.preprocessing())

    def predict_prepared(self, prepared: PreparedCase) -> Tensor:
        """Logits (K, *prepared) float32 on the CPU; the network's training mode is left as it was found."""
        image = torch.from_numpy(np.require(prepared.image, np.float32, ["C", "W"]))
        with _evaluating(self.network):
            return predict_logits(
                self.network,
                image,
                self.card.patch_size,
                overlap=self.card.overlap,
                batch_size=1 if self.device.type == "cpu" else 2,
                device=self.device,
                mirror_axes=self._mirror_axes(),
            )

    def decode(self, logits: Tensor, preparation: Preparation, scheme: LabelScheme | None = None) -> LabelMap:
        """Label map (*source) uint8 on the grid of the input, in the values of `scheme` (default: training)."""
        values = painted_values(self.card.output_list(), self.scheme, scheme or self.scheme)
        return decode(logits, preparation, self.activation, values)

    def can_paint(self, scheme: LabelScheme) -> bool:
        """Whether `scheme` has a value for every tissue that this model paints."""
        table = translation(self.scheme, scheme)
        return all(table[output.label] for output in self.card.output_list() if output.label)

    def _mirror_axes(self) -> tuple[int, ...]:
        if not self.uses_tta:
            return ()
        return tuple(range(self.card.dims)) if self.card.mirror_axes is None else self.card.mirror_axes

    def _load(self, scan: Scan) -> LoadedCase:
        if isinstance(scan, Volume):
            return self._load_volume(scan)
        if isinstance(scan, Mapping):
            images = {name: ImageFile(Path(path)) for name, path in scan.items()}
            case = Case("case", "case", images)
        else:
            cohort = find_cases(Path(scan))
            if len(cohort.cases) != 1:
                raise DataError(
                    f"holds {len(cohort.cases)} cases", where=Path(scan), expected="one", remedy="Use `segkit infer`"
                )
            case = cohort.cases[0]
        return load_case(match_modalities(case, self.card.modalities), self.card.modalities, None)

    def _load_volume(self, volume: Volume) -> LoadedCase:
        if len(self.card.modalities) != 1:
            wanted = ", ".join(self.card.modalities)
            raise DataError(
                "one volume was given", expected=f"{wanted}", remedy=f"Pass paths by name: {{{wanted!r}: path, ...}}"
            )
        image = np.asarray(volume.array, np.float32)[None]
        if not np.isfinite(image).all():
            raise DataError("the volume holds NaN or infinity", expected="finite intensities")
        return LoadedCase("volume", image, None, volume.grid, (True,))


class Ensemble(Predictor):
    """Several networks for one task: the mean of their probabilities, added up one network at a time."""

    def __init__(self, members: Sequence[Predictor]) -> None:
        first = members[0]
        super().__init__(first.network, first.card, first.device, uses_tta=first.uses_tta)
        self.members = tuple(members)

    @property
    def digests(self) -> list[str]:
        """SHA-256 of each member's weight file."""
        return [member.card.sha256 for member in self.members]

    def predict_prepared(self, prepared: PreparedCase) -> Tensor:
        """Logits (K, *prepared) of the mean probability of all members."""
        return mean_logits((member.predict_prepared(prepared) for member in self.members), self.activation)


_SHARED_BY_MEMBERS = (
    *("task", "dims", "modalities", "spacing_mm", "orientation", "normalisation", "crop"),
    *("ct_window", "ct_mean", "ct_std", "activation", "outputs", "label_scheme"),
)


def check_agreement(cards: Sequence[ModelCard], names: Sequence[object]) -> None:
    """Refuse an ensemble of models that see or paint different things.

    Raises:
        RequestError: two cards differ in what an ensemble must share, all differences named.
    """
    for card, name in zip(cards[1:], names[1:], strict=True):
        different = [key for key in _SHARED_BY_MEMBERS if getattr(card, key) != getattr(cards[0], key)]
        if different:
            raise RequestError(
                f"differs from {names[0]} in {', '.join(different)}",
                where=str(name),
                expected="models of one ensemble that prepare and paint alike, such as the folds of one training",
                remedy="Run the models one by one, each with its own output folder",
            )


def match_modalities(case: Case, wanted: Sequence[str], *, allow_missing: bool = False) -> Case:
    """The case with its images under the names of the model's input channels, reference left out.

    Names are compared as they are, then by what they are called elsewhere (`t1ce` is `t1c`). A model of one modality
    takes the only image of a case whatever its name, unless that is known to be another sequence. Images numbered 0,
    1, 2 ... or channel_0, channel_1 ... (nnU-Net, Decathlon, 4D files) are taken in order where the model's own
    modalities are not among the four of BraTS, whose numbers differ from source to source.

    Raises:
        DataError: a modality is missing (unless `allow_missing` and at least one is there).
    """
    by_name = {_plain_name(name): file for name, file in case.images.items()}
    images = {name: by_name[_plain_name(name)] for name in wanted if _plain_name(name) in by_name}
    if not images and _may_take_in_order(case, wanted):
        images = dict(zip(wanted, case.images.values(), strict=True))
    missing = [name for name in wanted if name not in images]
    if missing and not (allow_missing and images):
        several = len(missing) > 1
        raise DataError(
            f"modalit{'ies' if several else 'y'} {', '.join(missing)} {'are' if several else 'is'} missing"
            f" (found: {', '.join(case.images) or 'no image'})",
            expected=f"{', '.join(wanted)}, as this model was trained on",
            remedy="Add the file" + ("s" if several else "") + ", say which file is which with --modality NAME=SUFFIX"
            + (", or pass --allow-missing to go on without" if images else ""),
        )  # fmt: skip
    return dataclasses.replace(case, images=images, label=None)


def _plain_name(name: str) -> str:
    return canonical_modality(name) or name.casefold()


def _may_take_in_order(case: Case, wanted: Sequence[str]) -> bool:
    if len(case.images) != len(wanted):
        return False
    if len(wanted) == 1:
        (found,) = case.images
        says_nothing = wanted[0].casefold() in _UNSPECIFIC or _is_number(wanted[0])
        return canonical_modality(found) is None or says_nothing
    is_numbered = all(_is_number(name) for name in case.images)
    return is_numbered and not any(name in BRATS_MODALITIES for name in wanted)


def _is_number(name: str) -> bool:
    """Whether a layout found a channel without a name: "0" or "channel_0"."""
    return name.removeprefix("channel_").isdigit()


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
