"""Steps between resolutions, a convolution whose kernel is its stride and its transpose, with a fast backward on a CPU.

Such a kernel touches every voxel of the finer grid once, so the layer is one matrix between the channels of a voxel of
the coarse grid and those of the voxels of the fine grid that it covers. PyTorch's backward takes up to twice as long as
these products and, on tensors of a gigabyte, falls back to a kernel that did not end in ten minutes. Weights, outputs
and gradients are those of PyTorch's layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def step_down(dims: int, in_channels: int, out_channels: int, stride: Sequence[int]) -> nn.Module:
    """A convolution whose kernel is its stride: each axis of *spatial is divided by its entry of `stride`."""
    kind: Any = {2: nn.Conv2d, 3: StepDown3d}[dims]
    layer: nn.Module = kind(in_channels, out_channels, tuple(stride), stride=tuple(stride))
    return layer


def step_up(dims: int, in_channels: int, out_channels: int, stride: Sequence[int]) -> nn.Module:
    """The transposed convolution that undoes `step_down`: each axis is multiplied by its entry of `stride`."""
    kind: Any = {2: nn.ConvTranspose2d, 3: StepUp3d}[dims]
    layer: nn.Module = kind(in_channels, out_channels, tuple(stride), stride=tuple(stride))
    return layer


class StepDown3d(nn.Conv3d):
    """`nn.Conv3d` whose kernel is its stride."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C_in, D, H, W) to (B, C_out, D / stride, H / stride, W / stride)."""
        divides = all(size % step == 0 for size, step in zip(input.shape[2:], self.stride, strict=True))
        if not divides or not _is_ours(input, self.weight):
            return super().forward(input)
        result: Tensor = _Down.apply(input, self.weight, self.bias)
        return result


class StepUp3d(nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` whose kernel is its stride."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C_in, D, H, W) to (B, C_out, D * stride, H * stride, W * stride)."""
        if output_size is not None or not _is_ours(input, self.weight):
            return super().forward(input, output_size)
        result: Tensor = _Up.apply(input, self.weight, self.bias)
        return result


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    is_training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not is_training or x.device.type != "cpu" or x.dtype != weight.dtype:
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    return x.stride(1) == 1 and x.shape[1] > 1


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.conv3d(x, weight, bias, stride=tuple(weight.shape[2:]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        fine, coarse = x.movedim(1, -1).contiguous(), _rows(grad.movedim(1, -1))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(fine)
            for part, matrix in _offsets(grad_x, weight):
                part.copy_((coarse @ matrix).view(part.shape))
            grad_x = grad_x.movedim(-1, 1)
        grad_weight = _weight_gradient(coarse, fine, weight) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, coarse.sum(0) if ctx.needs_input_grad[2] else None


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.conv_transpose3d(x, weight, bias, stride=tuple(weight.shape[2:]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        fine, coarse = grad.movedim(1, -1).contiguous(), _rows(x.movedim(1, -1))
        grad_x = None
        if ctx.needs_input_grad[0]:
            rows = torch.zeros_like(coarse)
            for part, matrix in _offsets(fine, weight):
                rows.addmm_(_rows(part), matrix.T)
            grad_x = rows.view(x.movedim(1, -1).shape).movedim(-1, 1)
        grad_weight = _weight_gradient(coarse, fine, weight) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, _rows(fine).sum(0) if ctx.needs_input_grad[2] else None


def _weight_gradient(coarse: Tensor, fine: Tensor, weight: Tensor) -> Tensor:
    """Of voxels of the coarse grid (voxels, C) and of the fine grid (B, D, H, W, C), in the shape of the weight."""
    products = [coarse.T @ _rows(part) for part, _ in _offsets(fine, weight)]
    coarse_channels, fine_channels, *stride = weight.shape
    result = torch.stack(products, 1).view(coarse_channels, *stride, fine_channels)
    return result.movedim(-1, 1).contiguous()


def _offsets(fine: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each offset within the stride along the first two axes: the voxels of the fine grid and their matrix.

    The voxels are a view (B, D, H, W, stride * C) of (B, D', H', W', C), which is contiguous: those of one stride along
    the last axis lie side by side. The matrix is (C_coarse, stride * C), of the (C_coarse, C, *stride) of both layers.
    """
    depth, height, width = weight.shape[2:]
    pairs = fine.view(*fine.shape[:3], fine.shape[3] // width, width * fine.shape[4])
    for a, b in itertools.product(range(depth), range(height)):
        yield pairs[:, a::depth, b::height], weight[:, :, a, b].movedim(-1, 1).flatten(1)


def _rows(voxels: Tensor) -> Tensor:
    """(B, D, H, W, C) to (voxels, C)."""
    return voxels.reshape(-1, voxels.shape[-1])
