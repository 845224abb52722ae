"""Convolutions that are faster on a CPU than PyTorch's layers, with the same weights, outputs and gradients.

Pointwise: with channels innermost, PyTorch copies to channels outermost, which takes four times as long as the product.

Depthwise: PyTorch's backward of a grouped Conv3d is several times slower than the forward. Here the input's gradient is
a depthwise convolution with the mirrored kernel (stride 1, odd kernel), and the kernel's gradient, plane by plane, is
that of a depthwise 2D convolution over slices.

Steps between resolutions, that is a convolution whose kernel is its stride, and its transpose: the layer is one matrix
between the channels of a voxel of the coarse grid and those of the voxels of the fine grid that it covers. PyTorch's
backward takes up to twice as long and, on tensors of a gigabyte, falls back to a kernel that did not end in ten
minutes.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class SmallMapsInFloat32(TorchFunctionMode):
    """Inside, convolutions of maps with an axis shorter than the kernel are computed in float32 under autocast.

    In bfloat16 on a CPU the gradient of their weights is wrong, for example at 2 x 8 x 8 voxels and kernel 3: cosine 0
    to 0.6 to the right one, NaN, or a crash (oneDNN in PyTorch 2.14.1, processor with avx512_bf16, 2026-11-30; of 484
    shapes all wrong ones had such an axis). The lowest level of a U-Net often has one.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (torch.conv2d, torch.conv3d) or not _has_short_axis(args[0], args[1]):
            return func(*args, **kwargs or {})
        full = [one.float() if isinstance(one, Tensor) else one for one in args]
        others = {name: one.float() if isinstance(one, Tensor) else one for name, one in (kwargs or {}).items()}
        with torch.autocast("cpu", enabled=False):
            return func(*full, **others)


def _has_short_axis(x: Tensor, weight: Tensor) -> bool:
    return any(size < kernel for size, kernel in zip(x.shape[2:], weight.shape[2:], strict=True))


def pointwise(dims: int, in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Module:
    """A convolution with kernel 1 on (B, in_channels, *spatial)."""
    kind = {2: nn.Conv2d, 3: PointwiseConv3d}[dims]
    return kind(in_channels, out_channels, 1, bias=bias)


class PointwiseConv3d(nn.Conv3d):
    """`nn.Conv3d` with kernel 1."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C_in, D, H, W) to (B, C_out, D, H, W)."""
        return pointwise_convolve(input, self.weight, self.bias)


def pointwise_convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, C_in, *spatial) with weights (C_out, C_in, 1, ...) to (B, C_out, *spatial)."""
    if weight.dim() == 4:
        return functional.conv2d(x, weight, bias)
    is_recorded = torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()
    if not _is_innermost(x) or x.device.type != "cpu" or is_recorded:
        return functional.conv3d(x, weight, bias)
    return functional.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


def depthwise_conv(channels: int, dims: int, kernel: int = 3) -> nn.Module:
    """A bias-free depthwise convolution, stride 1, "same" padding, for (B, C, D, H, W) or (B, C, H, W)."""
    kind = {2: nn.Conv2d, 3: DepthwiseConv3d}[dims]
    return kind(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)


class DepthwiseConv3d(nn.Conv3d):
    """`nn.Conv3d(groups=channels, bias=False)`."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, D, H, W) to (B, C, D, H, W)."""
        return depthwise_convolve(input, self.weight)


def depthwise_convolve(x: Tensor, weight: Tensor) -> Tensor:
    """(B, C, *spatial) with kernels (C, 1, k, ...) of odd size k to (B, C, *spatial); no bias, stride 1."""
    if weight.dim() == 4:
        return functional.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=x.shape[1])
    if not _is_trained_on_cpu(x, weight):
        return _convolve_depthwise(x, weight)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.float32 if _has_short_axis(x, weight) else torch.get_autocast_dtype("cpu")
        x, weight = x.to(dtype), weight.to(dtype)
    with torch.autocast("cpu", enabled=False):
        return cast(Tensor, _Depthwise.apply(x.contiguous(memory_format=torch.channels_last_3d), weight))


def step_down(dims: int, in_channels: int, out_channels: int, stride: Sequence[int]) -> nn.Module:
    """A convolution whose kernel is its stride: each axis of *spatial is divided by its entry of `stride`."""
    kind = {2: nn.Conv2d, 3: StepDown3d}[dims]
    return kind(in_channels, out_channels, tuple(stride), stride=tuple(stride))  # type: ignore[arg-type]


def step_up(dims: int, in_channels: int, out_channels: int, stride: Sequence[int], *, bias: bool = True) -> nn.Module:
    """The transposed convolution that undoes `step_down`: each axis is multiplied by its entry of `stride`."""
    kind = {2: nn.ConvTranspose2d, 3: StepUp3d}[dims]
    return kind(in_channels, out_channels, tuple(stride), stride=tuple(stride), bias=bias)  # type: ignore[arg-type]


class StepDown3d(nn.Conv3d):
    """`nn.Conv3d` whose kernel is its stride."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C_in, D, H, W) to (B, C_out, D / stride, H / stride, W / stride)."""
        divides = all(size % step == 0 for size, step in zip(input.shape[2:], self.stride, strict=True))
        if not divides or not _has_own_backward(input, self.weight):
            return super().forward(input)
        return cast(Tensor, _Down.apply(input, self.weight, self.bias))


class StepUp3d(nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` whose kernel is its stride."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C_in, D, H, W) to (B, C_out, D * stride, H * stride, W * stride)."""
        if output_size is not None or not _has_own_backward(input, self.weight):
            return super().forward(input, output_size)
        return cast(Tensor, _Up.apply(input, self.weight, self.bias))


def _has_own_backward(x: Tensor, weight: Tensor) -> bool:
    is_plain = x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")
    return is_plain and _is_innermost(x) and _is_trained_on_cpu(x, weight)


def _is_trained_on_cpu(x: Tensor, weight: Tensor) -> bool:
    is_training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return is_training and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_innermost(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve_depthwise(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last_3d)
        grad_x = _convolve_depthwise(grad, weight.flip(2, 3, 4)) if ctx.needs_input_grad[0] else None
        grad_weight = _kernel_gradient(x, grad, weight) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def _convolve_depthwise(x: Tensor, weight: Tensor) -> Tensor:
    padding = weight.shape[-1] // 2
    return functional.conv3d(x, weight, padding=padding, groups=x.shape[1])


def _kernel_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the kernel, (C, 1, k, k, k): plane `a` of it pairs output slice z with input slice z + a - k // 2."""
    kernel, channels, depth = weight.shape[-1], x.shape[1], x.shape[2]
    padding, needed = [kernel // 2, kernel // 2], [False, True, False]
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
            _, gradient, _ = torch.ops.aten.convolution_backward(
                grad_part, x_part, weight[:, :, plane], None, [1, 1], padding, [1, 1], False, [0, 0], channels, needed
            )
            result[:, :, plane] += gradient
    return result


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

    The voxels are a view (B, D, H, W, stride * C) of the contiguous (B, D', H', W', C); the matrix is (C_coarse,
    stride * C), of the weights (C_coarse, C, *stride).
    """
    depth, height, width = weight.shape[2:]
    pairs = fine.view(*fine.shape[:3], fine.shape[3] // width, width * fine.shape[4])
    for a, b in itertools.product(range(depth), range(height)):
        yield pairs[:, a::depth, b::height], weight[:, :, a, b].movedim(-1, 1).flatten(1)


def _rows(voxels: Tensor) -> Tensor:
    return voxels.reshape(-1, voxels.shape[-1])
