"""The U-Nets of nnU-Net 2, with its names and shapes of weights: plain convolutions, or a residual encoder.

PlainConvUNet is the U-Net of Isensee et al. 2021 (Nature Methods 18, "nnU-Net"), ResidualEncoderUNet that of Isensee et
al. 2024 (arXiv 2404.09556, "nnU-Net Revisited"), whose blocks are those of ResNet-D (He et al. 2019, arXiv 1812.01187):

    [stem ->] stage 0 -> stage 1 -> ... -> [transposed convolution, skip, convolutions] x steps, with a head after each

A stage begins with its stride. The shortcut of a block averages over the stride, then a pointwise convolution with a
norm changes the channels. In evaluation the output is that of nnU-Net's own network, bit for bit on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from segkit.config import Config
from segkit.models.blocks import (
    InstanceNorm,
    Mode,
    SegmentationNetwork,
    check_levels,
    checkpointed,
    convolution,
    divisor_of,
    strides_for,
)
from segkit.models.kernels.convolutions import pointwise, step_up

PLAIN_REFERENCE = "Isensee et al. 2021, Nature Methods 18"
RESIDUAL_REFERENCE = "Isensee et al. 2024, arXiv 2404.09556"

_BATCH_NORMS: dict[int, Any] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_AVERAGE_POOLS: dict[int, Any] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}

PerStage = int | tuple[int, ...]


class PlainUNetConfig(Config):
    """Sizes of a PlainConvUNet; stage 0 is full resolution."""

    widths: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    """Channels of each stage."""
    blocks: PerStage = 2
    """Convolutions, or residual blocks, of each stage on the way down (one number for all)."""
    decoder_blocks: PerStage = 2
    """Convolutions of each stage on the way up, the coarsest first, as nnU-Net's plans have them (one number for
    all)."""
    strides: tuple[tuple[int, ...], ...] | None = None
    """Stride of each step down, voxels per axis; None is 2 everywhere."""
    kernels: tuple[tuple[int, ...], ...] | None = None
    """Odd sides of the kernels of each stage, voxels per axis; None is 3 everywhere."""
    norm: Literal["instance", "batch"] = "instance"
    """Norm after each convolution; batch is that of nnUNetTrainerBN."""
    bias: bool = True
    """Bias in the convolutions before a norm, and in the transposed ones."""
    slope: float = Field(default=0.01, ge=0, lt=1)
    """Slope of the leaky ReLU for negative values; 0 is ReLU."""
    mode: Mode = "plain"
    """Memory mode; weights and results are the same in both."""
    supervised_levels: int = Field(default=4, ge=1)
    """Heads that give logits while training, full resolution first; those below are frozen but exist, as in nnU-Net's
    files. nnU-Net trains all but the coarsest, 4 of 5 with six stages."""

    @model_validator(mode="after")
    def _agrees(self) -> PlainUNetConfig:
        check_levels(self.widths, 1, self.strides)
        stages = len(self.widths)
        counts = [("blocks", self.blocks, stages), ("decoder_blocks", self.decoder_blocks, stages - 1)]
        for name, value, expected in [*counts, ("kernels", self.kernels or 3, stages)]:
            given = (value,) * expected if isinstance(value, int) else value
            if len(given) != expected:
                raise ValueError(f"{name} names {len(given)} stages, but {stages} widths need {expected}")
            sides = [side for one in given for side in ((one,) if isinstance(one, int) else one)]
            if min(sides) < 1 or (name == "kernels" and any(side % 2 == 0 for side in sides)):
                raise ValueError(f"{name} are {'odd ' * (name == 'kernels')}whole numbers from 1 on")
        return self


class ResEncUNetConfig(PlainUNetConfig):
    """Sizes of a ResidualEncoderUNet; stage 0 is full resolution."""

    blocks: PerStage = (1, 3, 4, 6, 6, 6)
    decoder_blocks: PerStage = 1
    bottleneck_widths: tuple[int, ...] | None = None
    """Channels between the pointwise convolutions of bottleneck blocks, by stage; None has basic blocks instead."""
    stem_width: int | None = Field(default=None, ge=1)
    """Channels of the stem; None is those of stage 0."""

    @model_validator(mode="after")
    def _has_bottlenecks(self) -> ResEncUNetConfig:
        if self.bottleneck_widths is not None and len(self.bottleneck_widths) != len(self.widths):
            raise ValueError(f"bottleneck_widths names {len(self.bottleneck_widths)} stages, widths {len(self.widths)}")
        return self


PLAIN_SIZES: dict[str, dict[str, object]] = {"tiny": {"widths": (8, 16, 32)}, "base": {}}

RESIDUAL_SIZES: dict[str, dict[str, object]] = {
    "tiny": {"widths": (8, 16, 32), "blocks": (1, 2, 2)},
    "M": {},
    "L": {},
    "XL": {"widths": (32, 64, 128, 256, 320, 320, 320), "blocks": (1, 3, 4, 6, 6, 6, 6)},
}
"""nnU-Net's presets have one rule for the network, and differ in patch and batch, for GPUs of 8, 24 and 40 GB: a stage
is added while feature maps have 8 voxels along an axis. Six stages are for patches of 128 (M) and up to 192 (L) voxels
along their longest axis, seven for 256 (XL)."""


class ConvBlock(nn.Module):
    """A convolution, a norm and, unless `slope` is None, a leaky ReLU."""

    def __init__(self, conv: nn.Module, norm: nn.Module, slope: float | None) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) to (B, C', *spatial / stride)."""
        x = self.norm(self.conv(x))
        # In place: a norm keeps its input for the backward pass, a leaky ReLU its output.
        return x if self.slope is None else functional.leaky_relu_(x, self.slope)


