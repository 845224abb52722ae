"""R2U-Net and RU-Net: U-Nets of recurrent convolutions, with and without a residual around them.

After Alom et al. 2018 (arXiv 1802.06955): recurrent layers with kernels of their own for input and recurrence, two in
a unit, a residual around both. Norm, up-sampling and initialisation are segkit's own choice. Size "parity" is the most
copied public implementation: one kernel and one batch norm for all steps, nearest-neighbour up-sampling, five levels.

    unit -> [max pool -> unit] x steps down -> [up, skip concatenated -> unit] x steps up -> head

A unit projects to its level's width with a 1 x 1 (x 1) convolution and applies two recurrent layers. A recurrent layer
(Liang and Hu 2015, "Recurrent convolutional neural network for object recognition") is applied to its own output for t
steps. With the feed-forward kernel f, the recurrent kernel r and the norm n_s of step s:

    h_0 = ReLU(n_0(f(x)));   h_s = ReLU(n_s(f(x) + r(h_{s-1})))   for s = 1..t

In the tied form r is f, which is linear, so that the popular f(x + h) is f(x) + f(h) with the bias counted once. With
one batch norm for all steps, step 0 sees f(x), later steps the larger f(x) + r(h), and the running averages mix the
two, so that evaluation differs from training (`benchmarks/norm_trap.py`). Here each step has its own norm, as in the
public code of the recurrent layer's authors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from math import pi, sqrt
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from segkit.config import Config
from segkit.models.blocks import (
    InstanceNorm,
    Mode,
    UNet,
    channels_innermost,
    check_levels,
    checkpointed,
    convolution,
    decode_levels,
    encode_levels,
    group_norm,
    strides_for,
)
from segkit.models.kernels.convolutions import pointwise, step_up

REFERENCE = "Alom et al. 2018, arXiv 1802.06955"

Share = Literal["separate", "tied"]
Norm = Literal["instance", "group", "batch_per_step", "batch_shared", "none"]
"""Norm of a recurrent layer; "batch_shared" is wrong in evaluation, see above."""

_MAX_POOLS: dict[int, Any] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_BATCH_NORMS: dict[int, Any] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_CONVOLVE: dict[int, Callable[..., Tensor]] = {4: functional.conv2d, 5: functional.conv3d}


class R2UNetConfig(Config):
    """Sizes of an R2U-Net or RU-Net; level 0 is full resolution."""

    widths: tuple[int, ...] = (16, 32, 64, 128)
    """Channels of each level."""
    steps: int = Field(default=2, ge=0)
    """Recurrent steps t of each layer, which makes t + 1 activations; 0 is a plain convolution."""
    share: Share = "separate"
    """Whether the recurrent kernel is one of its own (Liang and Hu) or tied to the feed-forward one (popular code)."""
    norm: Norm = "instance"
    """Norm before each ReLU, one per step; "batch_shared" shares one over the steps, which breaks evaluation."""
    accumulate: bool = False
    """Sum the activations of all steps instead of handing on the last."""
    residual: bool = True
    """Add the projected input of a unit to its output: R2U-Net; without it RU-Net."""
    bias: bool | None = None
    """Bias in the 3 x 3 (x 3) convolutions; None has one only where no norm follows to take it away."""
    projection: Literal["when_needed", "always"] = "when_needed"
    """Whether a unit whose width does not change has a 1 x 1 (x 1) convolution in front of it as well."""
    up: Literal["transposed", "nearest"] = "transposed"
    """Up-sampling: transposed convolution, or repeated voxels followed by 3 x 3 (x 3) convolution, norm and ReLU."""
    strides: tuple[tuple[int, ...], ...] | None = None
    """Stride of each step down, voxels per axis; None is 2 everywhere."""
    mode: Mode = "plain"
    """Memory mode of the recurrent layers; weights and results are the same in both."""
    supervised_levels: int = Field(default=1, ge=1)
    """Decoder levels with a head of their own while training (deep supervision). One, because vessels thinner than a
    coarse voxel are not in the coarse targets."""

    @model_validator(mode="after")
    def _agrees(self) -> R2UNetConfig:
        check_levels(self.widths, 1, self.strides)
        steps = len(self.widths) - 1
        if self.supervised_levels > steps:
            raise ValueError(f"supervised_levels is {self.supervised_levels}, but {steps + 1} widths give {steps}")
        return self

    def has_bias(self) -> bool:
        """Whether the 3 x 3 (x 3) convolutions have a bias."""
        return self.norm == "none" if self.bias is None else self.bias


SIZES: dict[str, dict[str, object]] = {
    "tiny": {"widths": (8, 16, 32)},
    "small": {"widths": (16, 32, 64, 128)},
    "base": {"widths": (32, 64, 128, 256)},
    "large": {"widths": (64, 128, 256, 512)},
    "parity": {
        "widths": (64, 128, 256, 512, 1024),
        "share": "tied",
        "norm": "batch_shared",
        "bias": True,
        "projection": "always",
        "up": "nearest",
    },
}
""""parity" has 39,091,393 parameters in 2D with 3 inputs and 1 output. Use it for comparison only: see `Norm`."""

RUNET_SIZES: dict[str, dict[str, object]] = {size: {**values, "residual": False} for size, values in SIZES.items()}
"""The same without the residual."""


class R2UNet(UNet):
    """A U-Net of recurrent units, under the name that error messages use."""


def build_r2unet(config: R2UNetConfig, in_channels: int, out_channels: int, dims: int) -> R2UNet:
    """An R2U-Net (RU-Net where `config.residual` is off) for (B, in_channels, *spatial) of `dims` spatial axes."""
    strides = strides_for(config.strides, len(config.widths) - 1, dims)
    entering = [in_channels, *config.widths]
    steps = list(zip(itertools.pairwise(config.widths), strides, strict=True))
    encoder = Encoder(
        units=[_unit(config, dims, *pair) for pair in itertools.pairwise(entering)],
        pools=[_MAX_POOLS[dims](stride) for stride in strides],
    )
    decoder = Decoder(
        ups=[_up(config, dims, deep, shallow, stride) for (shallow, deep), stride in steps],
        units=[_unit(config, dims, 2 * width, width) for width in config.widths[:-1]],
    )
    heads = [pointwise(dims, width, out_channels) for width in config.widths[: config.supervised_levels]]
    has_projection = not isinstance(encoder.units[0].projection, nn.Identity)
    sees_image = "projection" if has_projection else "layers.0.feed_forward"
    return R2UNet(encoder, decoder, heads, strides, f"encoder.units.0.{sees_image}.weight")


def _unit(config: R2UNetConfig, dims: int, in_channels: int, channels: int) -> RecurrentUnit:
    projection: nn.Module = nn.Identity()
    if in_channels != channels or config.projection == "always":
        projection = pointwise(dims, in_channels, channels)
        # The residual stream passes here: a linear map keeps its scale.
        nn.init.kaiming_normal_(cast(Tensor, projection.weight), nonlinearity="linear")
    layers = [build_recurrent_convolution(channels, dims, config) for _ in range(2)]
    return RecurrentUnit(projection, layers, residual=config.residual)


def _up(config: R2UNetConfig, dims: int, deep: int, shallow: int, stride: Sequence[int]) -> nn.Module:
    if config.up == "transposed":
        return step_up(dims, deep, shallow, stride)
    return nn.Sequential(
        nn.Upsample(scale_factor=tuple(float(factor) for factor in stride)),
        convolution(dims, deep, shallow, bias=config.has_bias()),
        build_norm(config.norm, shallow, dims),
        nn.ReLU(),
    )


class Encoder(nn.Module):
    """A recurrent unit per level, with max pooling between levels."""

    def __init__(self, units: Sequence[nn.Module], pools: Sequence[nn.Module]) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)
        self.pools = nn.ModuleList(pools)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, *spatial) to one feature map per level, full resolution first."""
        return encode_levels(x, self.pools, self.units)


