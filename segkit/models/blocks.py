"""Layers that exist in two and three dimensions, chosen by one number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_CONVOLUTIONS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_STOCHASTIC = (nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.RReLU)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def pointwise(dims: int, in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Module:
    """A convolution with kernel 1 on (B, in_channels, *spatial)."""
    return _POINTWISE[dims](in_channels, out_channels, 1, bias=bias)


class PointwiseConv3d(nn.Conv3d):
    """A convolution with kernel 1; on a CPU, where channels lie innermost, computed as the matrix product that it is.

    PyTorch has no kernel of its own for that case: it copies to channels outermost, which takes four times as long.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C_in, D, H, W) to (B, C_out, D, H, W)."""
        return pointwise_convolve(input, self.weight, self.bias)


def pointwise_convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, C_in, *spatial) with weights (C_out, C_in, 1, ...) to (B, C_out, *spatial)."""
    if weight.dim() == 4:
        return functional.conv2d(x, weight, bias)
    is_innermost = x.stride(1) == 1 and x.shape[1] > 1
    is_recorded = torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()
    if not is_innermost or x.device.type != "cpu" or is_recorded:
        return functional.conv3d(x, weight, bias)
    return functional.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


def convolution(
    dims: int,
    in_channels: int,
    out_channels: int,
    kernel: int = 3,
    stride: Sequence[int] | int = 1,
    *,
    bias: bool = True,
) -> nn.Module:
    """A convolution of odd `kernel` on (B, in_channels, *spatial) that divides each axis by its stride, rounding up."""
    stride = stride if isinstance(stride, int) else tuple(stride)
    layer: nn.Module = _CONVOLUTIONS[dims](
        in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=bias
    )
    return layer


def check_strides(strides: Sequence[Sequence[int]] | None) -> None:
    """Refuse strides that no network of two or three axes can have.

    Raises:
        ValueError: one of them is not two or three whole numbers from 1 on.
    """
    for stride in strides or ():
        if len(stride) not in (2, 3) or min(stride) < 1:
            raise ValueError(f"stride {stride} is not two or three whole numbers from 1 on")


def strides_for(strides: Sequence[tuple[int, ...]] | None, steps: int, dims: int) -> Sequence[tuple[int, ...]]:
    """The strides of a configuration, 2 everywhere where it names none.

    Raises:
        ValueError: they are not for `dims` axes.
    """
    strides = strides or ((2,) * dims,) * steps
    if any(len(stride) != dims for stride in strides):
        raise ValueError(f"strides {strides} do not have {dims} entries each")
    return strides


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with the most groups (8 at most) that leave at least two channels each."""
    for groups in (8, 4, 2):
        if channels % groups == 0 and channels // groups >= 2:
            return nn.GroupNorm(groups, channels)
    return nn.GroupNorm(1, channels)


class InstanceNorm(nn.Module):
    """Instance norm with scale and shift, without running statistics, for (B, C, *spatial).

    Unlike PyTorch's own it takes a single voxel: a voxel is its own mean, which leaves the shift. On a CPU it is
    computed as group norm with one group a channel, the same sum in a faster kernel.
    """

    def __init__(self, channels: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) to the same shape."""
        if x.device.type == "cpu":
            return torch.group_norm(x, x.shape[1], self.weight, self.bias, self.epsilon)
        return torch.instance_norm(
            x, self.weight, self.bias, None, None, True, 0.0, self.epsilon, torch.backends.cudnn.enabled
        )


_POINTWISE: dict[int, type[nn.Module]] = {2: nn.Conv2d, 3: PointwiseConv3d}


def channels_innermost(x: Tensor) -> Tensor:
    """The same (B, C, *spatial) with C innermost in memory where 3 x 3 x 3 kernels are faster so: in 3D on a CPU.

    One channel lies both ways already and stays as it is, so call it behind the first layer rather than on the image.
    """
    if x.dim() == 5 and x.device.type == "cpu":
        return x.contiguous(memory_format=torch.channels_last_3d)
    return x


def checkpointed(function: Callable[..., Any], *inputs: Tensor, within: nn.Module) -> Any:
    """`function(*inputs)`, of which only the inputs are kept: it is computed again in the backward pass.

    `within` is the module that computes it; its batch norms count the batch once, its dropout draws the same numbers.
    """
    more: dict[str, Any] = {"preserve_rng_state": is_stochastic(within)}
    # A compiled pass computes again without running the module, so nothing counts twice there.
    if not torch.compiler.is_compiling():
        more["context_fn"] = lambda: (nullcontext(), without_statistics(within))
    return checkpoint(function, *inputs, use_reentrant=False, **more)


def is_stochastic(module: nn.Module) -> bool:
    """Whether a module draws random numbers as it is now."""
    return any(isinstance(part, _STOCHASTIC) and part.training for part in module.modules())


@contextmanager
def without_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the batch norms of a module from counting a recomputed pass as another batch.

    They count into copies meanwhile. Switching `track_running_stats` off instead would save other tensors than the
    first pass did, which `torch.utils.checkpoint` takes for an error.
    """
    norms = [m for m in module.modules() if isinstance(m, _BATCH_NORMS) and m.training and m.track_running_stats]
    kept = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in kept:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)
