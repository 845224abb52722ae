"""Group norm, with or without SiLU behind it, in one step, for CPUs and channels that lie innermost in memory.

PyTorch's backward of group norm copies such tensors to channels outermost and back. Per channel, group norm is
z = scale x + shift, with scale and shift made of the group's moments (Wu and He 2018, "Group Normalization", eqs. 1
to 6), and its backward is again one multiple of the gradient plus one of x plus a constant. Written so, both are a few
passes over memory; z is computed again instead of kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def normalise(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Group norm of (B, C, *spatial); the same results as PyTorch's layer."""
    if not _is_ours(x, norm):
        return functional.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    result: Tensor = _Normalise.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, False)
    return result


def normalise_and_activate(x: Tensor, norm: nn.GroupNorm, part: slice | None = None) -> Tensor:
    """SiLU of the group norm of (B, C, *spatial); the same results as PyTorch's two layers.

    With `part`, x has those channels of the norm only, which are whole groups of it.
    """
    channels = part or slice(None)
    weight, bias = norm.weight[channels], norm.bias[channels]
    groups = norm.num_groups * x.shape[1] // norm.num_channels
    if not _is_ours(x, norm):
        return functional.silu(functional.group_norm(x, groups, weight, bias, norm.eps))
    result: Tensor = _Normalise.apply(x, weight, bias, groups, norm.eps, True)
    return result


def _is_ours(x: Tensor, norm: nn.GroupNorm) -> bool:
    innermost = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    if x.device.type != "cpu" or x.dtype != norm.weight.dtype or x.shape[1] == 1:
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    return x.stride(1) == 1 and x.is_contiguous(memory_format=innermost)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, activates: bool
    ) -> Tensor:
        batch, channels = x.shape[:2]
        z, mean, rate = torch.native_group_norm(
            x, weight, bias, batch, channels, x.numel() // (batch * channels), groups, epsilon
        )
        ctx.save_for_backward(x, weight, bias, mean, rate)
        ctx.activates = activates
        return functional.silu(z, inplace=True) if activates else z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rate = ctx.saved_tensors
        voxels, dz = _voxels(x), _voxels(grad)
        groups = mean.shape[1]
        mean, rate = (moment.repeat_interleave(x.shape[1] // groups, 1) for moment in (mean, rate))
        scale = rate * weight  # (B, C), as are mean, rate and shift
        shift = bias - mean * scale
        room = torch.empty_like(voxels)
        if ctx.activates:
            dz = torch.ops.aten.silu_backward(dz, torch.addcmul(shift[:, None], voxels, scale[:, None], out=room))
        sum_dz = dz.sum(1)
        sum_dz_x = torch.mul(dz, voxels, out=room).sum(1)
        # Of the normalised x, (x - mean) rate, by which the gradient of the norm is written.
        sum_dz_normalised = (sum_dz_x - mean * sum_dz) * rate
        count = voxels.shape[1] * voxels.shape[2] // groups
        constant = _over_groups(sum_dz * weight, groups) / count
        slope = _over_groups(sum_dz_normalised * weight, groups) / count * rate
        # dx = rate (dz weight - constant - slope (x - mean))
        dx = torch.addcmul(((slope * mean - constant) * rate)[:, None], voxels, (-slope * rate)[:, None], out=room)
        dx.addcmul_(dz, scale[:, None])
        return _volume(dx, x), sum_dz_normalised.sum(0), sum_dz.sum(0), None, None, None


def _voxels(x: Tensor) -> Tensor:
    """(B, C, *spatial) to (B, voxels, C), the same memory where channels lie innermost."""
    return x.movedim(1, -1).reshape(x.shape[0], -1, x.shape[1])


def _volume(voxels: Tensor, like: Tensor) -> Tensor:
    """(B, voxels, C) to (B, C, *spatial) of `like`."""
    return voxels.view(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)


def _over_groups(per_channel: Tensor, groups: int) -> Tensor:
    """Sums over each group, (B, C), repeated for its channels."""
    grouped = per_channel.view(per_channel.shape[0], groups, -1)
    return grouped.sum(2, keepdim=True).expand_as(grouped).reshape(per_channel.shape)
