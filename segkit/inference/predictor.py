"""A network with its card, and the steps from the images of a case to a mask on their grid.

`read_case` reads and prepares, `slabs` computes logits, `decode` paints the mask; calling the predictor does all of it.
The folder runner, notebooks, export and validation use the same steps. Predictors are immutable.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from segkit.checkpoint.card import ModelCard, PostprocessingCard, SegmentationCard
from segkit.checkpoint.run_folder import check_agreement, load_card, model_folders, require_segmentation
from segkit.errors import DataError, RequestError, is_memory_error
from segkit.inference.backend_loading import open_backend, open_with_room, smaller_window
from segkit.inference.backends import BACKENDS, Backend, ReopenableBackend
from segkit.inference.decode import (
    Maps,
    decode,
    decode_prepared,
    merged,
    outside_probabilities,
    probabilities,
    uncertainty,
)
from segkit.inference.postprocessing import agreed_rules, postprocess
from segkit.inference.scans import Prediction, Scan, read_scan
from segkit.inference.sliding_window import Slab, WindowPlan, plan_windows, predict_slabs
from segkit.labels import LabelScheme, painted_values, translate, translation
from segkit.preparing.preprocessing import LoadedCase, Preparation, PreparedCase, load_case, prepare
from segkit.preparing.resampling import resampled_shape
from segkit.reading.case import Case, match_modalities
from segkit.reading.geometry import reorientation_to, reoriented_grid
from segkit.reading.volume import Grid
from segkit.shapes import LabelMap

if TYPE_CHECKING:
    import torch

Stage: TypeAlias = Callable[[str], AbstractContextManager[object]]
"""Called with the name of a stage (read, preprocess, predict, decode), gives the context that it runs in: a clock."""

UNCERTAINTIES = ("entropy", "disagreement")
"""The maps of `uncertainty`, in order."""


@dataclass(frozen=True, eq=False)
class Predictor:
    """One network with its card; raises RequestError where the card is not that of a segmentation model."""

    backend: Backend
    card: ModelCard
    _: KW_ONLY
    keeps_values: ClassVar[bool] = False
    """Whether masks have the values of the training data, in whatever layout the scans are."""
    resamples_logits: ClassVar[bool] = False
    """Whether probabilities are those of resampled logits, rather than resampled themselves."""
    uses_tta: bool = False
    """Average over mirrored inputs."""
    uses_postprocessing: bool = True
    """Apply the rules that training chose to the masks."""
    window: tuple[int, ...] = ()
    """Voxels of a window; by default the patch of the card."""
    reopen: Callable[[tuple[int, ...]], Backend] | None = field(default=None, repr=False)
    """Opens the network for windows of another size; None where there is only this one."""

    def __post_init__(self) -> None:
        require_segmentation(self.card)
        object.__setattr__(self, "window", self.window or self.card.patch_size)

    @classmethod
    def load(
        cls,
        run_dir: str | os.PathLike[str] | Sequence[Path],
        device: torch.device | str = "cpu",
        backend: str = "torch",
        *,
        threads: int | None = None,
        uses_tta: bool | None = None,
        uses_postprocessing: bool = True,
    ) -> Predictor:
        """The predictor of a run folder, an export or a MONAI bundle; of several, or of all folds, their ensemble.

        `threads` are those of a CPU; None is one for each core. `uses_tta` None mirrors as nnU-Net does for its models,
        and not for others.

        Raises:
            CheckpointError: a model is missing or damaged.
            RequestError: unknown backend or device, models that paint no masks or do not belong together.
        """
        if backend not in BACKENDS:
            raise RequestError(f"backend {backend!r} is not known", expected=f"one of {', '.join(BACKENDS)}")
        paths = [Path(run_dir)] if isinstance(run_dir, (str, os.PathLike)) else run_dir
        models = [(folder, load_card(folder)) for path in paths for folder in model_folders(path)]
        for folder, card in models:
            require_segmentation(card, folder)
        check_agreement([card for _, card in models], [folder for folder, _ in models])
        kind, options = Predictor, {"uses_tta": bool(uses_tta), "uses_postprocessing": uses_postprocessing}
        if models[0][1].nnunet is not None:
            from segkit.inference.nnunet import NnUnetPredictor, nnunet_options

            kind = NnUnetPredictor
            load = functools.partial(cls.load, device=device, backend=backend, threads=threads, uses_tta=uses_tta)
            options |= nnunet_options(*models[0], load, uses_tta)
        elif any(card.bundle is not None for _, card in models):
            from segkit.inference.bundle import BundlePredictor, require_alone

            require_alone([folder for folder, _ in models], uses_tta=bool(uses_tta))
            kind = BundlePredictor
        members = []
        for folder, card in models:
            reopen = functools.partial(open_backend, folder, card, str(device), backend, threads=threads)
            window, opened = open_with_room(reopen, card, card.patch_size)
            member = kind(opened, card, window=window, reopen=reopen, **options)
            members.append(member if card.export is None else replace(member, backend=opened.opened, reopen=None))
        return members[0] if len(members) == 1 else members[0].ensemble(members)

    def ensemble(self, members: Sequence[Predictor]) -> Predictor:
        """The ensemble of this predictor and others of its kind."""
        return Ensemble.of(members)

    def __getstate__(self) -> dict[str, Any]:
        """All but `reopen`: windows are chosen where the model was loaded, so that masks are the same anywhere."""
        return {**self.__dict__, "reopen": None}

    @property
    def members(self) -> tuple[Predictor, ...]:
        """The predictors of single networks that this one consists of."""
        return (self,)

    @property
    def dims(self) -> int:
        """Axes of the images: 3 for volumes, 2 for pictures."""
        return self.card.dims

    @functools.cached_property
    def scheme(self) -> LabelScheme:
        """The label scheme of the training data."""
        return self.card.scheme()

    def match(self, case: Case, *, allow_missing: bool = False) -> Case:
        """See `segkit.reading.case.match_modalities`."""
        return match_modalities(case, self.card.modalities, allow_missing=allow_missing)

    @property
    def segmentation(self) -> SegmentationCard:
        """The part of the card that says how masks are made."""
        return require_segmentation(self.card)

    @property
    def rules(self) -> PostprocessingCard | None:
        """The postprocessing rules in use."""
        return self.segmentation.postprocessing if self.uses_postprocessing else None

    @property
    def digests(self) -> list[str]:
        """SHA-256 of each weight file in use."""
        return [member.card.sha256 for member in self.members]

    @property
    def identity(self) -> str:
        """What masks depend on: digests of the weights, mirroring of inputs, use of the rules."""
        parts = sorted(digest[:16] for digest in self.digests)
        parts += ["tta"] * self.uses_tta
        parts += ["unprocessed"] * (self.rules is None and self.segmentation.postprocessing is not None)
        return "+".join(parts)

    def with_backends(self, change: Callable[[Backend], Backend]) -> Predictor:
        """The same predictor computed by `change(backend)`, for this window size only."""
        return replace(self, backend=change(self.backend), reopen=None)

    def with_smaller_window(self) -> Predictor | None:
        """The same with windows of half the size along their longest axis, for less memory; None if there are none.

        The network of this predictor is released and opened again if it is used again. Networks that normalise over a
        window give slightly different logits with another size.
        """
        window = smaller_window(self.window, self.card)
        if self.reopen is None or window is None:
            return None
        if isinstance(self.backend, ReopenableBackend):
            self.backend.release()
        try:
            window, backend = open_with_room(self.reopen, self.card, window)
        except Exception as error:
            if is_memory_error(error):
                return None
            raise
        return replace(self, window=window, backend=backend)

    def __call__(self, scan: Scan, *, affine: ArrayLike | None = None, with_probabilities: bool = False) -> Prediction:
        """Segment one case, in the label scheme of the training data.

        Args:
            scan: A path, an image in memory, or a dict of these by modality name: `segkit.inference.scans.read_scan`
                describes what is accepted, with axis orders.
            affine: That of arrays without their own, (4, 4), from voxel indices to millimetres in RAS+ world space.
            with_probabilities: Also keep the probability of each output.

        Raises:
            DataError: the scan cannot be read or used, or is not what the network was trained on.
        """
        loaded = read_scan(scan, affine, self.card.modalities, self.dims, self.match)
        return self.predict_prepared(self.prepare(loaded), with_probabilities=with_probabilities)

    def predict_loaded(self, loaded: LoadedCase, scheme: LabelScheme | None = None) -> Prediction:
        """`prepare`, then `predict_prepared`."""
        return self.predict_prepared(self.prepare(loaded), scheme)

    def predict_prepared(
        self,
        prepared: PreparedCase,
        scheme: LabelScheme | None = None,
        *,
        with_probabilities: bool = False,
        with_uncertainty: bool = False,
        stage: Stage = nullcontext,
    ) -> Prediction:
        """Segment a prepared case, in the values of `scheme` (default: that of the training data)."""
        activation = self.segmentation.activation
        outside = outside_probabilities(len(self.card.outputs), activation)
        late = activation if self.resamples_logits else None
        probability_maps = Maps(prepared.preparation, outside, late) if with_probabilities else None
        uncertainty_maps = Maps(prepared.preparation, (0,) * len(UNCERTAINTIES)) if with_uncertainty else None

        def computed() -> Iterator[Slab]:
            slabs = self.slabs(prepared)
            while True:
                with stage("predict"):
                    slab = next(slabs, None)
                if slab is None:
                    return
                if probability_maps is not None:
                    planes = slab.logits if late else probabilities(slab.logits, activation)
                    probability_maps.add(planes, slab)
                if uncertainty_maps is not None:
                    uncertainty_maps.add(uncertainty(slab, activation), slab)
                yield slab

        with stage("decode"):
            labels = self.decode(computed(), prepared.preparation, scheme)
        grid = prepared.preparation.source_grid
        return Prediction(labels, grid, scheme or self.scheme, probability_maps, uncertainty_maps)

    def read_case(
        self, case: Case, *, allow_missing: bool = False, uses_threads: bool = True, stage: Stage = nullcontext
    ) -> PreparedCase:
        """Read and prepare the files of a case, named as `match_modalities` does; see `load_case`.

        Raises:
            DataError: the files cannot be read or are not what the network was trained on.
        """
        with stage("read"):
            loaded = load_case(case, self.card.modalities, None, allow_missing=allow_missing, uses_threads=uses_threads)
        with stage("preprocess"):
            return self.prepare(loaded)

    def prepare(self, loaded: LoadedCase) -> PreparedCase:
        """Orient, crop, normalise and resample one case as the training did.

        Raises:
            DataError: a picture for a network of volumes, or the reverse.
        """
        if loaded.grid.dims != self.dims:
            kinds = {2: "a picture", 3: "a volume"}
            found = f"is {kinds.get(loaded.grid.dims, 'neither picture nor volume')}"
            expected = f"{kinds[self.dims]}, as this model was trained on"
            remedy = "Choose another model, or convert the images"
            raise DataError(found, where=loaded.grid.source or loaded.id, expected=expected, remedy=remedy)
        return self._prepared(loaded)

    def _prepared(self, loaded: LoadedCase) -> PreparedCase:
        return prepare(loaded, self.card.preprocessing)

    def prepared_shape(self, grid: Grid) -> tuple[int, ...]:
        """Voxels per axis of a case of this grid once it is prepared, if nothing is cropped."""
        turned = reoriented_grid(grid, reorientation_to(grid, self.card.preprocessing.orientation))
        return resampled_shape(turned.shape, turned.spacing_mm, self.card.preprocessing.spacing_mm)

    def preparing_bytes(self, shape: Sequence[int], grid: Grid) -> int:
        """Memory of `prepare` for a case of this grid, prepared to `shape`, beyond the loaded image."""
        return 4 * len(self.card.modalities) * prod(shape) + 9 * prod(grid.shape)

    def restoring_bytes(self, shape: Sequence[int], grid: Grid) -> int:
        """Memory of what `slabs` returns for a case of this grid, prepared to `shape`, beyond a row of windows."""
        return 0

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
        painted = scheme if self.rules is None else self.scheme
        labels = decode(slabs, preparation, self.segmentation.activation, self.values(painted))
        if self.rules is not None:
            labels = postprocess(labels, preparation.source_grid.spacing_mm, self.card.outputs, self.rules)
        return labels if scheme == painted else translate(labels, painted, scheme)

    def label_prepared(self, prepared: PreparedCase) -> LabelMap:
        """Label map (*prepared) uint8 on the grid that the network works on, in the values of the training data."""
        shape = prepared.image.shape[1:]
        return decode_prepared(self.slabs(prepared), shape, self.segmentation.activation, self.values(self.scheme))

    def values(self, scheme: LabelScheme) -> tuple[int, ...]:
        """What each output paints in the values of `scheme`."""
        return tuple(painted_values(self.card.outputs, self.scheme, scheme))

    def can_paint(self, scheme: LabelScheme) -> bool:
        """Whether `scheme` has a value for every tissue that this model paints."""
        table = translation(self.scheme, scheme)
        return all(table[output.label] for output in self.card.outputs if output.label)

    def mirror_axes(self) -> tuple[int, ...]:
        """The axes of *spatial along which inputs are mirrored and logits averaged; none without `uses_tta`."""
        if not self.uses_tta:
            return ()
        trained = self.segmentation.mirror_axes
        return tuple(range(self.card.dims)) if trained is None else trained


@dataclass(frozen=True, eq=False)
class Ensemble(Predictor):
    """Several networks for one task: the mean of their probabilities, slab by slab. See `Ensemble.of`."""

    members: tuple[Predictor, ...] = ()

    @classmethod
    def of(cls, members: Sequence[Predictor]) -> Ensemble:
        """The ensemble of these predictors; `backend`, `card` and `window` are those of the first."""
        first = members[0]
        return cls(first.backend, first.card, uses_tta=first.uses_tta, window=first.window, members=tuple(members))

    @functools.cached_property
    def rules(self) -> PostprocessingCard | None:
        """The postprocessing rules that the members agree on."""
        return agreed_rules([member.rules for member in self.members], self.card.outputs)

    def with_backends(self, change: Callable[[Backend], Backend]) -> Predictor:
        """See `Predictor.with_backends`."""
        return self.members[0].ensemble([member.with_backends(change) for member in self.members])

    def with_smaller_window(self) -> Predictor | None:
        """Every member with smaller windows; None where one of them has none."""
        smaller = [found for member in self.members if (found := member.with_smaller_window()) is not None]
        return smaller[0].ensemble(smaller) if len(smaller) == len(self.members) else None

    def slabs(self, prepared: PreparedCase, axis: int | None = None) -> Iterator[Slab]:
        """Logits (K, *prepared) of the mean probability of all members, with their disagreement."""
        axis = self.plan(prepared.image.shape[1:]).axis if axis is None else axis
        return merged([member.slabs(prepared, axis) for member in self.members], self.segmentation.activation)
