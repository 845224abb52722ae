"""From the files of a case to the input array of a network.

*Loading* stacks the modalities of one case in the orientation of its files and rejects files that do not fit together.
*Preparing* reorients the array, crops it to the voxels with signal, normalises each modality and resamples it to the
target spacing. `Preparation` records the steps, so that decoding returns exactly to the grid of the input.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from segkit.config import Config
from segkit.errors import DataError, RequestError
from segkit.labels import LabelScheme, translate
from segkit.metrics.overlap import box_of
from segkit.preparing.resampling import resample_image, resample_labels, resampled_shape
from segkit.reading.case import Case, ImageFile
from segkit.reading.files import read_reference, read_volume
from segkit.reading.geometry import Reorientation, onto_grid, reorientation_to, reoriented_grid, same_grid
from segkit.reading.volume import Grid, Volume, log_notes, measure_intensities, require_finite
from segkit.runtime import available_cores
from segkit.shapes import Affine, Image, LabelMap

Normalisation = Literal["zscore-nonzero", "zscore", "ct-window", "scale-nonzero"]
Crop = Literal["nonzero", "none"]

_log = logging.getLogger(__name__)
_MOST_VOXELS = 2**31


class PreprocessingConfig(Config):
    """How a loaded case becomes the input of a network. None is decided by planning."""

    spacing_mm: tuple[float, ...] | None = None
    """Target voxel spacing in mm, in the axis order after orientation; None keeps the spacing of each case."""
    orientation: str = "RAS"
    """Direction in which the voxel axes grow after orientation, or an order of the axes I, J and K of the file, such as
    KJI; pictures are not reoriented."""
    normalisation: Normalisation | None = None
    """zscore-nonzero: mean 0 and deviation 1 over the voxels that are not 0, which stay 0 (skull-stripped MRI);
    zscore: over all voxels; ct-window: Hounsfield units clipped to `ct_window`, then `ct_mean` and `ct_std`;
    scale-nonzero: divided by the deviation over the voxels that are not 0, so that tissue stays different from the
    background, as inpainting needs it."""
    crop: Crop | None = None
    """nonzero: crop to the box of voxels that are not 0 in any modality; none: keep the whole volume."""
    ct_window: tuple[float, float] | None = None
    """Lowest and highest value of ct-window: the 0.5 and 99.5 percentiles of the foreground of the training data."""
    ct_mean: float | None = None
    """Mean that ct-window subtracts: of the foreground voxels of the training data."""
    ct_std: float | None = None
    """Standard deviation that ct-window divides by: of the foreground voxels of the training data."""


@dataclass(frozen=True)
class LoadedCase:
    """One case in the orientation of its files.

    image: (C, *spatial) float32, a missing modality is all 0; labels: (*spatial) uint8 in the values of the scheme of
    the cohort, None without a reference or a scheme; available: whether each modality has a file.
    """

    id: str
    image: Image = field(repr=False)
    labels: LabelMap | None = field(repr=False)
    grid: Grid
    available: tuple[bool, ...]


def load_case(
    case: Case,
    modalities: tuple[str, ...],
    scheme: LabelScheme | None,
    *,
    allow_missing: bool = False,
    uses_threads: bool = True,
) -> LoadedCase:
    """Read the files of one case; the reference only if a `scheme` is given, in the values of that scheme.

    With `uses_threads` the files are read in parallel, which takes the memory of one file per core more.

    Raises:
        DataError: a file cannot be read, a modality is missing or a volume of one value only (unless `allow_missing`),
            intensities cannot be used (see `measure_intensities`), files disagree about their grid, or the reference
            has values that its scheme does not know.
    """
    missing = [modality for modality in modalities if modality not in case.images]
    is_empty = len(missing) == len(modalities)
    if is_empty or (missing and not allow_missing):
        found = f"no file for modality {', '.join(missing)}; found {', '.join(case.images) or 'none'}"
        remedy = "Add the files" + ("" if is_empty else ", or pass --allow-missing to use the case without them")
        raise DataError(found, where=case.id, expected=f"one image for each of {', '.join(modalities)}", remedy=remedy)
    image, grid = _read_image(case, modalities, uses_threads=uses_threads)
    available = [modality in case.images for modality in modalities]
    for channel, modality in enumerate(modalities):
        if not available[channel] or grid.dims == 2:
            continue
        path = case.images[modality].path
        if allow_missing and sum(available) > 1 and image[channel].min() == image[channel].max():
            _log.warning("%s: every voxel holds the same value; the case is used without %s", path, modality)
            image[channel], available[channel] = 0, False
        else:
            measure_intensities(image[channel], path)
    labels = None
    if scheme is not None and case.label is not None:
        labels = _read_reference(case, case.label, grid, scheme)
    return LoadedCase(case.id, image, labels, grid, tuple(available))


def _read_image(case: Case, modalities: tuple[str, ...], *, uses_threads: bool) -> tuple[Image, Grid]:
    files = [(channel, case.images[name]) for channel, name in enumerate(modalities) if name in case.images]
    with ExitStack() as stack:
        read_all: Callable[..., Iterable[Volume]] = map
        if uses_threads and len(files) > 1:
            read_all = stack.enter_context(ThreadPoolExecutor(min(available_cores(), len(files)))).map
        volumes = read_all(lambda file: read_volume(file[1].path, file[1].channel), files)
        named = ((channel, file.path, volume) for (channel, file), volume in zip(files, volumes, strict=True))
        return stack_modalities(named, len(modalities))


def stack_modalities(volumes: Iterable[tuple[int, Path | str, Volume]], channels: int) -> tuple[Image, Grid]:
    """(C, *spatial) float32 of volumes with their channels and names, and the grid of the first; other channels are 0.

    Raises:
        DataError: a voxel is NaN or infinite, or a volume does not lie on the grid of the first.
    """
    image = np.empty((0,), np.float32)
    for channel, name, volume in volumes:
        if not image.size:
            first, grid = name, volume.grid
            image = np.zeros((channels, *grid.shape), np.float32)
        log_notes(volume.grid)
        if same_grid(grid, volume.grid) is not None:
            raise _other_grid(grid, first, volume.grid, name)
        image[channel] = volume.array
        require_finite(image[channel], name)
    return image, grid


def _other_grid(grid: Grid, path: Path | str, other: Grid, other_path: Path | str) -> DataError:
    remedy = "Register and resample them to one grid first, or repair a wrong header with "
    remedy += "`segkit convert headers`"
    return DataError(
        f"does not lie on the grid of {path}: {same_grid(grid, other)}",
        where=other_path,
        expected="all files of a case on one grid",
        remedy=remedy if grid.dims == 3 else "Save the files of the case with the same rows and columns",
    )


def _read_reference(case: Case, file: ImageFile, grid: Grid, scheme: LabelScheme) -> LabelMap:
    stored, label_grid = read_reference(file)
    log_notes(label_grid)
    labels = onto_grid(stored, label_grid, grid)
    if labels is None:
        raise _other_grid(grid, next(iter(case.images.values())).path, label_grid, file.path)
    source = case.scheme or scheme
    present = np.flatnonzero(np.bincount(labels.ravel(), minlength=256))
    unknown = sorted({int(value) for value in present} - source.reference_values)
    if unknown:
        known = ", ".join(f"{value} {tissue}" for tissue, value in source.values.items())
        found = f"label values {unknown} are not in label scheme {source.name}"
        remedy = "Name the scheme of the file with --label-scheme, or convert it with `segkit convert labels`"
        raise DataError(found, where=file.path, expected=f"0 background, {known}", remedy=remedy)
    return labels if source == scheme else translate(labels, source, scheme)


@dataclass(frozen=True)
class Preparation:
    """The steps from the grid of a case to the prepared array, which can be undone exactly.

    `reorientation` of an array on `source_grid`; crop to `crop` = (start, stop), voxels per reoriented axis, stop
    excluded; resampling from `cropped_shape` to `resampled_shape` with a voxel spacing of `spacing_mm`.
    """

    source_grid: Grid
    reorientation: Reorientation
    crop: tuple[tuple[int, ...], tuple[int, ...]]
    resampled_shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    nearest_axis: int | None = None
    """Axis along which decoding takes the nearest logits, instead of interpolating; of nnU-Net's models."""
    rounds_to_half: bool = False
    """Whether decoding rounds interpolated logits to half precision, as nnU-Net does."""

    @property
    def reoriented_shape(self) -> tuple[int, ...]:
        """Voxels per axis after reorientation, before the crop."""
        return self.reorientation.target_shape

    @property
    def cropped_shape(self) -> tuple[int, ...]:
        """Voxels per axis after the crop, before resampling."""
        start, stop = self.crop
        return tuple(last - first for first, last in zip(start, stop, strict=True))

    @property
    def crop_slices(self) -> tuple[slice, ...]:
        """The crop as an index into a reoriented array (*spatial)."""
        return tuple(slice(first, last) for first, last in zip(*self.crop, strict=True))

    @property
    def affine(self) -> Affine:
        """Voxel indices of the prepared array to millimetres in RAS+ world space, (4, 4)."""
        to_reoriented = np.eye(4)
        sides = zip(self.crop[0], self.cropped_shape, self.resampled_shape, strict=True)
        for axis, (start, old, new) in enumerate(sides):
            # The outer faces are aligned, see `segkit.preparing.resampling`.
            to_reoriented[axis, axis], to_reoriented[axis, 3] = old / new, start + (old / new - 1) / 2
        affine: Affine = reoriented_grid(self.source_grid, self.reorientation).affine @ to_reoriented
        return affine

    def to_json(self) -> dict[str, Any]:
        """The steps in types that `json` can write."""
        grid = self.source_grid
        return {
            "source_grid": {
                **vars(grid),
                "affine": grid.affine.tolist(),
                "qform": None if grid.qform is None else grid.qform.tolist(),
                "source": None if grid.source is None else str(grid.source),
            },
            "reorientation": {"axes": self.reorientation.axes, "flips": self.reorientation.flips},
            "crop": self.crop,
            "resampled_shape": self.resampled_shape,
            "spacing_mm": self.spacing_mm,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Preparation:
        """The preparation that `to_json` wrote."""
        grid = dict(document["source_grid"])
        grid["shape"] = tuple(grid["shape"])
        grid["affine"] = np.asarray(grid["affine"], np.float64)
        grid["qform"] = None if grid["qform"] is None else np.asarray(grid["qform"], np.float64)
        grid["notes"] = tuple(grid.get("notes", ()))
        grid["source"] = None if grid["source"] is None else Path(grid["source"])
        turn = document["reorientation"]
        start, stop = document["crop"]
        return cls(
            Grid(**grid),
            Reorientation(tuple(turn["axes"]), tuple(turn["flips"]), grid["shape"]),
            (tuple(start), tuple(stop)),
            tuple(document["resampled_shape"]),
            tuple(document["spacing_mm"]),
        )


@dataclass(frozen=True)
class PreparedCase:
    """The input of a network: image (C, *spatial) float32, labels (*spatial) uint8, and the steps that made them.

    `foreground`, from which patch sampling draws, maps each label value present (without 0) to flat C-order indices of
    voxels with that value, or of a sample of them, and in a case with ignored voxels 0 to all others; outside training
    it is empty.
    """

    id: str
    image: Image = field(repr=False)
    labels: LabelMap | None = field(repr=False)
    preparation: Preparation
    foreground: Mapping[int, NDArray[np.integer[Any]]] = field(default_factory=dict, repr=False)


def prepare(loaded: LoadedCase, config: PreprocessingConfig) -> PreparedCase:
    """Orient, crop, normalise and, where the spacing differs by more than 1 %, resample one case.

    The statistics of the normalisation are those of the cropped volume; over the voxels that are not 0 they equal those
    of the whole volume. A missing modality stays 0.

    Raises:
        RequestError: normalisation or crop is still None.
        DataError: resampling would give more than 2 ** 31 voxels.
    """
    if config.normalisation is None or config.crop is None:
        raise RequestError("normalisation or crop is not decided", remedy="Set both, or let planning choose them")
    turn = reorientation_to(loaded.grid, config.orientation)
    start, stop = crop_box(loaded.image, config.crop)
    box = tuple(map(slice, start, stop))
    turn_box = replace(turn, source_shape=tuple(np.subtract(stop, start).tolist()))
    image = turn_box.apply(loaded.image[(slice(None), *box)])
    if np.may_share_memory(image, loaded.image):
        image = image.copy()
    for plane, is_available in zip(image, loaded.available, strict=True):
        if is_available:
            normalise(plane, config)
    spacing_mm = reoriented_grid(loaded.grid, turn).spacing_mm
    shape = resampled_shape(image.shape[1:], spacing_mm, config.spacing_mm)
    if config.spacing_mm is not None and math.prod(shape) > _MOST_VOXELS:
        found = f"resampling from {spacing_mm} mm to {config.spacing_mm} mm gives {shape} voxels"
        expected, remedy = "a spacing near that of the training data", "Check the spacing in the header"
        raise DataError(found, where=loaded.grid.source or loaded.id, expected=expected, remedy=remedy)
    labels = None if loaded.labels is None else resample_labels(turn_box.apply(loaded.labels[box]), shape)
    spacing = tuple(size * mm / new for size, mm, new in zip(image.shape[1:], spacing_mm, shape, strict=True))
    preparation = Preparation(loaded.grid, turn, _reoriented_box(start, stop, turn), shape, spacing)
    return PreparedCase(loaded.id, resample_image(image, shape), labels, preparation)


def normalise(plane: NDArray[np.float32], config: PreprocessingConfig) -> None:
    """Normalise one modality (*spatial) in place; a constant plane becomes (or stays) 0."""
    if config.normalisation == "zscore-nonzero":
        inside = plane != 0
        values = plane[inside]
        if values.size:
            plane[inside] = (values - values.mean()) / (values.std() + 1e-8)
    elif config.normalisation == "scale-nonzero":
        plane /= deviation_of_tissue(plane)
    elif config.normalisation == "zscore":
        plane -= plane.mean()
        plane /= plane.std() + 1e-8
    else:
        if config.ct_window is None or config.ct_mean is None or config.ct_std is None:
            raise RequestError("ct-window needs ct_window, ct_mean and ct_std", remedy="Let planning choose them")
        np.clip(plane, *config.ct_window, out=plane)
        plane -= config.ct_mean
        plane /= max(config.ct_std, 1e-8)


def deviation_of_tissue(plane: NDArray[np.float32]) -> float:
    """Standard deviation over the voxels that are not 0; 1 if they are all equal."""
    values = plane[plane != 0]
    return (float(values.std(dtype=np.float64)) if values.size else 0.0) or 1.0


def crop_box(image: Image, crop: Crop) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and stop per axis of the part of (C, *spatial) to keep; the whole volume if all of it is 0."""
    if crop == "nonzero":
        inside = image[0] != 0
        for plane in image[1:]:
            inside |= plane != 0
        if (box := box_of(inside)) is not None:
            return tuple(side.start for side in box), tuple(side.stop for side in box)
    return (0,) * (image.ndim - 1), image.shape[1:]


def _reoriented_box(
    start: tuple[int, ...], stop: tuple[int, ...], turn: Reorientation
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The box (start, stop) of the source array in voxels of the reoriented array."""
    sides = []
    for axis, is_flipped in zip(turn.axes, turn.flips, strict=True):
        size, first, last = turn.source_shape[axis], start[axis], stop[axis]
        sides.append((size - last, size - first) if is_flipped else (first, last))
    return tuple(first for first, _ in sides), tuple(last for _, last in sides)
