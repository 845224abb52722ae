"""Recurrent convolutions and the units made of them, in two and three dimensions.

A recurrent layer (Liang and Hu 2015, "Recurrent convolutional neural network for object recognition", as used by
R2U-Net, arXiv 1802.06955) answers its own output a few times over. With the feed-forward kernel f, the recurrent
kernel r, norm n_s of step s and t steps:

    h_0 = ReLU(n_0(f(x)));   h_s = ReLU(n_s(f(x) + r(h_{s-1})))   for s = 1..t

f(x) does not change between steps and is computed once. In the tied form r is f, which is linear, so that the popular
f(x + h) is f(x) + f(h) with the bias counted once.

The trap of the popular code is one batch norm for all steps: step 0 sees f(x), later steps the larger f(x) + r(h), the
running averages mix the two, and the network in evaluation is another one than was trained (`docs/norm_trap.py`).
Here each step has a norm of its own, as in the public code of the recurrent layer's authors; "batch_shared" rebuilds
the popular form for comparison only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import pi, sqrt
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from segkit.models.blocks import InstanceNorm, channels_innermost, checkpointed, convolution, group_norm

Mode = Literal["plain", "checkpoint"]
"""How a layer spends memory: keep all t + 1 activations, or only its input."""

Share = Literal["separate", "tied"]
"""Whether the recurrent kernel is one of its own, as Liang and Hu have it, or the feed-forward one (popular code)."""

Norm = Literal["instance", "group", "batch_per_step", "batch_shared", "none"]
"""What normalises; "batch_shared" is the trap described above."""

_CONVOLVE: dict[int, Callable[..., Tensor]] = {4: functional.conv2d, 5: functional.conv3d}
_BATCH_NORMS: dict[int, Any] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def build_norm(kind: Norm, channels: int, dims: int) -> nn.Module:
    """One norm of (B, channels, *spatial), with a scale and a shift per channel; the identity for "none"."""
    if kind == "none":
        return nn.Identity()
    if kind == "instance":
        return InstanceNorm(channels)
    if kind == "group":
        return group_norm(channels)
    norm: nn.Module = _BATCH_NORMS[dims](channels)
    return norm


def build_recurrent_convolution(
    channels: int,
    dims: int,
    *,
    steps: int = 2,
    share: Share = "separate",
    norm: Norm = "instance",
    bias: bool = False,
    accumulate: bool = False,
    mode: Mode = "plain",
) -> RecurrentConvolution:
    """A recurrent layer with 3 x 3 (x 3) kernels on (B, channels, *spatial), its loop stable from the start.

    Kernels are drawn as by He et al. 2015, which keeps the mean square of what a ReLU hands on, and then made smaller
    so that without a norm, too, the output keeps the size of the input whatever the number of steps. A recurrent
    kernel is divided by sqrt(steps + 1). A tied kernel meets x + h, whose mean square is 2 + 2 / pi times that of x,
    because what leaves a ReLU has a mean: it is divided by the root of that.
    """
    feed_forward = convolution(dims, channels, channels, bias=bias)
    recurrent = convolution(dims, channels, channels, bias=False) if share == "separate" and steps else None
    _draw(feed_forward, gain=1 / sqrt(2 + 2 / pi) if recurrent is None and steps else 1.0)
    if recurrent is not None:
        _draw(recurrent, gain=1 / sqrt(steps + 1))
    return RecurrentConvolution(
        feed_forward=feed_forward,
        recurrent=recurrent,
        norms=[build_norm(norm, channels, dims) for _ in range(1 if norm == "batch_shared" else steps + 1)],
        steps=steps,
        accumulate=accumulate,
        mode=mode,
    )


@torch.no_grad()
def _draw(layer: nn.Module, gain: float) -> None:
    weight = cast(Tensor, layer.weight)
    nn.init.kaiming_normal_(weight, nonlinearity="relu")
    weight.mul_(gain)
    if isinstance(layer.bias, Tensor):
        nn.init.zeros_(layer.bias)


class RecurrentConvolution(nn.Module):
    """The recurrent layer of this file's formulae: t + 1 activations, of which the last leaves.

    Args:
        feed_forward: Convolution that keeps channels and size; its bias, if any, counts once per step.
        recurrent: The same without bias; None ties it to `feed_forward`.
        norms: One per activation, t + 1 in all, or a single one for all of them.
        steps: t, the number of recurrent steps, from 0 on.
        accumulate: Return the sum of all activations instead of the last.
        mode: "checkpoint" keeps only the input and unfolds the loop again in the backward pass.
    """

    def __init__(
        self,
        *,
        feed_forward: nn.Module,
        recurrent: nn.Module | None,
        norms: Sequence[nn.Module],
        steps: int,
        accumulate: bool = False,
        mode: Mode = "plain",
    ) -> None:
        super().__init__()
        if len(norms) not in (1, steps + 1):
            raise ValueError(f"{steps} recurrent steps need {steps + 1} norms or a single one, but got {len(norms)}")
        self.feed_forward = feed_forward
        self.recurrent = recurrent
        self.norms = nn.ModuleList(norms)
        self.steps = steps
        self.accumulate = accumulate
        self.mode: Mode = mode
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) to the same shape."""
        if self.mode == "checkpoint" and torch.is_grad_enabled():
            result: Tensor = checkpointed(self._unfold, x, within=self)
            return result
        return self._unfold(x)

    def _unfold(self, x: Tensor) -> Tensor:
        driven = self.feed_forward(x)
        h: Tensor = self.activation(self._norm(0)(driven))
        total = h
        for step in range(1, self.steps + 1):
            h = self.activation(self._norm(step)(driven + self._recur(h)))
            if self.accumulate:
                total = total + h
        return total if self.accumulate else h

    def _recur(self, h: Tensor) -> Tensor:
        if self.recurrent is not None:
            answer: Tensor = self.recurrent(h)
            return answer
        # Not through the module: its bias is in f(x) already.
        return _CONVOLVE[h.dim()](h, self.feed_forward.weight, padding=self.feed_forward.padding)

    def _norm(self, step: int) -> nn.Module:
        return self.norms[step if len(self.norms) > 1 else 0]


class RecurrentUnit(nn.Module):
    """Projection, then recurrent layers; with `residual` the projection is added to their output (R2U-Net).

    Without `residual` it is the unit of RU-Net, with the same weights.
    """

    def __init__(self, projection: nn.Module, layers: Sequence[nn.Module], *, residual: bool) -> None:
        super().__init__()
        self.projection = projection
        self.layers = nn.Sequential(*layers)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, *spatial) to (B, C_out, *spatial)."""
        projected = channels_innermost(self.projection(x))
        answer: Tensor = self.layers(projected)
        return projected + answer if self.residual else answer
