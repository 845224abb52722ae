"""RevMBUNet: a U-Net of reversible MobileNetV2 inverted bottlenecks, in two and three dimensions.

After Pendse et al. 2021 (arXiv 2104.09648), who make the inverted bottlenecks (Sandler et al. 2018, section 3.3) of a
3D U-Net reversible. The paper publishes no code; levels, widths, normalisation and skips are segkit's own design:

    stem -> [ReversibleSequence -> down] x levels -> ReversibleSequence -> [up + skip -> ReversibleSequence] x levels

Channels change in stem, down and up, outside the reversible sequences. Group normalisation gives the same results in
training and evaluation at batch size 1.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from math import gcd
from typing import Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from segkit.config import Config
from segkit.models.blocks import (
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
from segkit.models.kernels.convolutions import (
    depthwise_conv,
    depthwise_convolve,
    pointwise,
    pointwise_convolve,
    step_down,
    step_up,
)
from segkit.models.kernels.fused_group_norm import normalise, normalise_and_activate
from segkit.models.reversible import Mode, ReversibleBlock, ReversibleSequence

REFERENCE = "Pendse et al. 2021, arXiv 2104.09648; our design"


class RevMBUNetConfig(Config):
    """Sizes of a RevMBUNet; level 0 is full resolution."""

    widths: tuple[int, ...] = (32, 64, 128, 256, 320)
    """Channels of each level, even."""
    blocks: int | tuple[int, ...] = 2
    """Reversible blocks of each encoder level (one number for all)."""
    decoder_blocks: int | tuple[int, ...] = 1
    """Reversible blocks of each decoder level, level 0 first (one number for all)."""
    expansion: int = Field(default=2, ge=1)
    """Hidden channels of a bottleneck divided by its input channels."""
    strides: tuple[tuple[int, ...], ...] | None = None
    """Stride of each step down, voxels per axis; None is 2 everywhere."""
    mode: Mode = "plain"
    """Memory mode of the sequences; weights and results are the same in all three."""
    chunks: Literal[1, 2, 4, 8] = 1
    """Parts in which a bottleneck computes its hidden channels, one after another; more parts take less transient
    memory and more time. Weights and results stay the same."""
    supervised_levels: int = Field(default=3, ge=1)
    """Decoder levels with a head of their own while training (deep supervision)."""

    @model_validator(mode="after")
    def _agrees(self) -> RevMBUNetConfig:
        if odd := [width for width in self.widths if width % 2]:
            raise ValueError(f"widths must be even to be split in halves; {odd[0]} is odd")
        check_levels(self.widths, 2, self.strides)
        steps = len(self.widths) - 1
        if isinstance(self.blocks, tuple) and len(self.blocks) != steps + 1:
            raise ValueError(f"blocks names {len(self.blocks)} levels, widths {steps + 1}")
        if isinstance(self.decoder_blocks, tuple) and len(self.decoder_blocks) != steps:
            raise ValueError(f"decoder_blocks names {len(self.decoder_blocks)} levels, but there are {steps}")
        return self


SIZES: dict[str, dict[str, object]] = {
    "tiny": {"widths": (16, 32, 64), "blocks": 1},
    "small": {"widths": (16, 32, 64, 128), "blocks": (1, 2, 2, 2)},
    "base": {"widths": (32, 64, 128, 256, 320)},
    "large": {"widths": (32, 64, 128, 256, 512), "blocks": 4, "decoder_blocks": 2, "expansion": 4},
}


class RevMBUNet(UNet):
    """A U-Net of reversible blocks, under the name that error messages use."""


def build_revmbunet(config: RevMBUNetConfig, in_channels: int, out_channels: int, dims: int) -> RevMBUNet:
    """A RevMBUNet for (B, in_channels, *spatial) inputs of `dims` spatial axes."""
    strides = strides_for(config.strides, len(config.widths) - 1, dims)
    blocks = _per_level(config.blocks, len(config.widths))
    decoder_blocks = _per_level(config.decoder_blocks, len(config.widths) - 1)

    def bottleneck(width: int) -> InvertedBottleneck:
        return InvertedBottleneck(width // 2, config.expansion, dims, config.chunks)

    def sequence(width: int, count: int) -> ReversibleSequence:
        blocks = [ReversibleBlock(bottleneck(width), bottleneck(width)) for _ in range(count)]
        return ReversibleSequence(blocks, config.mode)

    steps = list(zip(itertools.pairwise(config.widths), strides, strict=True))
    encoder = Encoder(
        stem=convolution(dims, in_channels, config.widths[0]),
        downs=[step_down(dims, shallow, deep, stride) for (shallow, deep), stride in steps],
        stages=[sequence(width, count) for width, count in zip(config.widths, blocks, strict=True)],
    )
    decoder = Decoder(
        ups=[step_up(dims, deep, shallow, stride) for (shallow, deep), stride in steps],
        stages=[sequence(width, count) for width, count in zip(config.widths, decoder_blocks, strict=False)],
    )
    supervised = config.widths[: min(config.supervised_levels, len(steps))]
    heads = [pointwise(dims, width, out_channels) for width in supervised]
    return RevMBUNet(encoder, decoder, heads, strides, "encoder.stem.weight")


def _per_level(value: int | tuple[int, ...], levels: int) -> tuple[int, ...]:
    return (value,) * levels if isinstance(value, int) else value


class Encoder(nn.Module):
    """Stem, then a reversible sequence per level with a strided convolution between levels."""

    def __init__(self, stem: nn.Module, downs: Sequence[nn.Module], stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stem = stem
        self.downs = nn.ModuleList(downs)
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, *spatial) to one feature map per level, full resolution first."""
        return encode_levels(channels_innermost(self.stem(channels_innermost(x))), self.downs, self.stages)


