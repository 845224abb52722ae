"""The predictor: a network, its card, and the whole way from files to a mask on the grid of those files.

The network only computes; geometry there and back is the predictor's. Validation during training, the folder runner
and notebooks all go through the same three steps: `prepare`, `slabs`, `decode`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.run_folder import load_card, model_folders, require_segmentation
from segkit.errors import DataError, RequestError, is_memory_error
from segkit.inference.backend_loading import open_backend
from segkit.inference.backends import BACKENDS, Backend, LateBackend
from segkit.inference.decode import (
    Activation,
    Maps,
    decode,
    decode_prepared,
    merged,
    outside_probabilities,
    probabilities,
)
from segkit.inference.postprocessing import agreed_rules, postprocess
from segkit.inference.sliding_window import Slab, WindowPlan, plan_windows, predict_slabs
from segkit.labels import LabelScheme, painted_values, translate, translation
from segkit.preparing.preprocessing import LoadedCase, Preparation, PreparedCase, load_case, prepare
from segkit.preparing.resampling import resampled_shape
from segkit.reading.case import Case, ImageFile
from segkit.reading.geometry import reorientation_to, reoriented_grid
from segkit.reading.layouts.table import find_cases
from segkit.reading.modalities import match_modalities
from segkit.reading.volume import Grid, Volume
from segkit.shapes import Affine, Image, LabelMap

if TYPE_CHECKING:
    import torch

_SMALLEST_WINDOW = 16
"""Voxels along an axis below which a window sees too little to be worth a try."""

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
    """One network with its card."""

    def __init__(
        self, backend: Backend, card: ModelCard, *, uses_tta: bool = False, uses_postprocessing: bool = True
    ) -> None:
        segmentation = require_segmentation(card)
        self.backend = backend
        self.card = card
        self.uses_tta = uses_tta
        self.rules = segmentation.postprocessing if uses_postprocessing else None
        self.scheme = card.scheme()
        self.activation: Activation = segmentation.activation
        self.segmentation = segmentation
        self.window = card.patch_size
        self._reopen: Callable[[tuple[int, ...]], Backend] | None = None

    @classmethod
    def load(
        cls,
        run_dir: str | os.PathLike[str] | Sequence[Path],
        device: torch.device | str = "cpu",
        backend: str = "torch",
        *,
        threads: int | None = None,
        uses_tta: bool = False,
        uses_postprocessing: bool = True,
    ) -> Predictor:
        """The predictor of a run folder or an export; of several, or of a cross-validation, their ensemble.

        Without `uses_postprocessing`, masks stay as the network gives them, whatever rules training chose. On a CPU
        the network is computed with `threads`; None is as many as there are cores.

        Raises:
            CheckpointError: a model is missing or damaged.
            RequestError: unknown backend or device, models that paint no masks or do not belong together.
        """
        if backend not in BACKENDS:
            raise RequestError(f"backend {backend!r} is not known", expected=f"one of {', '.join(BACKENDS)}")
        paths = [Path(run_dir)] if isinstance(run_dir, (str, os.PathLike)) else list(run_dir)
        folders = [folder for path in paths for folder in model_folders(path)]
        cards = [load_card(folder) for folder in folders]
        for card, folder in zip(cards, folders, strict=True):
            require_segmentation(card, folder)
        check_agreement(cards, folders)
        members = []
        for folder, card in zip(folders, cards, strict=True):
            reopen = functools.partial(open_backend, folder, card, str(device), backend, threads=threads)
            window, opened = _opened(reopen, card, card.patch_size)
            member = Predictor(opened, card, uses_tta=uses_tta, uses_postprocessing=uses_postprocessing)
            member.window, member._reopen = window, None if card.export is not None else reopen
            members.append(member)
        return members[0] if len(members) == 1 else Ensemble(members)

    def __getstate__(self) -> dict[str, Any]:
        """All but the way to smaller windows: they are decided here, that masks are the same wherever they are made."""
        return {**self.__dict__, "_reopen": None}

    @property
    def digests(self) -> list[str]:
        """SHA-256 of each weight file in use."""
        return [self.card.sha256]

    @property
    def identity(self) -> str:
        """Tells one way of predicting from another: short digests of the weights, mirroring, rules left out."""
        parts = sorted(digest[:16] for digest in self.digests)
        parts += ["tta"] * self.uses_tta
        parts += ["unprocessed"] * (self.rules is None and self.segmentation.postprocessing is not None)
        return "+".join(parts)

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
        slabs, planes = self.slabs(prepared), None
        if with_probabilities:
            maps = Maps(prepared.preparation, len(self.card.outputs))
            slabs = self._noted(slabs, maps)
        labels = self.decode(slabs, prepared.preparation, scheme)
        if with_probabilities:
            planes = np.stack(list(maps.arrays(outside_probabilities(len(self.card.outputs), self.activation))))
        return Prediction(labels, loaded.grid, scheme or self.scheme, planes)

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
        return prepare(loaded, self.card.preprocessing)

    def shrink(self) -> bool:
        """Go on with windows of half the size along their longest axis, which take less memory; False at the end.

        Networks that normalise over a window give slightly other logits so.
        """
        window = _smaller(self.window, self.card)
        if self._reopen is None or window is None:
            return False
        # While it waits to be opened again it takes no memory, which is wanted now.
        self.backend = LateBackend(
            functools.partial(self._reopen, self.window), self.backend.name, self.backend.threads
        )
        try:
            self.window, self.backend = _opened(self._reopen, self.card, window)
        except Exception as error:
            if is_memory_error(error):
                return False
            raise
        return True

    def prepared_shape(self, grid: Grid) -> tuple[int, ...]:
        """Voxels per axis of a case of this grid once it is prepared, if nothing is cropped."""
        turned = reoriented_grid(grid, reorientation_to(grid, self.card.preprocessing.orientation))
        return resampled_shape(turned.shape, turned.spacing_mm, self.card.preprocessing.spacing_mm)

    def plan(self, shape: Sequence[int], axis: int | None = None) -> WindowPlan:
        """The windows over a prepared volume (*spatial)."""
        return plan_windows(shape, self.window, self.card.overlap, axis)

    def slabs(self, prepared: PreparedCase, axis: int | None = None) -> Iterator[Slab]:
        """Logits (K, *prepared) float32, slab by slab along `axis` (None: where slabs are smallest)."""
        image = np.asarray(prepared.image, np.float32)
        plan = self.plan(image.shape[1:], axis)
        return predict_slabs(self.backend, image, plan, mirror_axes=self.mirror_axes())

    def decode(self, slabs: Iterable[Slab], preparation: Preparation, scheme: LabelScheme | None = None) -> LabelMap:
        """Label map (*source) uint8 on the grid of the input, in the values of `scheme` (default: training)."""
        scheme = scheme or self.scheme
        if self.rules is None:
            return decode(slabs, preparation, self.activation, self.values(scheme))
        labels = decode(slabs, preparation, self.activation, self.values(self.scheme))
        spacing_mm = preparation.source_grid.spacing_mm
        labels = postprocess(labels, spacing_mm, self.card.outputs, self.rules)
        return labels if scheme == self.scheme else translate(labels, self.scheme, scheme)

    def label_prepared(self, prepared: PreparedCase) -> LabelMap:
        """Label map (*prepared) uint8 on the grid that the network works on, in the values of the training data."""
        shape = prepared.image.shape[1:]
        return decode_prepared(self.slabs(prepared), shape, self.activation, self.values(self.scheme))

    def values(self, scheme: LabelScheme) -> tuple[int, ...]:
        """What each output paints in the values of `scheme`."""
        return tuple(painted_values(self.card.outputs, self.scheme, scheme))

    def can_paint(self, scheme: LabelScheme) -> bool:
        """Whether `scheme` has a value for every tissue that this model paints."""
        table = translation(self.scheme, scheme)
        return all(table[output.label] for output in self.card.outputs if output.label)

    def _noted(self, slabs: Iterator[Slab], maps: Maps) -> Iterator[Slab]:
        for slab in slabs:
            maps.add(probabilities(slab.logits, self.activation), slab)
            yield slab

    def mirror_axes(self) -> tuple[int, ...]:
        """The axes of *spatial along which inputs are mirrored and logits averaged; none without `uses_tta`."""
        if not self.uses_tta:
            return ()
        trained = self.segmentation.mirror_axes
        return tuple(range(self.card.dims)) if trained is None else trained

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
    """Several networks for one task: the mean of their probabilities, slab by slab."""

    def __init__(self, members: Sequence[Predictor]) -> None:
        first = members[0]
        super().__init__(first.backend, first.card, uses_tta=first.uses_tta)
        self.members = tuple(members)
        self.rules = agreed_rules([member.rules for member in members], self.card.outputs)

    @property
    def digests(self) -> list[str]:
        """SHA-256 of each member's weight file."""
        return [member.card.sha256 for member in self.members]

    def shrink(self) -> bool:
        """Shrink the windows of every member; False where one of them cannot."""
        shrunk = [member.shrink() for member in self.members]  # all of them, whatever the first says
        return all(shrunk)

    def slabs(self, prepared: PreparedCase, axis: int | None = None) -> Iterator[Slab]:
        """Logits (K, *prepared) of the mean probability of all members, with their disagreement."""
        if axis is None:
            axis = self.plan(prepared.image.shape[1:]).axis
        return merged([member.slabs(prepared, axis) for member in self.members], self.activation)


