"""A depthwise 3 x 3 x 3 convolution whose backward does not crawl on a CPU.

PyTorch computes the backward of a grouped Conv3d on a CPU several times slower than the forward. Two identities give
the same gradients through fast kernels: the input's gradient is a depthwise convolution with the mirrored kernel
(stride 1, odd kernel), and the kernel's gradient, plane by plane, is that of a depthwise 2D convolution over slices.
Weights, outputs and gradients are those of `nn.Conv3d(groups=channels)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def depthwise_conv(channels: int, dims: int, kernel: int = 3) -> nn.Module:
    """A bias-free depthwise convolution, stride 1, "same" padding, for (B, C, D, H, W) or (B, C, H, W)."""
    if dims == 2:
        return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
    return DepthwiseConv3d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)


class DepthwiseConv3d(nn.Conv3d):
    """`nn.Conv3d(groups=channels, bias=False)` with the same weights and results, faster to train on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, D, H, W) to (B, C, D, H, W)."""
        return depthwise_convolve(input, self.weight)


def depthwise_convolve(x: Tensor, weight: Tensor) -> Tensor:
    """(B, C, *spatial) with kernels (C, 1, k, ...) of odd size k to (B, C, *spatial); no bias, stride 1."""
    if weight.dim() == 4:
        return functional.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=x.shape[1])
    is_training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not is_training or x.device.type != "cpu" or torch.compiler.is_compiling():
        return _convolve(x, weight)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        return _depthwise(x.to(dtype), weight.to(dtype))
    return _depthwise(x, weight)


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = _Depthwise.apply(x.contiguous(memory_format=torch.channels_last_3d), weight)
    return result


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last_3d)
        grad_x = _convolve(grad, weight.flip(2, 3, 4)) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_gradient(x, grad, weight) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    padding = weight.shape[-1] // 2
    return functional.conv3d(x, weight, padding=padding, groups=x.shape[1])


def _weight_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the kernel, (C, 1, k, k, k): plane `a` of it pairs output slice z with input slice z + a - k // 2."""
    kernel, depth = weight.shape[-1], x.shape[2]
    x_slices = x.permute(0, 2, 1, 3, 4)  # (B, D, C, H, W), each slice channels-last
    grad_slices = grad.permute(0, 2, 1, 3, 4)
    result = torch.zeros_like(weight)
    for plane in range(kernel):
        shift = plane - kernel // 2
        if abs(shift) >= depth:
            continue
        for x_case, grad_case in zip(x_slices, grad_slices, strict=True):
            x_part = x_case[max(shift, 0) : depth + min(shift, 0)]
            grad_part = grad_case[max(-shift, 0) : depth - max(shift, 0)]
            result[:, :, plane] += _plane_gradient(x_part, grad_part, weight[:, :, plane])
    return result


def _plane_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    padding = weight.shape[-1] // 2
    _, gradient, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [padding, padding], [1, 1], False, [0, 0], x.shape[1], [False, True, False]
    )
    result: Tensor = gradient
    return result
