"""Layers that exist in two and three dimensions, chosen by one number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

_CONVOLUTIONS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def pointwise(dims: int, in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Module:
    """A convolution with kernel 1 on (B, in_channels, *spatial)."""
    layer: nn.Module = _CONVOLUTIONS[dims](in_channels, out_channels, 1, bias=bias)
    return layer


def convolution(dims: int, in_channels: int, out_channels: int, kernel: int = 3) -> nn.Module:
    """A convolution with stride 1 that keeps the size of (B, in_channels, *spatial); `kernel` is odd."""
    layer: nn.Module = _CONVOLUTIONS[dims](in_channels, out_channels, kernel, padding=kernel // 2)
    return layer


def step_down(dims: int, in_channels: int, out_channels: int, stride: Sequence[int]) -> nn.Module:
    """A convolution whose kernel is its stride: each axis of *spatial is divided by its entry of `stride`."""
    layer: nn.Module = _CONVOLUTIONS[dims](in_channels, out_channels, tuple(stride), stride=tuple(stride))
    return layer


def step_up(dims: int, in_channels: int, out_channels: int, stride: Sequence[int]) -> nn.Module:
    """The transposed convolution that undoes `step_down`: each axis is multiplied by its entry of `stride`."""
    layer: nn.Module = _TRANSPOSED[dims](in_channels, out_channels, tuple(stride), stride=tuple(stride))
    return layer


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with the most groups (8 at most) that leave at least two channels each."""
    for groups in (8, 4, 2):
        if channels % groups == 0 and channels // groups >= 2:
            return nn.GroupNorm(groups, channels)
    return nn.GroupNorm(1, channels)