class Decoder(nn.Module):
    """Up-sampling, concatenation behind the skip, recurrent unit, from the deepest level up."""

    def __init__(self, ups: Sequence[nn.Module], units: Sequence[nn.Module]) -> None:
        super().__init__()
        self.ups = nn.ModuleList(ups)
        self.units = nn.ModuleList(units)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Encoder features, full resolution first, to decoder features in the same order without the deepest."""
        return decode_levels(features, self.ups, self.units, lambda skip, x: torch.cat((skip, x), dim=1))


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


def build_recurrent_convolution(channels: int, dims: int, config: R2UNetConfig) -> RecurrentConvolution:
    """A recurrent layer with 3 x 3 (x 3) kernels on (B, channels, *spatial), stable from the start.

    Kernels are drawn as by He et al. 2015 and scaled so that also without a norm the output keeps the size of the
    input for any number of steps: a recurrent kernel is divided by sqrt(steps + 1); a tied one is applied to x + h,
    whose mean square is 2 + 2 / pi times that of x because the output of a ReLU has a mean, and is divided by its root.
    """
    steps = config.steps
    feed_forward = convolution(dims, channels, channels, bias=config.has_bias())
    recurrent = convolution(dims, channels, channels, bias=False) if config.share == "separate" and steps else None
    _draw(feed_forward, gain=1 / sqrt(2 + 2 / pi) if recurrent is None and steps else 1.0)
    if recurrent is not None:
        _draw(recurrent, gain=1 / sqrt(steps + 1))
    norms = [build_norm(config.norm, channels, dims) for _ in range(1 if config.norm == "batch_shared" else steps + 1)]
    return RecurrentConvolution(feed_forward, recurrent, norms, steps, accumulate=config.accumulate, mode=config.mode)


@torch.no_grad()
def _draw(layer: nn.Module, gain: float) -> None:
    weight = cast(Tensor, layer.weight)
    nn.init.kaiming_normal_(weight, nonlinearity="relu")
    weight.mul_(gain)
    if isinstance(layer.bias, Tensor):
        nn.init.zeros_(layer.bias)


class RecurrentConvolution(nn.Module):
    """The recurrent layer of the formulae above for t = `steps`; `norms` one per activation, or a single one for all.

    `recurrent` None ties it to `feed_forward`. `accumulate` returns the sum of all activations instead of the last.
    """

    def __init__(
        self,
        feed_forward: nn.Module,
        recurrent: nn.Module | None,
        norms: Sequence[nn.Module],
        steps: int,
        *,
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
            return cast(Tensor, checkpointed(self._unfold, x, within=self))
        return self._unfold(x)

    def _unfold(self, x: Tensor) -> Tensor:
        norms = list(self.norms) if len(self.norms) > 1 else [self.norms[0]] * (self.steps + 1)
        driven = self.feed_forward(x)
        h: Tensor = self.activation(norms[0](driven))
        total = h
        for step in range(1, self.steps + 1):
            h = self.activation(norms[step](driven + self._recur(h)))
            if self.accumulate:
                total = total + h
        return total if self.accumulate else h

    def _recur(self, h: Tensor) -> Tensor:
        if self.recurrent is not None:
            return cast(Tensor, self.recurrent(h))
        # Without its bias, which is in f(x) already.
        return _CONVOLVE[h.dim()](h, self.feed_forward.weight, padding=self.feed_forward.padding)


class RecurrentUnit(nn.Module):
    """Projection, then recurrent layers; with `residual` (R2U-Net) the projection is added to their output."""

    def __init__(self, projection: nn.Module, layers: Sequence[nn.Module], *, residual: bool) -> None:
        super().__init__()
        self.projection = projection
        self.layers = nn.Sequential(*layers)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, *spatial) to (B, C_out, *spatial)."""
        projected = channels_innermost(self.projection(x))
        result: Tensor = self.layers(projected)
        return projected + result if self.residual else result
