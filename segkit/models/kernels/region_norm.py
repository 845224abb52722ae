"""Region normalisation: each region of a feature map by its own mean and deviation (Yu et al. 2020, arXiv 1911.10375).

One mean over an image with a hole mixes known and generated voxels. So the voxels of each region k, S of the N of a
map, are normalised separately:

    y = (x - mean_k) / sqrt(variance_k + epsilon N / S)

The released code fills the other regions with the mean, applies batch norm and multiplies by sqrt(S / N), which is this
formula; the factor N / S damps small regions. Here moments, scale and shift are products of the map with one row of
numbers per region, in parts that fit into the processor's cache. No second map is made, and y is computed again in the
backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from segkit.runtime import exact_type

Statistics = Literal["instance", "batch"]
"""Whether mean and deviation are those of a region in one image, or in all images of the batch."""

_PART_BYTES = {"cpu": 1024**2, "cuda": 64 * 1024**2}
"""Size of a part: on a CPU about a second-level cache (`benchmarks/region_norm.py` takes a fifth longer with a quarter
of it), on a GPU little compared with the map."""


class Rule(NamedTuple):
    """Settings of the norm."""

    stats: Statistics = "instance"
    epsilon: float = 1e-5
    min_voxels: int = 8  # A region of fewer voxels gets the moments of all regions together


def masks_of(x: Tensor, regions: Tensor, count: int) -> Tensor:
    """Regions of a map x (B, C, *spatial) as rows of zeros and ones, (B, count, voxels), in the type x is summed in.

    `regions` (B, 1, *spatial) are booleans or whole numbers from 0 to `count` - 1; any other number is in no region,
    and the norm is 0 there. A region may be empty.

    Raises:
        ValueError: the regions are not numbers, or not on the grid of x, or x is not a map.
    """
    expected = (x.shape[0], 1, *x.shape[2:])
    if x.dim() not in (4, 5) or regions.shape != expected:
        found = f"regions of shape {tuple(regions.shape)} for a map of shape {tuple(x.shape)}"
        raise ValueError(f"{found}; expected (B, 1, *spatial) for (B, C, *spatial) in 2D or 3D")
    if regions.is_floating_point():
        raise ValueError(f"regions of type {regions.dtype}; expected booleans or whole numbers")
    numbers = torch.arange(count, device=x.device)[None, :, None]
    return (regions.flatten(2) == numbers).to(_sum_type(x))


def normalise_regions(x: Tensor, masks: Tensor, weights: Tensor, gain: Tensor, bias: Tensor, rule: Rule) -> Tensor:
    """Region norm in its general form: sum over k of weights_k (gain_k (x - mean_k) / deviation_k + bias_k).

    `x` is (B, C, *spatial), 2D or 3D, of any floating type; sums are taken in float32 at least. `masks` (B, R, voxels),
    one-hot over R, are the voxels of each region, for the moments, without a gradient. `weights`, of the same shape,
    are usually the masks; an additional row is added to every channel. `gain` and `bias` are (C, R).

    Raises:
        ValueError: the statistics of the rule are not known.
    """
    if rule.stats not in get_args(Statistics):
        raise ValueError(f"statistics {rule.stats!r} are not one of {', '.join(get_args(Statistics))}")
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        return _by_formula(x, masks, weights, gain, bias, rule)
    return cast(Tensor, _RegionNorm.apply(_dense(x), masks, weights, gain, bias, rule))


def pool_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    """X itself, and the mean and largest of the channels of each voxel, (B, 2, *spatial), for a following region norm.

    If the norm uses the returned x, the gradient of the pooled maps is added in place: one map fewer in the backward.
    """
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        return x, torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)
    same, pooled = _Pool.apply(_dense(x))
    return same, pooled


def _by_formula(x: Tensor, masks: Tensor, weights: Tensor, gain: Tensor, bias: Tensor, rule: Rule) -> Tensor:
    """The same in operations that compilers fuse and ONNX has."""
    with _full_precision(x):
        voxels = x.flatten(2).to(masks.dtype)
        sizes = masks.sum(2)[:, None]
        means = voxels @ masks.transpose(1, 2) / sizes.clamp(min=1)
        squares = [((voxels - means[:, :, k, None]).square() * masks[:, None, k]).sum(2) for k in range(masks.shape[1])]
        moments = _Moments(means, torch.stack(squares, 2), sizes)
        scale, shift = _scale_and_shift(moments, gain, bias, rule, voxels.shape[2], weights.shape[1])
        return (voxels * (scale @ weights) + shift @ weights).to(x.dtype).view(x.shape)


class _Moments(NamedTuple):
    """Of each image, channel and region: mean, sum of squared differences, number of voxels."""

    means: Tensor  # (B, C, R)
    squares: Tensor  # (B, C, R)
    sizes: Tensor  # (B, 1, R)

    def pooled(self, axis: int) -> _Moments:
        """Those of all images (axis 0) or regions (axis 2) together; that axis stays, with one entry."""
        total = self.sizes.sum(axis, keepdim=True)
        mean = (self.means * self.sizes).sum(axis, keepdim=True) / total.clamp(min=1)
        squares = self.squares + self.sizes * (self.means - mean).square()
        return _Moments(mean, squares.sum(axis, keepdim=True), total)


def _scale_and_shift(
    moments: _Moments, gain: Tensor, bias: Tensor, rule: Rule, voxels: int, rows: int
) -> tuple[Tensor, Tensor]:
    """Scale and shift, (B, C, rows), by which region k becomes scale_k x + shift_k; a row more is the shift 1."""
    batch = moments.means.shape[0]
    if rule.stats == "batch":
        moments, voxels = moments.pooled(0), voxels * batch
    together, is_small = moments.pooled(2), moments.sizes < rule.min_voxels
    means, squares, sizes = (torch.where(is_small, *pair) for pair in zip(together, moments, strict=True))
    sizes = sizes.clamp(min=1)
    scale = ((squares + rule.epsilon * voxels) / sizes).rsqrt() * gain.to(means.dtype)
    shift = bias.to(means.dtype) - means * scale
    scale, shift = scale.expand(batch, -1, -1), shift.expand(batch, -1, -1)
    if rows > scale.shape[2]:
        one = torch.ones_like(scale[:, :, :1])
        scale, shift = torch.cat((scale, 0 * one), 2), torch.cat((shift, one), 2)
    return scale, shift


class _RegionNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, masks: Tensor, weights: Tensor, gain: Tensor, bias: Tensor, rule: Rule) -> Tensor:
        with _full_precision(x):
            moments = _sum_moments(x, masks)
            scale, shift = _scale_and_shift(moments, gain, bias, rule, masks.shape[2], weights.shape[1])
            scale, shift = scale.to(masks.dtype), shift.to(masks.dtype)
            result = torch.empty_like(x)
            for image, part, weight, to in _parts(x, weights, result):
                _multiply_add(shift[image] @ weight, part, scale[image] @ weight, to)
        ctx.save_for_backward(x, masks, weights, gain, bias, *moments)
        ctx.rule = rule
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, masks, weights, gain, bias, means, squares, sizes = ctx.saved_tensors
        with _full_precision(x):
            small = [value.detach().requires_grad_() for value in (means, squares, gain, bias)]
            with torch.enable_grad():
                of_small = _scale_and_shift(
                    _Moments(small[0], small[1], sizes), small[2], small[3], ctx.rule, masks.shape[2], weights.shape[1]
                )
            scale, shift = (value.detach().to(masks.dtype) for value in of_small)
            d_weights = torch.empty_like(weights) if ctx.needs_input_grad[2] else None
            sums = _sum_gradients(x, grad, weights, scale, shift, d_weights)
            d_mean, d_squares, d_gain, d_bias = torch.autograd.grad(of_small, small, sums)
            # A voxel moves its region's mean by m / S and, as differences from a mean add up to 0, the sum of squares
            # by 2 m (x - mean): together a multiple of x and a constant.
            slope, constant = 2 * d_squares, d_mean / sizes.clamp(min=1) - 2 * d_squares * means
            slope, constant = slope.to(masks.dtype), constant.to(masks.dtype)
            d_x = torch.empty_like(x)
            for image, part, dy, weight, mask, to in _parts(x, grad, weights, masks, d_x):
                z = torch.addcmul(constant[image] @ mask, part.to(mask.dtype), slope[image] @ mask)
                _multiply_add(z, dy, scale[image] @ weight, to)
        return d_x, None, d_weights, d_gain, d_bias, None


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = x.new_empty((x.shape[0], 2, *x.shape[2:]))
        for _, part, to in _parts(x, pooled):
            to[0] = part.mean(0)
            torch.amax(part, 0, out=to[1])
        ctx.save_for_backward(x, pooled)
        return x.view_as(x), pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor, d_pooled: Tensor) -> Tensor:
        x, pooled = ctx.saved_tensors
        for _, part, largest, to, dy in _parts(x, pooled, d_x, d_pooled):
            is_largest = (part == largest[1]).to(x.dtype)
            # Equal voxels share the gradient, as PyTorch's amax has it.
            to.addcmul_(is_largest, dy[1] / is_largest.sum(0)).add_(dy[0], alpha=1 / len(part))
        return d_x.detach()  # another view: a leaf keeps it as its gradient instead of a copy


def _sum_moments(x: Tensor, masks: Tensor) -> _Moments:
    """Moments in `exact_type`; each part is summed in the type of the masks."""
    sums = x.new_zeros((x.shape[0], x.shape[1], masks.shape[1]), dtype=exact_type(x.device))
    squares = torch.zeros_like(sums)
    sizes = masks.sum(2, dtype=sums.dtype)[:, None]
    for image, part, mask in _parts(x, masks):
        sums[image] += _sum_over(part.to(mask.dtype), mask)
    means = sums / sizes.clamp(min=1)
    centres = means.to(masks.dtype)
    # A difference of sums would save this second pass, but loses all digits if the mean is a thousand deviations.
    for image, part, mask in _parts(x, masks):
        centred = torch.addmm(part.to(mask.dtype), centres[image], mask, alpha=-1)
        squares[image] += _sum_over(centred.square_(), mask)
    return _Moments(means, squares, sizes)


def _sum_gradients(
    x: Tensor, grad: Tensor, weights: Tensor, scale: Tensor, shift: Tensor, d_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of scale and shift, (B, C, rows) in `exact_type`; that of the weights is written to `d_weights`."""
    d_scale = torch.zeros_like(scale, dtype=exact_type(x.device))
    d_shift = torch.zeros_like(d_scale)
    for image, part, dy, weight, *to in _parts(x, grad, weights, *([] if d_weights is None else [d_weights])):
        dy = dy.to(weight.dtype)
        product = dy * part.to(weight.dtype)
        d_scale[image] += _sum_over(product, weight)
        d_shift[image] += _sum_over(dy, weight)
        if to:
            to[0].copy_(torch.addmm(shift[image].mT @ dy, scale[image].mT, product))
    return d_scale, d_shift


