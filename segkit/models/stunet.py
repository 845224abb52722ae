"""STU-Net: nnU-Net's U-Net made scalable, from 14 million to 1.4 billion parameters.

After Huang et al. 2023 (arXiv 2304.06716) and the released code of uni-medical/STU-Net, with its names and shapes of
weights. Always six resolutions, and `depth` residual blocks at each of them on the way down and on the way up:

    stage 0 -> stage 1 -> ... -> stage 5 -> [upsample, skip, stage] x 5, with a head after each of the last five

Down is the stride of a stage's first block, up is a pointwise convolution and nearest-neighbour upsampling: no weights
depend on the stride, so one set of weights fits every spacing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from segkit.config import Config
from segkit.models.blocks import (
    InstanceNorm,
    Mode,
    SegmentationNetwork,
    check_strides,
    convolution,
    divisor_of,
    strides_for,
)
from segkit.models.kernels.convolutions import pointwise

REFERENCE = "Huang et al. 2023, arXiv 2304.06716"

_MULTIPLES = (1, 2, 4, 8, 16, 16)  # channels of each stage over `width`

_STEPS = len(_MULTIPLES) - 1
_SLOPE = 0.01


class StuNetConfig(Config):
    """Sizes of a STU-Net; stage 0 is full resolution."""

    width: int = Field(default=32, ge=1)
    """Channels of stage 0; the five stages below have 2, 4, 8, 16 and 16 times as many."""
    depth: int = Field(default=1, ge=1)
    """Residual blocks of each stage, on the way down and on the way up."""
    strides: tuple[tuple[int, ...], ...] | None = None
    """Stride of each of the five steps down, voxels per axis; None is 2 everywhere."""
    mode: Mode = "plain"
    """Memory mode; weights and results are the same in both."""
    supervised_levels: int = Field(default=_STEPS, ge=1, le=_STEPS)
    """Heads that give logits while training, full resolution first; those below are frozen but exist, as in the
    released files. 5 trains every weight; 4 is nnU-Net's loss, which gives the coarsest head the weight 0."""

    @model_validator(mode="after")
    def _agrees(self) -> StuNetConfig:
        if self.strides is not None and len(self.strides) != _STEPS:
            raise ValueError(f"strides names {len(self.strides)} steps, but STU-Net has {_STEPS}")
        check_strides(self.strides)
        return self


SIZES: dict[str, dict[str, object]] = {
    "S": {"width": 16, "depth": 1},
    "B": {"width": 32, "depth": 1},
    "L": {"width": 64, "depth": 2},
    "H": {"width": 96, "depth": 3},
}


def _initialise(module: nn.Module) -> None:
    """He-normal weights and zero biases for convolutions: the first release's; the second left PyTorch's default."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, a=_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ResidualBlock(nn.Module):
    """Two 3 x 3 (x 3) convolutions with instance norm beside a shortcut; the released BasicResBlock.

    norm2(conv2(act(norm1(conv1(x))))) + shortcut(x), then act: leaky ReLU of slope 0.01. The shortcut is x itself or,
    with a `stride`, a pointwise convolution without a norm.
    """

    def __init__(self, dims: int, inputs: int, width: int, stride: Sequence[int] | None = None) -> None:
        """`stride` None makes a block that keeps its shape: `inputs` must be `width`."""
        super().__init__()
        self.conv1 = convolution(dims, inputs, width, stride=stride or 1)
        self.norm1 = InstanceNorm(width)
        self.conv2 = convolution(dims, width, width)
        self.norm2 = InstanceNorm(width)
        self.conv3 = convolution(dims, inputs, width, kernel=1, stride=stride) if stride else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, *spatial) to (B, width, *spatial / stride)."""
        # In place where backward does not need the input: a norm keeps its input, a leaky ReLU its output.
        y = functional.leaky_relu_(self.norm1(self.conv1(x)), _SLOPE)
        y = self.norm2(self.conv2(y))
        y += x if self.conv3 is None else self.conv3(x)
        return functional.leaky_relu_(y, _SLOPE)


