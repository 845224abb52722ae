"""Memory and seconds of a case before it starts, from its headers and from one measured window.

What the network takes depends on the runtime, so it is measured: one window is computed once for each model, runtime
and machine, and the figures are kept in the user's cache. What the volumes take is arithmetic. The share of them that
the crop to the voxels that are not 0 leaves is taken from the first case: scans of one folder are alike.
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
from typing import TypeVar

import numpy as np

from segkit.batch.worker import CasePlan
from segkit.errors import DataError, is_memory_error
from segkit.inference.predictor import Predictor
from segkit.preparing.preprocessing import crop_box
from segkit.reading.case import Case
from segkit.reading.files import read_grid, read_volume, written_atomically
from segkit.reading.geometry import reorientation_to
from segkit.reading.volume import Grid
from segkit.runtime import available_cores, available_memory_gb, cache_folder, current_rss_mb, peak_rss_mb

_P = TypeVar("_P", bound=CasePlan)

_MB = 1024**2
_FLOAT = 4

_READ_SECONDS, _PREPARE_SECONDS, _FINISH_SECONDS = 30e-9, 35e-9, 60e-9
"""For each voxel and modality of the file: unpacking, preparing; for each voxel: painting and packing the mask. Of one
core of 2023; with the windows, which take most of the time, good for a factor of 2."""

_SHARE_OF_FREE = 0.9

_log = logging.getLogger(__name__)


def fit_memory(
    predictor: Predictor, plans: list[_P], memory_mb: float | None = None
) -> tuple[Predictor, list[_P], bool]:
    """The predictor, plans with what each case is expected to take, and whether there is room for several at a time.

    `memory_mb` is that of the process; None is nearly all that is free. Where a case alone would take more, the
    predictor that is returned has smaller windows, if it can have them.
    """
    if not plans:
        return predictor, plans, True
    memory_mb = memory_mb or current_rss_mb() + _SHARE_OF_FREE * 1024 * available_memory_gb()
    kept = _kept_by_first(predictor, plans)
    while True:
        try:
            forecaster = Forecaster(predictor, kept)
        except Exception as error:
            if is_memory_error(error) and (smaller := predictor.with_smaller_window()) is not None:
                predictor = smaller
                continue
            _log.debug("no forecast", exc_info=error)  # the cases themselves will say what is wrong
            return predictor, plans, True
        held = forecaster.held_mb
        forecasts = [forecaster.forecast_or_none(plan.case) for plan in plans]
        known = [forecast for forecast in forecasts if forecast is not None]
        largest = max((one.peak_mb(held, is_overlapped=False) for one in known), default=0.0)
        if largest <= memory_mb or (smaller := predictor.with_smaller_window()) is None:
            break
        predictor = smaller
    if largest > memory_mb:
        _log.warning("a case is expected to take %.0f MB of %.0f MB: it may fail", largest, memory_mb)
    elif predictor.window != predictor.card.patch_size:
        size = " x ".join(map(str, predictor.window))
        _log.warning("windows of %s voxels, for memory is short: logits may differ slightly", size)
    has_room = all(one.peak_mb(held, is_overlapped=True) <= memory_mb for one in known)
    overlaps = has_room and len(plans) > 1
    expected = [None if one is None else one.to_json(held, is_overlapped=overlaps) for one in forecasts]
    told = zip(plans, expected, strict=True)
    return predictor, [plan if one is None else replace(plan, predicted=one) for plan, one in told], has_room


def _kept_by_first(predictor: Predictor, plans: Sequence[CasePlan]) -> tuple[float, ...] | None:
    for plan in plans:
        try:
            return kept_by_crop(predictor, plan.case)
        except DataError:
            continue  # it fails when its turn comes
    return None


def kept_by_crop(predictor: Predictor, case: Case) -> tuple[float, ...]:
    """Share of each axis, after orientation, that the crop leaves of a case, as far as its first image tells.

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


@dataclass(frozen=True)
class Forecast:
    """What a case will take: seconds, and the MB of each stage beyond what the process holds already."""

    seconds: float
    read_mb: float
    compute_mb: float

    def peak_mb(self, held_mb: float, *, is_overlapped: bool) -> float:
        """Peak memory of the process, if the next case is as large as this one."""
        return held_mb + (self.read_mb + self.compute_mb if is_overlapped else max(self.read_mb, self.compute_mb))

    def to_json(self, held_mb: float, *, is_overlapped: bool) -> dict[str, float]:
        """What the manifest says is expected."""
        peak_mb = self.peak_mb(held_mb, is_overlapped=is_overlapped)
        return {"peak_rss_mb": round(peak_mb, 1), "seconds": round(self.seconds, 4)}


class Forecaster:
    """Forecasts for the cases of one predictor; `held_mb` is what the process holds while it works on no case."""

    def __init__(self, predictor: Predictor, kept: Sequence[float] | None = None) -> None:
        """`kept`: the share of each axis that the crop leaves, see `kept_by_crop`; None is all of it."""
        self.predictor = predictor
        self.kept = tuple(kept or (1.0,) * predictor.card.dims)
        held = current_rss_mb()  # before a window is computed, for its memory is added
        self.costs = [window_cost(member) for member in predictor.members]
        self.held_mb = held + sum(cost.memory_mb for cost in self.costs)

    def forecast_or_none(self, case: Case) -> Forecast | None:
        """The forecast of a case; None where the header of its first image cannot be read."""
        try:
            return self.forecast(case)
        except DataError:
            return None

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
            for member, cost in zip(self.predictor.members, self.costs, strict=True)
        )
        return windows + voxels * (channels * (_READ_SECONDS + _PREPARE_SECONDS) + _FINISH_SECONDS)

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
        card, members = self.predictor.card, self.predictor.members
        rows = sum(_FLOAT * (len(card.outputs) + 1) * member.plan(shape).slab_voxels * 3 // 2 for member in members)
        return _FLOAT * len(card.modalities) * prod(shape) + rows + 3 * prod(grid.shape)

    def _prepared_shape(self, grid: Grid) -> tuple[int, ...]:
        whole = self.predictor.prepared_shape(grid)
        return tuple(ceil(size * share) for size, share in zip(whole, self.kept, strict=True))


@dataclass(frozen=True)
class WindowCost:
    """What one window takes: seconds, and MB of memory beside its input and logits, kept from then on."""

    seconds: float
    memory_mb: float


def window_cost(predictor: Predictor) -> WindowCost:
    """What one window of a predictor takes on this machine: from the cache, or else measured now."""
    path = _cost_path(predictor)
    try:
        return WindowCost(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        cost = _measured(predictor)
    try:
        with written_atomically(path) as temporary:
            temporary.write_text(json.dumps(asdict(cost)), encoding="utf-8")
    except DataError as error:
        _log.debug("the cost of a window is not kept: %s", error)
    return cost


def _cost_path(predictor: Predictor) -> Path:
    size = "x".join(map(str, predictor.window))
    key = (predictor.card.sha256, predictor.backend.name, size, available_cores())
    return cache_folder() / "costs" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.json"


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
