"""Predictors of nnU-Net's models, which give nnU-Net's own masks.

Windows have nnU-Net's starts and weights; sums, quotients and means over folds are in half precision, as nnU-Net
computes them on a CPU; folds average logits. A cascade computes the mask of its previous stage first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, prod
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from segkit.checkpoint.card import ModelCard
from segkit.errors import RequestError
from segkit.inference.backends import Backend
from segkit.inference.decode import merged
from segkit.inference.predictor import Ensemble, Predictor
from segkit.inference.sliding_window import Logits, Network, Slab, WindowPlan, predict_slabs
from segkit.preparing.nnunet import NnUnetConfig, axis_spacing, nnunet_shape, prepare_as_nnunet, resampling_bytes
from segkit.preparing.preprocessing import LoadedCase, PreparedCase
from segkit.reading.case import Case, channel_number
from segkit.reading.files import count_channels
from segkit.reading.geometry import reorientation_to
from segkit.reading.volume import Grid

_PICTURES, _COLOURS = "NaturalImage2DIO", 3

_log = logging.getLogger(__name__)


def nnunet_options(
    folder: Path, card: ModelCard, load: Callable[[Path], Predictor], uses_tta: bool | None
) -> dict[str, Any]:
    """Arguments of the predictor of a model folder; `load` opens the folder of a previous stage.

    Raises:
        RequestError: a cascade without its previous stage.
    """
    axes = card.segmentation and card.segmentation.mirror_axes
    if uses_tta is None and axes:
        _log.info(
            "inputs are mirrored along axes %s, as nnU-Net does; --no-tta turns it off", ", ".join(map(str, axes))
        )
    stage = card.nnunet and card.nnunet.previous_stage
    previous = load(_previous_folder(folder, stage)) if stage else None
    return {"uses_tta": uses_tta is not False and bool(axes), "previous": previous}


def _previous_folder(folder: Path, stage: str) -> Path:
    """The folder of the previous stage of a cascade: beside that of the trainer, plans and configuration."""
    folder = folder.absolute()
    results = next((one for one in (folder, *folder.parents[:2]) if "__" in one.name), folder)
    beside = results.with_name("__".join((*results.name.split("__")[:-1], stage)))
    if not beside.is_dir():
        remedy = f"Copy {beside.name} beside it, as nnU-Net lays them out"
        raise RequestError(f"needs the masks of {stage}", where=folder, expected=f"the folder {beside}", remedy=remedy)
    _log.info("%s is computed first: the previous stage of the cascade", beside)
    return beside


@dataclass(frozen=True, eq=False)
class NnUnetPredictor(Predictor):
    """The predictor of a card with `nnunet`."""

    previous: Predictor | None = field(default=None, kw_only=True)
    """That of the previous stage of a cascade."""
    in_slabs: bool = field(default=False, kw_only=True)
    """Resample scans with less memory; the masks are the same."""

    keeps_values: ClassVar[bool] = True
    resamples_logits: ClassVar[bool] = True

    @property
    def config(self) -> NnUnetConfig:
        """That part of the card."""
        return cast(NnUnetConfig, self.card.nnunet)

    @property
    def dims(self) -> int:
        """Networks of slices segment volumes, except those that were trained on pictures."""
        return 2 if self.config.reader == _PICTURES else 3

    @property
    def identity(self) -> str:
        """Also that of the previous stage."""
        own = f"{super().identity}+nnunet"
        return own if self.previous is None else f"{own}+{self.previous.identity}"

    def ensemble(self, members: Sequence[Predictor]) -> Predictor:
        """See `Predictor.ensemble`."""
        first = members[0]
        return NnUnetEnsemble(
            first.backend,
            first.card,
            uses_tta=first.uses_tta,
            window=first.window,
            members=tuple(members),
            previous=self.previous,
            in_slabs=self.in_slabs,
        )

    def with_backends(self, change: Callable[[Backend], Backend]) -> Predictor:
        """See `Predictor.with_backends`; also of the previous stage."""
        changed = super().with_backends(change)
        if self.previous is None or not isinstance(changed, NnUnetPredictor):
            return changed
        return replace(changed, previous=self.previous.with_backends(change))

    def with_smaller_window(self) -> Predictor | None:
        """At first the same that resamples in slabs, which leaves the masks as they are; then smaller windows."""
        if self.in_slabs:
            return super().with_smaller_window()
        previous = self.previous
        if isinstance(previous, NnUnetPredictor):
            previous = replace(previous, in_slabs=True)
        return replace(self, in_slabs=True, previous=previous)

    def match(self, case: Case, *, allow_missing: bool = False) -> Case:
        """See `Predictor.match`; the number of a file, or of a plane in it, is that of the channel, whatever its name.

        Files with several channels, such as colours, stand for as many channels.
        """
        names = self.card.modalities
        numbers = {channel_number(name): file for name, file in case.images.items()}
        if set(numbers) == {None} and set(case.images).isdisjoint(names):  # such as red, green and blue
            numbers = {file.channel: file for file in case.images.values()}
        if set(numbers) <= set(range(len(names))):
            images = {number: file for number, file in numbers.items() if number is not None}
            case = replace(case, images={names[number]: images[number] for number in sorted(images)})
        if len(case.images) < len(names) and all(file.channel is None for file in case.images.values()):
            counts = [count_channels(file.path) for file in case.images.values()]
            if self.dims == 2 and len(counts) == 1 and len(names) in (_COLOURS, _COLOURS + 1):
                counts = [len(names)]  # grey is the same in all planes; the fourth is alpha
            files = zip(case.images.values(), counts, strict=True)
            channels = [replace(file, channel=channel) for file, count in files for channel in range(count)]
            if len(channels) == len(names):
                case = replace(case, images=dict(zip(names, channels, strict=True)))
        return super().match(case, allow_missing=allow_missing)

    def _prepared(self, loaded: LoadedCase) -> PreparedCase:
        config, target = self.card.preprocessing, cast(tuple[float, ...], self.card.preprocessing.spacing_mm)
        mask = None if self.previous is None else self.previous.predict_loaded(loaded).labels
        return prepare_as_nnunet(loaded, self.config, config.orientation, target, mask, in_slabs=self.in_slabs)

    def prepared_shape(self, grid: Grid) -> tuple[int, ...]:
        """Voxels per axis of a case of this grid once it is prepared, if nothing is cropped."""
        config, target = self.card.preprocessing, cast(tuple[float, ...], self.card.preprocessing.spacing_mm)
        shape = reorientation_to(grid, config.orientation).target_shape
        if self.config.data.function == "no_resampling_hack":
            return shape
        old_mm = axis_spacing(grid, config.orientation, self.config.reader)
        new_mm = (*old_mm[: 3 - len(target)], *target)
        return nnunet_shape((*(1,) * (3 - grid.dims), *shape), old_mm, new_mm)[-grid.dims :]

    def preparing_bytes(self, shape: Sequence[int], grid: Grid) -> int:
        """See `Predictor.preparing_bytes`; the image exists twice, and one channel is resampled at a time."""
        config, channels = self.card.preprocessing, len(self.card.modalities)
        old_mm, target = axis_spacing(grid, config.orientation, self.config.reader), config.spacing_mm or ()
        axis = self.config.data.coarse_axis(old_mm, (*old_mm[: 3 - len(target)], *target))
        turned = reorientation_to(grid, config.orientation).target_shape
        kept = zip(turned, shape, self.prepared_shape(grid), strict=True)
        cropped = [ceil(size * left / whole) for size, left, whole in kept]
        copies = resampling_bytes(cropped, self.config.data, axis, in_slabs=self.in_slabs)
        resampled = 0 if tuple(cropped) == tuple(shape) else 4 * channels * prod(shape) + copies
        normalising = 13 if any(self.config.use_mask_for_norm) else 6  # masks, and copies of the voxels inside them
        return 4 * channels * prod(turned) + max(resampled, normalising * prod(cropped))

    def plan(self, shape: Sequence[int], axis: int | None = None) -> WindowPlan:
        """Windows of at most half overlap, evenly spread; slabs along the first axis, in which nnU-Net adds them."""
        window = (1,) * (len(shape) - len(self.window)) + tuple(self.window)
        padded = tuple(max(size, length) for size, length in zip(shape, window, strict=True))
        starts = []
        for size, length in zip(padded, window, strict=True):
            steps = ceil((size - length) / (length / 2)) if length > 1 or not self._is_sliced(shape) else size - 1
            step = (size - length) / steps if steps else 0.0
            starts.append(tuple(round(step * index) for index in range(steps + 1)))
        return WindowPlan(padded, window, tuple(starts), 0, "half")

    def slabs(self, prepared: PreparedCase, axis: int | None = None) -> Iterator[Slab]:
        """Logits (K, *prepared) of half precision, in float32, slab by slab along the first axis."""
        image = np.asarray(prepared.image, np.float32)
        network: Network = self.backend
        mirror_axes = self.mirror_axes()
        if self._is_sliced(image.shape[1:]):
            network, mirror_axes = self._of_slice, tuple(axis + 1 for axis in mirror_axes)
        return predict_slabs(network, image, self.plan(image.shape[1:]), mirror_axes=mirror_axes)

    def _is_sliced(self, shape: Sequence[int]) -> bool:
        return len(shape) > len(self.window)

    def _of_slice(self, windows: Logits) -> Logits:
        return self.backend(windows[:, :, 0])[:, :, None]


@dataclass(frozen=True, eq=False)
class NnUnetEnsemble(NnUnetPredictor, Ensemble):
    """The folds of one training: the mean of their logits, in half precision."""

    def slabs(self, prepared: PreparedCase, axis: int | None = None) -> Iterator[Slab]:
        """Mean logits (K, *prepared), with the disagreement of the folds."""
        streams = [member.slabs(prepared, axis) for member in self.members]
        return merged(streams, self.segmentation.activation, of_logits=True)