class Decoder(nn.Module):
    """Transposed convolution, added skip, reversible sequence, from the deepest level up."""

    def __init__(self, ups: Sequence[nn.Module], stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.ups = nn.ModuleList(ups)
        self.stages = nn.ModuleList(stages)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Encoder features, full resolution first, to decoder features in the same order without the deepest."""
        # A sum has the memory order of its first summand: channels innermost.
        return decode_levels(features, self.ups, self.stages, operator.add)


class InvertedBottleneck(nn.Module):
    """Expand 1 -> depthwise 3 -> project 1 (Sandler et al. 2018), each followed by group norm; linear at the end.

    Groups of hidden channels are independent until the projection sums them, so they can be computed one by one.
    """

    def __init__(self, channels: int, expansion: int, dims: int, chunks: int = 1) -> None:
        super().__init__()
        self.hidden = hidden = channels * expansion
        self.expand = pointwise(dims, channels, hidden, bias=False)
        self.expand_norm = group_norm(hidden)
        self.depthwise = depthwise_conv(hidden, dims)
        self.depthwise_norm = group_norm(hidden)
        self.project = pointwise(dims, hidden, channels, bias=False)
        self.project_norm = group_norm(channels)
        # Its scale starts at 1, not 0: blocks that start as the identity change by about the learning rate a step.
        self.chunks = gcd(chunks, self.expand_norm.num_groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) to the same shape."""
        total = self._projected(x) if self.chunks == 1 else self._projected_in_parts(x)
        return normalise(total, self.project_norm)

    def _projected(self, x: Tensor) -> Tensor:
        x = normalise_and_activate(self.expand(x), self.expand_norm)
        x = normalise_and_activate(self.depthwise(x), self.depthwise_norm)
        return cast(Tensor, self.project(x))

    def _projected_in_parts(self, x: Tensor) -> Tensor:
        size = self.hidden // self.chunks
        parts = [slice(start, start + size) for start in range(0, self.hidden, size)]
        if not torch.is_grad_enabled():
            total = self._part(parts[0], x)
            for part in parts[1:]:
                total += self._part(part, x)
            return total
        summands = (checkpointed(functools.partial(self._part, part), x, within=self) for part in parts)
        return cast(Tensor, functools.reduce(torch.add, summands))

    def _part(self, part: slice, x: Tensor) -> Tensor:
        """The contribution of the hidden channels `part` to the projection, (B, C, *spatial)."""
        x = pointwise_convolve(x, _weight(self.expand)[part])
        x = normalise_and_activate(x, self.expand_norm, part)
        x = depthwise_convolve(x, _weight(self.depthwise)[part])
        x = normalise_and_activate(x, self.depthwise_norm, part)
        return pointwise_convolve(x, _weight(self.project)[:, part])


def _weight(layer: nn.Module) -> Tensor:
    return cast(Tensor, layer.weight)
