"""Group norm, optionally followed by SiLU, in one step, for CPUs and channels innermost in memory.

PyTorch's backward of group norm copies such tensors to channels outermost and back, and its forward adds up so many
squares in sequence that a gradient in float32 keeps four digits. Per channel, group norm is z = scale x + shift, with
scale and shift from the group's moments (Wu and He 2018, "Group Normalization", eqs. 1 to 6). Forward and backward are
two passes over memory each, in parts that fit into the processor's cache; z is computed again in the backward.

Under bfloat16 autocast x, z and their gradients are bfloat16 in memory; each part is computed in float32.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_PART_BYTES = 256 * 1024  # size of a part for each core, well within its second-level cache


def normalise(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Group norm of (B, C, *spatial); the same results as PyTorch's layer."""
    if not _is_supported(x, norm):
        return cast(Tensor, norm(x))
    return cast(Tensor, _Normalise.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, False))


def normalise_and_activate(x: Tensor, norm: nn.GroupNorm, part: slice | None = None) -> Tensor:
    """SiLU of the group norm of (B, C, *spatial); the same results as PyTorch's two layers.

    With `part`, x has only those channels of the norm, which must be whole groups.
    """
    if part is None and not _is_supported(x, norm):
        return functional.silu(norm(x))
    channels = part or slice(None)
    weight, bias = norm.weight[channels], norm.bias[channels]
    groups = norm.num_groups * x.shape[1] // norm.num_channels
    if not _is_supported(x, norm):
        return functional.silu(functional.group_norm(x, groups, weight, bias, norm.eps))
    return cast(Tensor, _Normalise.apply(x, weight, bias, groups, norm.eps, True))


def _is_supported(x: Tensor, norm: nn.GroupNorm) -> bool:
    innermost = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    is_short = x.dtype == torch.bfloat16 and norm.weight.dtype == torch.float32
    if x.device.type != "cpu" or x.shape[1] == 1 or not (is_short or x.dtype == norm.weight.dtype):
        return False
    if "forward" in vars(norm):  # replaced, see `segkit.pretraining.sparse`
        return False
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        return False
    is_innermost = x.stride(1) == 1 and x.is_contiguous(memory_format=innermost)
    return is_innermost and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, activates: bool
    ) -> Tensor:
        voxels = _voxels(x)
        mean, rate = _moments(voxels, groups, epsilon)
        ctx.save_for_backward(x, weight, bias, mean, rate)
        ctx.groups, ctx.activates = groups, activates
        scale, shift = _affine(mean, rate, weight, bias)
        result = torch.empty_like(x)
        for part, to in _parts(voxels, _voxels(result)):
            is_short = part.dtype != scale.dtype
            z = torch.addcmul(shift, part.to(scale.dtype), scale, out=None if is_short else to)
            if activates:
                functional.silu(z, inplace=True)
            if is_short:
                to.copy_(z)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rate = ctx.saved_tensors
        voxels, gradient = _voxels(x), _voxels(grad)
        scale, shift = _affine(mean, rate, weight, bias)
        dx = torch.empty_like(x)
        dz = _voxels(dx) if ctx.activates else gradient
        sums, products = [], []
        for part, dy, to in _parts(voxels, gradient, dz):
            x_part, dz_part = part.to(scale.dtype), dy.to(scale.dtype)
            if ctx.activates:
                z = torch.addcmul(shift, x_part, scale)
                dz_part = torch.ops.aten.silu_backward.grad_input(dz_part, z, grad_input=z)
                to.copy_(dz_part)
            sums.append(dz_part.sum(1))
            products.append(torch.mul(dz_part, x_part).sum(1))
        sum_dz = torch.stack(sums).double().sum(0)
        # Of the normalised x, (x - mean) rate, by which the gradient of the norm is written.
        sum_dz_normalised = (torch.stack(products).double().sum(0) - mean * sum_dz) * rate
        count = voxels.shape[1] * voxels.shape[2] // ctx.groups
        constant = _over_groups(sum_dz * weight, ctx.groups) / count
        slope = _over_groups(sum_dz_normalised * weight, ctx.groups) / count * rate
        # dx = rate (dz weight - constant - slope (x - mean))
        of_x, offset = ((value * rate).to(scale.dtype)[:, None] for value in (-slope, slope * mean - constant))
        for part, dz_part, to in _parts(voxels, dz, _voxels(dx)):
            sum_of_x = torch.addcmul(offset, part.to(scale.dtype), of_x)
            to.copy_(sum_of_x.addcmul_(dz_part.to(scale.dtype), scale))
        parameters = (value.sum(0).to(weight.dtype) for value in (sum_dz_normalised, sum_dz))
        return dx, *parameters, None, None, None


def _moments(voxels: Tensor, groups: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of the group that each channel is in, (B, C) in float64."""
    sums, squares = [], []
    for (part,) in _parts(voxels):
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        sums.append(wide.sum(1))
        squares.append(wide.square().sum(1))
    count = voxels.shape[1] * voxels.shape[2] // groups
    mean, square = (_over_groups(torch.stack(per_part).double().sum(0), groups) / count for per_part in (sums, squares))
    return mean, (square - mean.square()).clamp_(min=0).add_(epsilon).rsqrt_()


def _affine(mean: Tensor, rate: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift, (B, 1, C), by which the norm of x is scale x + shift."""
    scale = rate * weight
    return scale.to(weight.dtype)[:, None], (bias - mean * scale).to(weight.dtype)[:, None]


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same voxels of each of several (B, voxels, C), in parts that fit into the caches."""
    _, voxels, channels = tensors[0].shape
    size = max(_PART_BYTES * torch.get_num_threads() // (channels * tensors[0].element_size()), 1)
    if isinstance(tensors[0], FakeTensor):
        voxels = min(size, voxels)  # without contents one part is enough
    for start in range(0, voxels, size):
        yield tuple(tensor[:, start : start + size] for tensor in tensors)


def _voxels(x: Tensor) -> Tensor:
    """(B, C, *spatial) to (B, voxels, C), the same memory where channels lie innermost."""
    return x.movedim(1, -1).reshape(x.shape[0], -1, x.shape[1])


def _over_groups(per_channel: Tensor, groups: int) -> Tensor:
    """Sums over each group, (B, C), repeated for its channels."""
    grouped = per_channel.view(per_channel.shape[0], groups, -1)
    return grouped.sum(2, keepdim=True).expand_as(grouped).reshape(per_channel.shape)
