"""From a data fingerprint and a memory budget to a plan: spacing, normalisation, patch, strides, batch, memory mode.

What the user has chosen stays. Each choice made here comes with a sentence that says why. `plan_rules` has the rules,
`memory` counts what a choice costs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from segkit.config import Config
from segkit.errors import RequestError
from segkit.labels import LabelScheme, outputs_of
from segkit.preparing.candidate_network import CandidateNetwork
from segkit.preparing.fingerprint import Fingerprint
from segkit.preparing.memory import StepCost, Volumes, estimate_memory_gb
from segkit.preparing.plan_rules import (
    Shape,
    choose_mirror_axes,
    choose_modality_dropout,
    choose_normalisation,
    largest_batch,
    largest_patch,
    patch_limits,
    smaller_patches,
    target_spacing,
)
from segkit.preparing.preprocessing import PreprocessingConfig
from segkit.preparing.resampling import resampled_shape

_MEMORY_MODES: tuple[dict[str, object], ...] = (
    {"mode": "plain"},
    {"mode": "checkpoint"},
    {"mode": "reversible"},
    {"mode": "reversible", "chunks": 4},
)
"""Network arguments from fast with much memory to slow with little; those that a family has are tried."""


@dataclass(frozen=True)
class PlanningRequest:
    """What the caller has decided; None is left to planning. Sizes in voxels."""

    family: str
    size: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    patch_size: Shape | None = None
    patch_limit: int = 128
    batch_size: int | None = None
    batch_limit: int = 2
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    mirror_axes: tuple[int, ...] | None = None
    modality_dropout: float | None = None
    has_average: bool = True
    """Whether a moving average of the weights is kept."""
    shards: int = 1
    """Number of processes that share the weights, their gradients and the optimiser state."""

    def network(self, fingerprint: Fingerprint, scheme: LabelScheme) -> CandidateNetwork:
        """The network that is asked for, for these data."""
        channels = len(fingerprint.modalities)
        return CandidateNetwork(self.family, self.size, dict(self.arguments), channels, scheme, fingerprint.dims)


class Plan(Config):
    """The decisions, and `reasons`: dotted key of the training configuration to one sentence."""

    patch_size: Shape
    batch_size: int
    divisor: Shape
    arguments: dict[str, Any]
    """Network arguments, with the strides and the memory mode where the family has them."""
    preprocessing: PreprocessingConfig
    mirror_axes: tuple[int, ...]
    modality_dropout: float
    memory_gb: float
    """Expected peak in GiB."""
    reasons: dict[str, str]


def plan_training(
    fingerprint: Fingerprint,
    scheme: LabelScheme,
    request: PlanningRequest,
    memory_gb: float,
    device: torch.device | None = None,
) -> Plan:
    """Decide everything the request leaves open, so that the run fits into `memory_gb` GiB.

    The largest patch that the data and the limit allow comes first; to make it fit, memory modes are tried from fast
    to small, then smaller batches, then smaller patches.

    Raises:
        RequestError: the network is unknown, the patch does not suit it, or nothing fits into the memory.
    """
    reasons: dict[str, str] = {}
    request = replace(request, batch_limit=largest_batch(fingerprint.dims, request.batch_limit))
    preprocessing = plan_preprocessing(fingerprint, request.preprocessing, reasons)
    mirror_axes = request.mirror_axes
    if mirror_axes is None:
        mirror_axes, reasons["augmentation.mirror_axes"] = choose_mirror_axes(scheme, fingerprint.dims)
    modality_dropout = request.modality_dropout
    if modality_dropout is None:
        modality_dropout, why = choose_modality_dropout(fingerprint.modalities)
        reasons["augmentation.modality_dropout"] = why
    sizes = prepared_shapes(fingerprint, preprocessing)
    median: Shape = tuple(np.ceil(np.median(np.array(sizes), axis=0)).astype(int).tolist())
    spacing = preprocessing.spacing_mm or fingerprint.median_spacing_mm
    limits = patch_limits(spacing, request.patch_limit)
    network = request.network(fingerprint, scheme).suited_to(tuple(map(min, median, limits)), spacing)
    volumes = Volumes(
        channels=len(fingerprint.modalities),
        outputs=len(outputs_of(scheme)),
        prepared_voxels=max(math.prod(size) for size in sizes),
        source_voxels=max(math.prod(shape) for shape in fingerprint.shapes),
    )
    fit = partial(
        estimate_memory_gb,
        volumes=volumes,
        has_average=request.has_average,
        device=device,
        shards=request.shards,
    )
    choice = _first_that_fits(network, request, median, limits, memory_gb, fit)
    _explain(choice, request, median, limits, memory_gb, reasons)
    return Plan(
        patch_size=choice.patch,
        batch_size=choice.batch,
        divisor=network.divisor,
        arguments=choice.network.arguments,
        preprocessing=preprocessing,
        mirror_axes=mirror_axes,
        modality_dropout=modality_dropout,
        memory_gb=round(choice.memory_gb, 2),
        reasons=reasons,
    )


def prepared_shapes(fingerprint: Fingerprint, preprocessing: PreprocessingConfig) -> list[Shape]:
    """Voxels of each sampled case after preparing."""
    shapes = fingerprint.cropped_shapes if preprocessing.crop == "nonzero" else fingerprint.shapes
    return [
        resampled_shape(shape, spacing, preprocessing.spacing_mm)
        for shape, spacing in zip(shapes, fingerprint.spacings_mm, strict=True)
    ]


@dataclass(frozen=True)
class _Choice:
    network: CandidateNetwork
    patch: Shape
    batch: int
    memory_gb: float


def _first_that_fits(
    network: CandidateNetwork,
    request: PlanningRequest,
    median: Shape,
    limits: Shape,
    memory_gb: float,
    fit: Callable[[StepCost], float],
) -> _Choice:
    """The best combination of patch, batch and memory mode whose expected peak is within the memory."""
    divisor = network.divisor
    _refuse_unsuitable(request.patch_size, divisor)
    largest = request.patch_size or largest_patch(median, limits, divisor)
    patches = [largest] if request.patch_size else list(smaller_patches(largest, median, divisor))
    batches = [request.batch_size] if request.batch_size else list(range(request.batch_limit, 0, -1))
    networks = [network.with_arguments(mode) for mode in _MEMORY_MODES if network.can_take(mode)] or [network]

    smallest_gb = math.inf
    for patch, batch, candidate in itertools.product(patches, batches, networks):
        needed_gb = fit(candidate.cost(largest).scaled(batch * math.prod(patch) / math.prod(largest)))
        if needed_gb <= memory_gb:
            return _Choice(candidate, patch, batch, needed_gb)
        smallest_gb = min(smallest_gb, needed_gb)
    raise RequestError(
        f"{request.family} needs {smallest_gb:.1f} GB at the least, but {memory_gb:.1f} GB may be used",
        remedy="Take a smaller network (network.size, --preset) or allow more with --memory",
    )


def _refuse_unsuitable(patch: Shape | None, divisor: Shape) -> None:
    if patch is None:
        return
    if len(patch) != len(divisor):
        raise RequestError(
            f"planning.patch_size has {len(patch)} sizes", expected=f"{len(divisor)}, one for each axis of the data"
        )
    if any(size % step for size, step in zip(patch, divisor, strict=True)):
        raise RequestError(
            f"planning.patch_size {_times(patch)} does not suit the network",
            expected=f"multiples of {_times(divisor)}",
            remedy="Change it, or leave it out to have it planned",
        )


def plan_preprocessing(
    fingerprint: Fingerprint, asked: PreprocessingConfig, reasons: dict[str, str]
) -> PreprocessingConfig:
    """Settings without None; the reason for each choice is added to `reasons`."""
    chosen: dict[str, Any] = {}
    if asked.spacing_mm is None:
        chosen["spacing_mm"], reasons["preprocessing.spacing_mm"] = target_spacing(fingerprint.spacings_mm)
    normalisation = asked.normalisation
    if normalisation is None:
        normalisation, reasons["preprocessing.normalisation"] = choose_normalisation(fingerprint)
        chosen["normalisation"] = normalisation
    if asked.crop is None:
        has_background = normalisation in ("zscore-nonzero", "scale-nonzero")
        chosen["crop"] = "nonzero" if has_background else "none"
        reasons["preprocessing.crop"] = (
            "the background holds nothing" if has_background else "0 is an intensity here like any other"
        )
    if normalisation == "ct-window":
        foreground = fingerprint.foreground
        measured = {
            "ct_window": (foreground.low, foreground.high),
            "ct_mean": foreground.mean,
            "ct_std": foreground.std,
        }
        for name, value in measured.items():
            if getattr(asked, name) is None:
                chosen[name], reasons[f"preprocessing.{name}"] = value, "measured in the labelled voxels"
    return asked.model_copy(update=chosen)


def _explain(
    choice: _Choice,
    request: PlanningRequest,
    median: Shape,
    limits: Shape,
    memory_gb: float,
    reasons: dict[str, str],
) -> None:
    """Sentences for patch, batch and network arguments."""
    divisor, use = choice.network.divisor, f"needs about {choice.memory_gb:.1f} of {memory_gb:.1f} GB"
    if request.patch_size is None:
        largest = largest_patch(median, limits, divisor)
        what = (
            f"the median case ({_times(median)}) up to the limit ({_times(limits)}), in multiples of {_times(divisor)}"
        )
        reasons["planning.patch_size"] = (
            what if choice.patch == largest else f"{what}, made smaller than {_times(largest)} to fit; {use}"
        )
    if request.batch_size is None:
        is_limit = choice.batch == request.batch_limit
        reasons["planning.batch_size"] = f"the limit; {use}" if is_limit else f"what fits; {use}"
    added = {name: value for name, value in choice.network.arguments.items() if name not in request.arguments}
    sentences = []
    if "strides" in added:
        sentences.append("strides spare axes that are coarse or short already")
    if "slice_axis" in added:
        sentences.append(f"slices lie across axis {added['slice_axis']}, the coarsest or shortest")
    if "mode" in added:
        sentences.append(f"mode {added['mode']} is the fastest that fits")
    if "chunks" in added:
        sentences.append(f"{added['chunks']} chunks spare transient memory")
    if sentences:
        reasons["network.arguments"] = "; ".join(sentences)


def _times(numbers: Shape) -> str:
    return " x ".join(str(number) for number in numbers)
