"""Planning: spacing, normalisation, patch, strides, batch and memory mode, from a data fingerprint and a memory budget.

Settings of the user stay. Each choice has a reason, which is written to config.yaml. `plan_rules` has the rules, and
`memory` counts what a choice costs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from segkit.config import Config
from segkit.errors import RequestError
from segkit.labels import LabelScheme, outputs_of
from segkit.losses.dice_cross_entropy import SegmentationLoss
from segkit.models.table import build_model, configure
from segkit.preparing import plan_rules
from segkit.preparing.fingerprint import Fingerprint
from segkit.preparing.memory import ON_CPU, Computation, StepCost, Volumes, estimate_memory_gb, slab_share, step_cost
from segkit.preparing.plan_rules import Shape
from segkit.preparing.preprocessing import PreprocessingConfig
from segkit.preparing.resampling import resampled_shape
from segkit.runtime import Precision, pick_precision

_MEMORY_MODES: tuple[dict[str, object], ...] = (
    {"mode": "plain"},
    {"mode": "checkpoint"},
    {"mode": "reversible"},
    {"mode": "reversible", "chunks": 4},
)
"""Network arguments from fast with much memory to slow with little; those that a family has are tried."""

_COSTS: dict[str, StepCost] = {}  # what `CandidateNetwork.cost` has counted


@dataclass(frozen=True)
class CandidateNetwork:
    """A network family with a size and arguments, for the channels, labels and axes of the data."""

    family: str
    size: str | None
    arguments: dict[str, Any]
    channels: int
    scheme: LabelScheme
    dims: int

    def build(self) -> nn.Module:
        """The network with fresh weights."""
        return build_model(
            self.family,
            in_channels=self.channels,
            out_channels=len(outputs_of(self.scheme)),
            dims=self.dims,
            size=self.size,
            **self.arguments,
        )

    @cached_property
    def divisor(self) -> Shape:
        """The number that each side of a patch must be a multiple of, per axis."""
        with torch.device("meta"):
            divisor: Shape = self.build().divisor  # type: ignore[assignment]
        return divisor

    def with_arguments(self, arguments: Mapping[str, object]) -> CandidateNetwork:
        """The same network with more arguments."""
        return replace(self, arguments={**self.arguments, **arguments})

    def _is_open(self, argument: str) -> bool:
        known = type(configure(self.family, self.size, self.arguments)).model_fields
        return argument in known and argument not in self.arguments

    def can_take(self, arguments: Mapping[str, object]) -> bool:
        """Whether the family has all these arguments with these values, and none of them is set already."""
        if not all(self._is_open(name) for name in arguments):
            return False
        try:
            configure(self.family, self.size, {**self.arguments, **arguments})
        except RequestError:
            return False
        return True

    def suited_to(self, median: Shape, limits: Shape, spacing_mm: tuple[float, ...]) -> CandidateNetwork:
        """With the slice axis for the median case, or strides for patches of it, where the family has such an argument.

        Strides that are 2 everywhere are not set: they are the default of every family.
        """
        if self._is_open("slice_axis") and self.dims == 3:
            return self.with_arguments({"slice_axis": plan_rules.choose_slice_axis(median, spacing_mm)})
        if not self._is_open("strides"):
            return self
        shape = tuple(map(min, median, limits))
        strides = plan_rules.choose_strides(shape, spacing_mm, round(math.log2(max(self.divisor))))
        is_default = all(factor == 2 for stride in strides for factor in stride)
        return self if is_default else self.with_arguments({"strides": strides})

    def loss_function(self) -> SegmentationLoss:
        """The training loss for the label scheme."""
        return SegmentationLoss.of_scheme(self.scheme)

    def cost(self, patch: Shape, computation: Computation) -> StepCost:
        """Cost of a step on a batch of one patch. Counting takes seconds, so each cost is counted once per process."""
        # The number of threads is part of the key: it sets the size of the parts in which a CPU computes a norm.
        key = repr((self, patch, computation, torch.get_num_threads()))
        if key not in _COSTS:
            shape = (1, self.channels, *patch)
            loss = lambda *tensors: self.loss_function()(*tensors)  # noqa: E731  made among the fake tensors
            _COSTS[key] = step_cost(self.build, shape, loss, computation)
        return _COSTS[key]


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
    has_average: bool = True  # whether a moving average of the weights is kept
    shards: int = 1  # number of processes that share the weights, their gradients and the optimiser state
    precision: Literal["auto", Precision] = "auto"

    def network(self, fingerprint: Fingerprint, scheme: LabelScheme) -> CandidateNetwork:
        """The requested network, for these data."""
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

    The largest patch that the data and the limit allow is tried first; to make it fit, memory modes are tried from fast
    to small, then smaller batches, then smaller patches.

    Raises:
        RequestError: the network is unknown, the patch does not suit it, or nothing fits into the memory.
    """
    reasons: dict[str, str] = {}
    request = replace(request, batch_limit=plan_rules.largest_batch(fingerprint.dims, request.batch_limit))
    preprocessing = plan_preprocessing(fingerprint, request.preprocessing, reasons)
    mirror_axes, modality_dropout = request.mirror_axes, request.modality_dropout
    if mirror_axes is None:
        mirror_axes, reasons["augmentation.mirror_axes"] = plan_rules.choose_mirror_axes(scheme, fingerprint.dims)
    if modality_dropout is None:
        modality_dropout, why = plan_rules.choose_modality_dropout(fingerprint.modalities)
        reasons["augmentation.modality_dropout"] = why
    sizes = prepared_shapes(fingerprint, preprocessing)
    median: Shape = tuple(np.ceil(np.median(np.array(sizes), axis=0)).astype(int).tolist())
    spacing = preprocessing.spacing_mm or fingerprint.median_spacing_mm
    limits = plan_rules.patch_limits(spacing, request.patch_limit)
    network = request.network(fingerprint, scheme).suited_to(median, limits, spacing)
    largest = max(sizes, key=math.prod)
    volumes = Volumes(
        channels=len(fingerprint.modalities),
        outputs=len(outputs_of(scheme)),
        prepared_voxels=math.prod(largest),
        source_voxels=max(math.prod(shape) for shape in fingerprint.shapes),
    )
    # The share for kernels of a CPU was fitted in float32.
    on_gpu = device is not None and device.type == "cuda"
    computation = Computation(device, pick_precision(request.precision, device)) if device and on_gpu else ON_CPU

    of_run: Any = {"has_average": request.has_average, "device": device, "shards": request.shards}

    def estimate(candidate: CandidateNetwork, counted: Shape, batch: int, patch: Shape) -> float:
        cost = candidate.cost(counted, computation).scaled(batch * math.prod(patch) / math.prod(counted))
        slab, count = slab_share(largest, patch), min(batch, torch.get_num_threads())
        return estimate_memory_gb(cost, volumes, slab=slab, sample_processes=count, **of_run)

    choice = _first_that_fits(network, request, median, limits, memory_gb, estimate)
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


