"""The network of a plan before it is trained: what its arguments may be, what a step costs, how long it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
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
"""What `PlannedNetwork.cost` has counted, by network, patch and number of threads."""


@dataclass(frozen=True)
class PlannedNetwork:
    """A network family with arguments, for data of so many channels, outputs and axes."""

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
        """What each axis of a patch must be a multiple of."""
        with torch.device("meta"):
            divisor: Shape = self.build().divisor  # type: ignore[assignment]
        return divisor

    def can_take(self, arguments: Mapping[str, object]) -> bool:
        """Whether the family has all these arguments with these values, and nobody has set one of them."""
        if not all(self._is_open(name) for name in arguments):
            return False
        try:
            configure(self.family, self.size, {**self.arguments, **arguments})
        except RequestError:
            return False
        return True

    def with_arguments(self, arguments: Mapping[str, object]) -> PlannedNetwork:
        """The same network with more arguments."""
        return replace(self, arguments={**self.arguments, **arguments})

    def suited_to(self, shape: Shape, spacing_mm: tuple[float, ...]) -> PlannedNetwork:
        """With the strides, or the axis of the slices, that suit patches of `shape`, where the family lets us choose.

        Strides that are 2 everywhere stay unsaid: they are every family's own.
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
        """Cost of a step on one patch of a batch; counting takes seconds, so it is done once in a process."""
        # The threads decide how large the parts are in which a CPU computes a norm.
        key = repr((self, patch, torch.get_num_threads()))
        if key not in _COSTS:
            shape = (1, self.channels, *patch)
            _COSTS[key] = step_cost(self.build, shape, lambda *tensors: self.loss_function()(*tensors))
        return _COSTS[key]

    def loss_function(self) -> SegmentationLoss:
        """The training loss for the label scheme."""
        return SegmentationLoss("sigmoid" if self.scheme.has_regions else "softmax", outputs_of(self.scheme))


def trial_step(network: PlannedNetwork, patch: Shape, batch_size: int, device: torch.device) -> Callable[[], None]:
    """One training step on noise, ready to be timed: forward, loss, backward, Adam."""
    model, loss = network.build().to(device).train(), network.loss_function().to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)
    image = torch.randn(batch_size, network.channels, *patch, device=device)
    labels = torch.zeros(batch_size, *patch, dtype=torch.uint8, device=device)

    def step() -> None:
        torch.autograd.backward(loss(model(image), labels))
        optimiser.step()
        optimiser.zero_grad()
        _wait_for(device)

    return step


def trial_window(network: PlannedNetwork, patch: Shape, device: torch.device) -> Callable[[], None]:
    """One inference window of noise, ready to be timed."""
    model = network.build().to(device).eval()
    image = torch.randn(1, network.channels, *patch, device=device)

    def window() -> None:
        with torch.inference_mode():
            model(image)
        _wait_for(device)

    return window


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], repeats: int = 2) -> float:
    """Seconds that `work` takes, the best of `repeats` after one call that warms up."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