def members_of(predictor: Predictor) -> tuple[Predictor, ...]:
    """The predictors of single networks that a predictor consists of."""
    return predictor.members if isinstance(predictor, Ensemble) else (predictor,)


def _opened(
    reopen: Callable[[tuple[int, ...]], Backend], card: ModelCard, window: tuple[int, ...]
) -> tuple[tuple[int, ...], Backend]:
    """The backend of a model with windows of this size, or with smaller ones where memory is too short for it."""
    while True:
        try:
            return window, reopen(window)
        except Exception as error:
            smaller = _smaller(window, card)
            if not is_memory_error(error) or smaller is None:
                raise
            window = smaller


def _smaller(window: tuple[int, ...], card: ModelCard) -> tuple[int, ...] | None:
    """A window of half the size along its longest axis, of which a network may still make sense."""
    axis = max(range(len(window)), key=window.__getitem__)
    unit = card.divisor[axis]
    length = window[axis] // 2 // unit * unit
    if length < max(unit, _SMALLEST_WINDOW):
        return None
    return (*window[:axis], length, *window[axis + 1 :])


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
        found, expected = card.to_json(), cards[0].to_json()
        different = [key for key in _SHARED_BY_MEMBERS if found[key] != expected[key]]
        if different:
            raise RequestError(
                f"differs from {names[0]} in {', '.join(different)}",
                where=str(name),
                expected="models of one ensemble that prepare and paint alike, such as the folds of one training",
                remedy="Run the models one by one, each with its own output folder",
            )