class _Choice(NamedTuple):
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
    estimate_gb: Callable[[CandidateNetwork, Shape, int, Shape], float],
) -> _Choice:
    divisor = network.divisor
    if request.patch_size is not None:
        _refuse_unsuitable(request.patch_size, divisor)
    largest = request.patch_size or plan_rules.largest_patch(median, limits, divisor)
    patches = [largest] if request.patch_size else list(plan_rules.smaller_patches(largest, median, divisor))
    batches = [request.batch_size] if request.batch_size else list(range(request.batch_limit, 0, -1))
    networks = [network.with_arguments(mode) for mode in _MEMORY_MODES if network.can_take(mode)] or [network]

    smallest_gb = math.inf
    for patch, batch, candidate in itertools.product(patches, batches, networks):
        needed_gb = estimate_gb(candidate, largest, batch, patch)
        if needed_gb <= memory_gb:
            return _Choice(candidate, patch, batch, needed_gb)
        smallest_gb = min(smallest_gb, needed_gb)
    found = f"{request.family} needs {smallest_gb:.1f} GB at the least, but {memory_gb:.1f} GB may be used"
    raise RequestError(found, remedy="Take a smaller network (network.size, --preset) or allow more with --memory")


def _refuse_unsuitable(patch: Shape, divisor: Shape) -> None:
    if len(patch) != len(divisor):
        expected = f"{len(divisor)}, one for each axis of the data"
        raise RequestError(f"planning.patch_size has {len(patch)} sizes", expected=expected)
    if any(size % step for size, step in zip(patch, divisor, strict=True)):
        found, remedy = f"planning.patch_size {_times(patch)} does not suit the network", "Change it, or leave it out"
        raise RequestError(found, expected=f"multiples of {_times(divisor)}", remedy=f"{remedy} to have it planned")


