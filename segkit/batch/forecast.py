"""Expected memory and time of a case, from its header and one measured window.

The cost of a window depends on the runtime: it is measured once for each model, runtime and machine, and kept in the
user's cache. The cost of the volumes is computed. The share of a volume that is left by the crop to voxels that are not
0 is taken from the first case: scans of one folder are alike.
"""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, prod
from typing import TypeVar

import numpy as np

from segkit.batch.worker import CasePlan
from segkit.errors import DataError, free_memory_of, is_memory_error
from segkit.inference.backends import torch_backend, windows_at_once
from segkit.inference.predictor import Predictor
from segkit.preparing.preprocessing import crop_box
from segkit.process_memory import available_memory_gb, current_rss_mb, peak_rss_mb
from segkit.reading.case import Case
from segkit.reading.files import read_grid, read_volume, written_atomically
from segkit.reading.geometry import reorientation_to
from segkit.reading.volume import Grid
from segkit.runtime import available_cores, cache_folder

_P = TypeVar("_P", bound=CasePlan)

_MB = 1024**2
_FLOAT = 4

_READ_SECONDS, _PREPARE_SECONDS, _FINISH_SECONDS = 30e-9, 35e-9, 60e-9
"""Per voxel and modality of the file: decompression, preparation; per voxel: painting and compression of the mask. On
one core of 2023; with the windows, which take most of the time, the forecast is within a factor of 2."""

_SHARE_OF_FREE = 0.9

_log = logging.getLogger(__name__)


def fit_memory(
    predictor: Predictor, plans: list[_P], memory_gb: float | None = None
) -> tuple[Predictor, list[_P], bool]:
    """The predictor, plans with forecasts, and whether several cases fit into memory at once.

    `memory_gb` is the limit of the process, in GiB; None: nearly all free memory. If one case needs more, the returned
    predictor has smaller windows, where possible.
    """
    if not plans:
        return predictor, plans, True
    limit_mb = 1024 * memory_gb if memory_gb else current_rss_mb() + _SHARE_OF_FREE * 1024 * available_memory_gb()
    kept = _kept_by_first(predictor, plans)
    while True:
        try:
            forecaster = Forecaster(predictor, kept)
        except Exception as error:
            if is_memory_error(error):
                free_memory_of(error)
                if (smaller := predictor.with_smaller_window()) is not None:
                    predictor = smaller
                    continue
            _log.debug("no forecast", exc_info=error)  # the cases will report the error
            return predictor, plans, True
        held = forecaster.held_mb
        forecasts = [forecaster.forecast(plan.case) for plan in plans]
        known = [forecast for forecast in forecasts if forecast is not None]
        largest = max((one.peak_mb(held, is_overlapped=False) for one in known), default=0.0)
        if largest <= limit_mb or (smaller := predictor.with_smaller_window()) is None:
            break
        predictor = smaller
    if largest > limit_mb:
        _log.warning("a case is expected to need %.0f MB of %.0f MB: it may fail", largest, limit_mb)
    elif predictor.window != predictor.card.patch_size:
        size = " x ".join(map(str, predictor.window))
        _log.warning("memory is short: windows of %s voxels are used, and logits may differ slightly", size)
    has_room = all(one.peak_mb(held, is_overlapped=True) <= limit_mb for one in known)
    overlaps = has_room and len(plans) > 1
    expected = [None if one is None else one.to_json(held, is_overlapped=overlaps) for one in forecasts]
    pairs = zip(plans, expected, strict=True)
    return predictor, [plan if one is None else replace(plan, predicted=one) for plan, one in pairs], has_room


def _kept_by_first(predictor: Predictor, plans: Sequence[CasePlan]) -> tuple[float, ...] | None:
    """`kept_by_crop` of the first case that can be read."""
    for plan in plans:
        try:
            return kept_by_crop(predictor, plan.case)
        except DataError:
            continue
    return None


def kept_by_crop(predictor: Predictor, case: Case) -> tuple[float, ...]:
    """Share of each axis, after orientation, that the crop leaves of the first image; DataError if it is damaged."""
    config, first = predictor.card.preprocessing, next(iter(case.images.values()))
    if config.crop != "nonzero":
        return (1.0,) * predictor.dims
    volume = read_volume(first.path, first.channel)
    start, stop = crop_box(np.asarray(volume.array)[None], config.crop)
    axes = reorientation_to(volume.grid, config.orientation).axes
    return tuple((stop[axis] - start[axis]) / volume.grid.shape[axis] for axis in axes)