class ResidualBlock(nn.Module):
    """Two blocks, or three in a bottleneck, the last without activation, beside a shortcut; then a leaky ReLU."""

    def __init__(self, blocks: Sequence[ConvBlock], skip: Sequence[nn.Module], slope: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = blocks[:2]
        self.conv3 = blocks[2] if len(blocks) > 2 else None
        self.skip = nn.Sequential(*skip)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) to (B, C', *spatial / stride)."""
        y = self.conv2(self.conv1(x))
        if self.conv3 is not None:
            y = self.conv3(y)
        y += self.skip(x)
        return functional.leaky_relu_(cast(Tensor, y), self.slope)


class Stage(nn.Module):
    """Blocks one after the other, under nnU-Net's name for them: `convs`, or `blocks` of residual ones."""

    def __init__(self, name: str, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) to (B, C', *spatial / stride)."""
        return cast(Tensor, self.get_submodule(self.name)(x))


class Encoder(nn.Module):
    """The stages of the way down, after a stem in a residual encoder."""

    def __init__(self, stages: Sequence[nn.Module], stem: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*stages)


class Decoder(nn.Module):
    """Transposed convolutions, stages and heads of the way up, coarsest first."""

    def __init__(self, ups: Iterable[nn.Module], stages: Iterable[nn.Module], heads: Iterable[nn.Module]) -> None:
        super().__init__()
        self.transpconvs = nn.ModuleList(ups)
        self.stages = nn.ModuleList(stages)
        self.seg_layers = nn.ModuleList(heads)


class _Parts:
    """Makes the parts of a network; `strides` and `kernels` are of the stages on the way down."""

    def __init__(self, config: PlainUNetConfig, dims: int) -> None:
        self.config, self.dims = config, dims
        self.strides = ((1,) * dims, *strides_for(config.strides, len(config.widths) - 1, dims))
        self.kernels = config.kernels or ((3,) * dims,) * len(config.widths)
        if any(len(kernel) != dims for kernel in self.kernels):
            raise ValueError(f"kernels {self.kernels} do not have {dims} entries each")

    def block(
        self,
        inputs: int,
        width: int,
        kernel: Sequence[int] | int,
        stride: Sequence[int] | int = 1,
        *,
        bias: bool | None = None,
        activates: bool = True,
    ) -> ConvBlock:
        conv = convolution(self.dims, inputs, width, kernel, stride, bias=self.config.bias if bias is None else bias)
        norm = _BATCH_NORMS[self.dims](width) if self.config.norm == "batch" else InstanceNorm(width, is_exact=True)
        return ConvBlock(conv, norm, self.config.slope if activates else None)

    def convolutions(self, count: int, inputs: int, stage: int, stride: Sequence[int] | int = 1) -> Stage:
        width, kernel = self.config.widths[stage], self.kernels[stage]
        others = (self.block(width, width, kernel) for _ in range(count - 1))
        return Stage("convs", [self.block(inputs, width, kernel, stride), *others])

    def residual_block(self, inputs: int, stride: Sequence[int], stage: int, narrow: int | None) -> ResidualBlock:
        width, kernel = self.config.widths[stage], self.kernels[stage]
        skip: list[nn.Module] = [_AVERAGE_POOLS[self.dims](tuple(stride))] if max(stride) > 1 else []
        if inputs != width:
            skip.append(self.block(inputs, width, 1, bias=False, activates=False))
        if narrow is None:
            blocks = [self.block(inputs, width, kernel, stride), self.block(width, width, kernel, activates=False)]
        else:
            middle = self.block(narrow, narrow, kernel, stride)
            blocks = [self.block(inputs, narrow, 1), middle, self.block(narrow, width, 1, activates=False)]
        return ResidualBlock(blocks, skip, self.config.slope)

    def encoder(self, in_channels: int) -> Encoder:
        config = self.config
        counts = _per_stage(config.blocks, len(config.widths))
        if not isinstance(config, ResEncUNetConfig):
            inputs = zip((in_channels, *config.widths), counts, self.strides, strict=False)
            stages = (self.convolutions(count, width, n, stride) for n, (width, count, stride) in enumerate(inputs))
            return Encoder([nn.Sequential(stage) for stage in stages])
        width = config.stem_width or config.widths[0]
        stem = Stage("convs", [self.block(in_channels, width, self.kernels[0])])
        narrow: Sequence[int | None] = config.bottleneck_widths or (None,) * len(counts)
        residual = []
        for stage, count in enumerate(counts):
            strides = (self.strides[stage], *((1,) * self.dims,) * (count - 1))
            widths = (width, *(config.widths[stage],) * (count - 1))
            blocks = (
                self.residual_block(*of_block, stage, narrow[stage]) for of_block in zip(widths, strides, strict=True)
            )
            residual.append(Stage("blocks", list(blocks)))
            width = config.widths[stage]
        return Encoder(residual, stem)

    def decoder(self, out_channels: int) -> Decoder:
        widths, dims = self.config.widths, self.dims
        levels = range(len(widths) - 2, -1, -1)
        counts = zip(_per_stage(self.config.decoder_blocks, len(levels)), levels, strict=True)
        steps = ((widths[level + 1], widths[level], self.strides[level + 1]) for level in levels)
        return Decoder(
            (step_up(dims, *step, bias=self.config.bias) for step in steps),
            (self.convolutions(count, 2 * widths[level], level) for count, level in counts),
            (pointwise(dims, widths[level], out_channels) for level in levels),
        )


def _per_stage(value: PerStage, stages: int) -> tuple[int, ...]:
    return (value,) * stages if isinstance(value, int) else value


class NnUNet(SegmentationNetwork):
    """A PlainConvUNet, or a ResidualEncoderUNet if the configuration is of one, with the names of their weights."""

    head_prefixes = ("decoder.seg_layers.",)

    def __init__(self, config: PlainUNetConfig, in_channels: int, out_channels: int, dims: int) -> None:
        super().__init__()
        parts = _Parts(config, dims)
        self.encoder = parts.encoder(in_channels)
        self.decoder = parts.decoder(out_channels)
        self.divisor = divisor_of(parts.strides)
        first = "stem" if isinstance(config, ResEncUNetConfig) else "stages.0.0"
        self.input_weights = (f"encoder.{first}.convs.0.conv.weight",)
        self.mode: Mode = config.mode
        steps = len(config.widths) - 1
        self.spare_heads = tuple(f"decoder.seg_layers.{number}." for number in range(steps - 1))
        self.first_supervised = max(steps - config.supervised_levels, 0)
        self.apply(lambda module: _initialise(module, config.slope))
        for head in self.decoder.seg_layers[: self.first_supervised]:
            # They get no gradient, which data-parallel training would wait for.
            head.requires_grad_(False)

    def encode(self, x: Tensor) -> list[Tensor]:
        """One feature map per stage of the way down."""
        if self.encoder.stem is not None:
            x = self.encoder.stem(x)
        features = []
        for stage in self.encoder.stages:
            x = self._run(stage, stage, x)
            features.append(x)
        return features

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """In training one entry per supervised level, each at its own resolution."""
        *skips, x = self.encode(x)
        levels = []
        for step, (up, stage) in enumerate(zip(self.decoder.transpconvs, self.decoder.stages, strict=True)):
            x = self._run(partial(_join, up, stage), stage, x, skips.pop())
            if self.training and step >= self.first_supervised:
                levels.append(self.decoder.seg_layers[step](x))
        return levels[::-1] if self.training else self.decoder.seg_layers[-1](x)

    def _run(self, function: Callable[..., Tensor], within: nn.Module, *inputs: Tensor) -> Tensor:
        if self.mode == "checkpoint" and torch.is_grad_enabled():
            return cast(Tensor, checkpointed(function, *inputs, within=within))
        return function(*inputs)


def _join(up: nn.Module, stage: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
    """Upsampled map first, skip second, as in the released weights."""
    return cast(Tensor, stage(torch.cat((up(x), skip), dim=1)))


def _initialise(module: nn.Module, slope: float) -> None:
    """He-normal weights and zero biases, as nnU-Net's."""
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=slope)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