def _sum_over(values: Tensor, rows: Tensor) -> Tensor:
    """Sums of (C, voxels) in each of (R, voxels), as (C, R); in the order that is faster by half on a CPU."""
    return (rows @ values.mT).mT


def _multiply_add(offset: Tensor, values: Tensor, factor: Tensor, to: Tensor) -> None:
    """Write offset + values x factor, without another copy unless it is rounded to half precision."""
    if to.dtype == offset.dtype:
        torch.addcmul(offset, values, factor, out=to)
    else:
        to.copy_(offset.addcmul_(values.to(offset.dtype), factor))


def _parts(x: Tensor, *others: Tensor) -> Iterator[tuple[Any, ...]]:
    """The number of an image, and the same voxels of each map, (rows, part), in parts that fit into the caches."""
    maps = [value if value.dim() == 3 else value.flatten(2) for value in (x, *others)]
    batch, channels, voxels = maps[0].shape
    cores = torch.get_num_threads() if x.device.type == "cpu" else 1
    bytes_at_a_time = _PART_BYTES.get(x.device.type, _PART_BYTES["cuda"]) * cores
    size = max(bytes_at_a_time // (channels * others[0].element_size()), 1)
    if isinstance(x, FakeTensor):
        batch, voxels = min(batch, 1), min(size, voxels)  # without contents one part is enough
    for image in range(batch):
        for start in range(0, voxels, size):
            yield image, *(value[image, :, start : start + size] for value in maps)


def _dense(x: Tensor) -> Tensor:
    """The map in a memory order in which its voxels are one axis, channels outermost or innermost."""
    innermost = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x if x.is_contiguous(memory_format=innermost) else x.contiguous()


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast would take the products that are sums in half precision."""
    is_autocast = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if is_autocast else nullcontext()
