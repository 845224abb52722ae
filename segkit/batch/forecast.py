"""What a case will take, before it starts: memory and seconds, from its headers and from one window.

What the network takes is measured, not modelled, for each runtime has its own habits: one window is computed once for
each model, runtime and machine, and the figures are kept in the user's cache. What the volumes take is arithmetic. How
much of them the crop to the voxels that are not 0 leaves is taken from the first case: scans of one folder are alike.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, prod
from pathlib import Path

import numpy as np

from segkit.batch.worker import CaseTask
from segkit.errors import DataError, is_memory_error
from segkit.inference.predictor import Predictor, members_of
from segkit.preparing.preprocessing import crop_box
from segkit.reading.case import Case
from segkit.reading.files import read_grid, read_volume, written_atomically
from segkit.reading.geometry import reorientation_to
from segkit.reading.volume import Grid
from segkit.runtime import available_cores, available_memory_gb, cache_folder, current_rss_mb, peak_rss_mb

_MB = 1024**2
_FLOAT = 4

_READ_SECONDS, _PREPARE_SECONDS, _FINISH_SECONDS = 30e-9, 35e-9, 60e-9
"""For each voxel and modality of the file: unpacking, preparing; for each voxel: painting and packing the mask. Of one
core of 2023; with the windows, which take most of the time, good for a factor of 2."""

_SHARE_OF_FREE = 0.9

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WindowCost:
    """What one window takes: seconds, and MB of memory beside its input and logits, kept from then on."""

    seconds: float
    memory_mb: float


@dataclass(frozen=True)
class Forecast:
    """What a case will take: seconds, and the MB of each stage beyond what the process holds already."""

    seconds: float
    read_mb: float
    compute_mb: float

    def peak_mb(self, held_mb: float, *, is_overlapped: bool) -> float:
        """Peak memory of the process, if the next case is as large as this one."""
        return held_mb + (self.read_mb + self.compute_mb if is_overlapped else max(self.read_mb, self.compute_mb))


class Forecaster:
    """Forecasts for the cases of one predictor."""

    def __init__(self, predictor: Predictor, kept: Sequence[float] | None = None) -> None:
        """`kept`: the part of each axis that the crop leaves, see `kept_by_crop`; None is all of it."""
        self.predictor = predictor
        self.kept = tuple(kept or (1.0,) * predictor.card.dims)
        members = members_of(predictor)
        held = current_rss_mb()  # before a window is computed, for its memory is added
        self.costs = [window_cost(member) for member in members]
        self.members = members
        self.held_mb = held + sum(cost.memory_mb for cost in self.costs)
        """What the process will hold while it works on no case, in MB: with what the runtimes keep of a window."""

    def forecast(self, case: Case) -> Forecast:
        """What a case will take, if it is cropped as the first one is.

        Raises:
            DataError: the header of its first image cannot be read.
        """
        grid = read_grid(next(iter(case.images.values())).path)
        return Forecast(self._seconds(grid), self._read_bytes(grid) / _MB, self._compute_bytes(grid) / _MB)

    def _seconds(self, grid: Grid) -> float:
        voxels, channels = prod(grid.shape), len(self.predictor.card.modalities)
        flips = 2 ** len(self.predictor.mirror_axes())
        windows: float = sum(
            member.plan(self._prepared_shape(grid)).count * cost.seconds * flips
            for member, cost in zip(self.members, self.costs, strict=True)
        )
        around = voxels * (channels * (_READ_SECONDS + _PREPARE_SECONDS) + _FINISH_SECONDS)
        return windows + around

    def _read_bytes(self, grid: Grid) -> int:
        """The image as loaded, files being unpacked, and the prepared copy with what its making needs."""
        voxels, channels = prod(grid.shape), len(self.predictor.card.modalities)
        loaded = _FLOAT * voxels * channels
        unpacking = _FLOAT * voxels * min(available_cores(), channels)
        prepared = _FLOAT * channels * prod(self._prepared_shape(grid))
        return loaded + max(unpacking, prepared + (1 + 2 * _FLOAT) * voxels)

    def _compute_bytes(self, grid: Grid) -> int:
        """The prepared image, one row of windows of logits with the slab that leaves it, the mask and its copies."""
        shape = self._prepared_shape(grid)
        outputs = len(self.predictor.card.outputs)
        rows = sum(_FLOAT * (outputs + 1) * member.plan(shape).slab_voxels * 3 // 2 for member in self.members)
        return _FLOAT * len(self.predictor.card.modalities) * prod(shape) + rows + 3 * prod(grid.shape)

    def _prepared_shape(self, grid: Grid) -> tuple[int, ...]:
        whole = self.predictor.prepared_shape(grid)
        return tuple(ceil(size * share) for size, share in zip(whole, self.kept, strict=True))


def kept_by_crop(predictor: Predictor, case: Case) -> tuple[float, ...]:
    """Part of each axis, after orientation, that the crop leaves of a case, as far as its first image tells.

    Raises:
        DataError: that image cannot be read.
    """
    config, first = predictor.card.preprocessing, next(iter(case.images.values()))
    if config.crop != "nonzero":
        return (1.0,) * predictor.card.dims
    volume = read_volume(first.path, first.channel)
    start, stop = crop_box(np.asarray(volume.array)[None], config.crop)
    axes = reorientation_to(volume.grid, config.orientation).axes
    return tuple((stop[axis] - start[axis]) / volume.grid.shape[axis] for axis in axes)


def fit_memory(
    predictor: Predictor, tasks: Sequence[CaseTask], limit_mb: float | None = None
) -> tuple[list[CaseTask], bool]:
    """The tasks with what each is expected to take, and whether there is room for several at a time.

    `limit_mb` is that of the process; None is nearly all that is free. Where a case alone would take more, the windows
    of the predictor are made smaller, if they can be.
    """
    if not tasks:
        return [], True
    limit_mb = limit_mb or current_rss_mb() + _SHARE_OF_FREE * 1024 * available_memory_gb()
    kept = _kept_by_first(predictor, tasks)
    while True:
        try:
            forecaster = Forecaster(predictor, kept)
        except Exception as error:
            if is_memory_error(error) and predictor.shrink():
                continue
            _log.debug("no forecast", exc_info=error)  # the cases themselves will tell what is wrong
            return list(tasks), True
        held = forecaster.held_mb
        forecasts = [_forecast_or_none(forecaster, task) for task in tasks]
        known = [forecast for forecast in forecasts if forecast is not None]
        largest = max((one.peak_mb(held, is_overlapped=False) for one in known), default=0.0)
        if largest <= limit_mb or not predictor.shrink():
            break
    if largest > limit_mb:
        _log.warning("a case is expected to take %.0f MB of %.0f MB: it may fail", largest, limit_mb)
    elif predictor.window != predictor.card.patch_size:
        size = " x ".join(map(str, predictor.window))
        _log.warning("windows of %s voxels, for memory is short: logits may differ slightly", size)
    has_room = all(one.peak_mb(held, is_overlapped=True) <= limit_mb for one in known)
    overlaps = has_room and len(tasks) > 1
    peaks = [None if one is None else one.peak_mb(held, is_overlapped=overlaps) for one in forecasts]
    return [_with_forecast(*one) for one in zip(tasks, forecasts, peaks, strict=True)], has_room


def _kept_by_first(predictor: Predictor, tasks: Sequence[CaseTask]) -> tuple[float, ...] | None:
    for task in tasks:
        try:
            return kept_by_crop(predictor, task.case)
        except DataError:
            continue  # it will be told when its turn comes
    return None


def _forecast_or_none(forecaster: Forecaster, task: CaseTask) -> Forecast | None:
    try:
        return forecaster.forecast(task.case)
    except DataError:
        return None


def _with_forecast(task: CaseTask, forecast: Forecast | None, peak_mb: float | None) -> CaseTask:
    if forecast is None or peak_mb is None:
        return task
    return replace(task, predicted={"peak_rss_mb": round(peak_mb, 1), "seconds": round(forecast.seconds, 4)})


def window_cost(predictor: Predictor) -> WindowCost:
    """What one window of a predictor takes on this machine, as it was found before, or else now."""
    path = _cost_path(predictor)
    try:
        return WindowCost(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        cost = _measured(predictor)
    try:
        with written_atomically(path) as temporary:
            temporary.write_text(json.dumps(asdict(cost)), encoding="utf-8")
    except DataError as error:
        _log.debug("what a window takes is not kept: %s", error)
    return cost


def _measured(predictor: Predictor) -> WindowCost:
    shape = (1, len(predictor.card.modalities), *predictor.window)
    window = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    held, peak = current_rss_mb(), peak_rss_mb()
    predictor.backend(window)  # the first one takes longer, for memory is asked for and kernels are chosen
    began = time.perf_counter()
    logits = predictor.backend(window)
    seconds = time.perf_counter() - began
    # Where an earlier peak was higher, this window did not reach it, and what is held now is all that is known.
    reached = peak_rss_mb() if peak_rss_mb() > peak else current_rss_mb()
    return WindowCost(round(seconds, 4), round(max(reached - held - logits.nbytes / _MB, 0.0), 1))


def _cost_path(predictor: Predictor) -> Path:
    size = "x".join(map(str, predictor.window))
    cores: Sequence[object] = (predictor.card.sha256, predictor.backend.name, size, available_cores())
    name = hashlib.sha256(repr(tuple(cores)).encode()).hexdigest()[:24]
    return cache_folder() / "costs" / f"{name}.json"
