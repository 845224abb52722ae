"""A network that planning considers: which arguments its family can take, and what a training step costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from segkit.errors import RequestError
from segkit.labels import LabelScheme, outputs_of
from segkit.losses.compound import SegmentationLoss
from segkit.models.table import build_model, configure
from segkit.preparing.memory import StepCost, step_cost
from segkit.preparing.plan_rules import Shape, choose_slice_axis, choose_strides

_COSTS: dict[str, StepCost] = {}
"""What `CandidateNetwork.cost` has counted, by network, patch and number of threads."""


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

    def can_take(self, arguments: Mapping[str, object]) -> bool:
        """Whether the family has all these arguments with these values, and none of them is set already."""
        if not all(self._is_open(name) for name in arguments):
            return False
        try:
            configure(self.family, self.size, {**self.arguments, **arguments})
        except RequestError:
            return False
        return True

    def with_arguments(self, arguments: Mapping[str, object]) -> CandidateNetwork:
        """The same network with more arguments."""
        return replace(self, arguments={**self.arguments, **arguments})

    def suited_to(self, shape: Shape, spacing_mm: tuple[float, ...]) -> CandidateNetwork:
        """With the strides, or the slice axis, that suit patches of `shape`, where the family has such an argument.

        Strides that are 2 everywhere are not set: they are the default of every family.
        """
        if self._is_open("slice_axis") and self.dims == 3:
            return self.with_arguments({"slice_axis": choose_slice_axis(shape, spacing_mm)})
        if not self._is_open("strides"):
            return self
        steps = round(math.log2(max(self.divisor)))
        strides = choose_strides(shape, spacing_mm, steps)
        is_usual = all(factor == 2 for stride in strides for factor in stride)
        return self if is_usual else self.with_arguments({"strides": strides})

    def _is_open(self, argument: str) -> bool:
        known = type(configure(self.family, self.size, self.arguments)).model_fields
        return argument in known and argument not in self.arguments

    def cost(self, patch: Shape) -> StepCost:
        """Cost of a step on a batch of one patch. Counting takes seconds, so each cost is counted once per process."""
        # The number of threads is part of the key: it sets the size of the parts in which a CPU computes a norm.
        key = repr((self, patch, torch.get_num_threads()))
        if key not in _COSTS:
            shape = (1, self.channels, *patch)
            _COSTS[key] = step_cost(self.build, shape, lambda *tensors: self.loss_function()(*tensors))
        return _COSTS[key]

    def loss_function(self) -> SegmentationLoss:
        """The training loss for the label scheme."""
        return SegmentationLoss("sigmoid" if self.scheme.has_regions else "softmax", outputs_of(self.scheme))