def plan_preprocessing(
    fingerprint: Fingerprint, asked: PreprocessingConfig, reasons: dict[str, str]
) -> PreprocessingConfig:
    """Settings without None; the reason for each choice is added to `reasons`."""
    chosen: dict[str, Any] = {}
    if asked.spacing_mm is None:
        chosen["spacing_mm"], reasons["preprocessing.spacing_mm"] = plan_rules.target_spacing(fingerprint.spacings_mm)
    normalisation = asked.normalisation
    if normalisation is None:
        normalisation, reasons["preprocessing.normalisation"] = plan_rules.choose_normalisation(fingerprint)
        chosen["normalisation"] = normalisation
    if asked.crop is None:
        has_background = normalisation in ("zscore-nonzero", "scale-nonzero")
        chosen["crop"] = "nonzero" if has_background else "none"
        why = "the background contains no signal" if has_background else "0 is an intensity like any other"
        reasons["preprocessing.crop"] = why
    if normalisation == "ct-window":
        measured = fingerprint.foreground
        settings = {"ct_window": (measured.low, measured.high), "ct_mean": measured.mean, "ct_std": measured.std}
        for name, value in settings.items():
            if getattr(asked, name) is None:
                chosen[name], reasons[f"preprocessing.{name}"] = value, "measured in the labelled voxels"
    return asked.model_copy(update=chosen)


def _explain(
    choice: _Choice, request: PlanningRequest, median: Shape, limits: Shape, memory_gb: float, reasons: dict[str, str]
) -> None:
    divisor, use = choice.network.divisor, f"needs about {choice.memory_gb:.1f} of {memory_gb:.1f} GB"
    if request.patch_size is None:
        largest = plan_rules.largest_patch(median, limits, divisor)
        why = f"the median case ({_times(median)}) up to the limit ({_times(limits)})"
        why += f", in multiples of {_times(divisor)}"
        if choice.patch != largest:
            why += f", made smaller than {_times(largest)} to fit; {use}"
        reasons["planning.patch_size"] = why
    if request.batch_size is None:
        reasons["planning.batch_size"] = f"{'the limit' if choice.batch == request.batch_limit else 'what fits'}; {use}"
    added = {name: value for name, value in choice.network.arguments.items() if name not in request.arguments}
    sentences = {
        "strides": "strides of 1 on axes that are coarse or short already",
        "slice_axis": f"slices lie across axis {added.get('slice_axis')}, the coarsest or shortest",
        "mode": f"mode {added.get('mode')} is the fastest that fits",
        "chunks": f"{added.get('chunks')} chunks reduce the transient memory",
    }
    if why := "; ".join(sentence for name, sentence in sentences.items() if name in added):
        reasons["network.arguments"] = why


def _times(numbers: Shape) -> str:
    return " x ".join(map(str, numbers))