@dataclass(frozen=True)
class Forecast:
    """Expected seconds of a case, and MB of each stage beyond the memory that the process already holds."""

    seconds: float
    read_mb: float
    compute_mb: float

    def peak_mb(self, held_mb: float, *, is_overlapped: bool) -> float:
        """Peak memory of the process; `is_overlapped`: while an equal case is read."""
        return held_mb + (self.read_mb + self.compute_mb if is_overlapped else max(self.read_mb, self.compute_mb))

    def to_json(self, held_mb: float, *, is_overlapped: bool) -> dict[str, float]:
        """The forecast for the manifest."""
        peak_mb = self.peak_mb(held_mb, is_overlapped=is_overlapped)
        return {"peak_rss_mb": round(peak_mb, 1), "seconds": round(self.seconds, 4)}


class Forecaster:
    """Forecasts for one predictor; `held_mb` is the memory of the process between cases.

    `kept` is the share of each axis that the crop leaves (see `kept_by_crop`); None: all.
    """

    def __init__(self, predictor: Predictor, kept: Sequence[float] | None = None) -> None:
        self.predictor = predictor
        self.kept = tuple(kept or (1.0,) * predictor.dims)
        held = current_rss_mb()  # before a window is computed: its memory is added
        self.costs = [window_cost(member) for member in predictor.members]
        self.held_mb = held + sum(cost.memory_mb for cost in self.costs)

    def forecast(self, case: Case) -> Forecast | None:
        """The forecast of a case; None if the header of its first image cannot be read."""
        try:
            grid = read_grid(next(iter(case.images.values())).path)
        except DataError:
            return None
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
        """The loaded image, files during decompression, and the prepared copy with temporary arrays."""
        voxels, channels = prod(grid.shape), len(self.predictor.card.modalities)
        loaded = _FLOAT * voxels * channels
        unpacking = _FLOAT * voxels * min(available_cores(), channels)
        return loaded + max(unpacking, self.predictor.preparing_bytes(self._prepared_shape(grid), grid))

    def _compute_bytes(self, grid: Grid) -> int:
        """The prepared image, one row of windows of logits with the finished slab, the mask and its copies.

        Rows that have room on a GPU are there.
        """
        shape = self._prepared_shape(grid)
        card, rows = self.predictor.card, 0
        for member in self.predictor.members:
            plan, backend = member.plan(shape), torch_backend(member.backend)
            row = plan.logit_bytes * (len(card.outputs) + 1) * plan.slab_voxels * 3 // 2
            if (
                backend is None
                or backend.device.type != "cuda"
                or row / _MB > 1024 * available_memory_gb(backend.device)
            ):
                rows += row
        restored = self.predictor.restoring_bytes(shape, grid)
        return _FLOAT * len(card.modalities) * prod(shape) + rows + restored + 3 * prod(grid.shape)

    def _prepared_shape(self, grid: Grid) -> tuple[int, ...]:
        whole = self.predictor.prepared_shape(grid)
        return tuple(ceil(size * share) for size, share in zip(whole, self.kept, strict=True))


@dataclass(frozen=True)
class WindowCost:
    """Seconds of one window, and MB beside input and logits of those computed at once, which stay allocated."""

    seconds: float
    memory_mb: float


def window_cost(predictor: Predictor) -> WindowCost:
    """The cost of one window of a predictor on this machine: from the cache, or measured now."""
    size = "x".join(map(str, predictor.window))
    backend = predictor.backend
    key = (predictor.card.sha256, backend.name, str(backend.device), size, available_cores(), windows_at_once(backend))
    path = cache_folder() / "costs" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.json"
    try:
        return WindowCost(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        cost = _measured(predictor)
    try:
        with written_atomically(path) as temporary:
            temporary.write_text(json.dumps(asdict(cost)), encoding="utf-8")
    except DataError as error:
        _log.debug("the cost of a window cannot be saved: %s", error)
    return cost


def _measured(predictor: Predictor) -> WindowCost:
    shape = (windows_at_once(predictor.backend), predictor.card.input_channels, *predictor.window)
    window = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    held, peak = current_rss_mb(), peak_rss_mb()
    predictor.backend(window)  # the first call is slower: memory is allocated and kernels are chosen
    began = time.perf_counter()
    logits = predictor.backend(window)
    seconds = (time.perf_counter() - began) / len(window)
    # If an earlier peak was higher than that of this window, only the memory held now is known.
    reached = peak_rss_mb() if peak_rss_mb() > peak else current_rss_mb()
    return WindowCost(round(seconds, 4), round(max(reached - held - logits.nbytes / _MB, 0.0), 1))