class Upsampling(nn.Module):
    """A pointwise convolution, then nearest-neighbour upsampling to the size of the skip.

    The released code upsamples first, which gives the same result at eight times the cost.
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """(B, C, *spatial) to (B, C', *size)."""
        x = self.conv(x)
        return x if x.shape[2:] == size else functional.interpolate(x, size=tuple(size), mode="nearest")


class StuNet(SegmentationNetwork):
    """STU-Net for `dims` spatial axes; its attributes have the released names."""

    input_weights = ("conv_blocks_context.0.0.conv1.weight", "conv_blocks_context.0.0.conv3.weight")
    head_prefixes = ("seg_outputs.",)
    encoder_prefix = "conv_blocks_context."

    def __init__(self, config: StuNetConfig, in_channels: int, out_channels: int, dims: int) -> None:
        super().__init__()
        strides = strides_for(config.strides, _STEPS, dims)
        widths = [config.width * multiple for multiple in _MULTIPLES]
        here = (1,) * dims

        def stage(inputs: int, width: int, stride: Sequence[int]) -> nn.Sequential:
            first = ResidualBlock(dims, inputs, width, stride)
            return nn.Sequential(first, *(ResidualBlock(dims, width, width) for _ in range(config.depth - 1)))

        downs = zip((in_channels, *widths), widths, (here, *strides), strict=False)
        # Coarsest first, as the released names count: (channels from below, channels of the skip and the stage).
        ups = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.conv_blocks_context = nn.ModuleList(stage(*down) for down in downs)
        self.upsample_layers = nn.ModuleList(Upsampling(pointwise(dims, *up)) for up in ups)
        self.conv_blocks_localization = nn.ModuleList(stage(2 * width, width, here) for _, width in ups)
        self.seg_outputs = nn.ModuleList(pointwise(dims, width, out_channels) for _, width in ups)
        self.divisor = divisor_of(strides)
        self.mode: Mode = config.mode
        self.first_supervised = _STEPS - config.supervised_levels
        self.apply(_initialise)
        for head in self.seg_outputs[: self.first_supervised]:
            # They get no gradient, which data-parallel training would wait for.
            head.requires_grad_(False)

    def units(self) -> list[nn.Module]:
        """The blocks, which hold nearly all weights and run one after the other, for sharding."""
        return [module for module in self.modules() if isinstance(module, ResidualBlock)]

    def encode(self, x: Tensor) -> list[Tensor]:
        """One feature map per stage of the way down."""
        features = []
        for stage in self.conv_blocks_context:
            for block in stage.children():
                x = self._run(block, x)
            features.append(x)
        return features

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """In training one entry per supervised level, each at its own resolution."""
        *skips, x = self.encode(x)
        levels = []
        for step, (stage, head) in enumerate(zip(self.conv_blocks_localization, self.seg_outputs, strict=True)):
            first, *others = stage.children()
            # Joining is inside the checkpoint, so that the joined map of twice the width is not kept.
            x = self._run(self._join, self.upsample_layers[step], first, x, skips.pop())
            for block in others:
                x = self._run(block, x)
            if self.training and step >= self.first_supervised:
                levels.append(head(x))
        return levels[::-1] if self.training else self.seg_outputs[-1](x)

    def _run(self, unit: Callable[..., Tensor], *inputs: object) -> Tensor:
        if self.mode == "checkpoint" and torch.is_grad_enabled():
            return checkpoint(unit, *inputs, use_reentrant=False, preserve_rng_state=False)
        return unit(*inputs)

    @staticmethod
    def _join(upsampling: nn.Module, block: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
        """Upsampled map first, skip second: the other order has the same shapes and ruins released weights."""
        return cast(Tensor, block(torch.cat((upsampling(x, skip.shape[2:]), skip), dim=1)))
