"""What the networks share: base class, layers in 2D and 3D, U-Net assembly, checkpointing, 2D networks on volumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segkit.config import Config

_CONVOLUTIONS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
Mode = Literal["plain", "checkpoint"]
"""Memory mode: keep all activations, or keep the input of a block and compute the block again."""

_STOCHASTIC = (nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.RReLU)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class SegmentationNetwork(nn.Module):
    """The base class of the networks; the names in its attributes are those of the state dict, to transfer weights."""

    divisor: tuple[int, ...]
    """Each axis of *spatial must be a multiple of its entry, in voxels."""
    input_weights: tuple[str, ...]
    """Names of the tensors whose axis 1 is the image channels."""
    head_prefixes: tuple[str, ...] = ("heads.",)
    """Prefixes of the names of the segmentation heads."""
    encoder_prefix: str = "encoder."
    """Prefix of the names of the encoder."""
    spare_heads: tuple[str, ...] = ()
    """Prefixes of the heads that only training uses and that files may lack."""

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(B, in_channels, *spatial) to logits (B, out_channels, *spatial); in training a list, finest first."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> list[Tensor]:
        """Feature maps of the encoder alone, (B, width, *spatial / stride) each, finest first, deepest last."""
        raise NotImplementedError


def convolution(
    dims: int,
    in_channels: int,
    out_channels: int,
    kernel: Sequence[int] | int = 3,
    stride: Sequence[int] | int = 1,
    *,
    bias: bool = True,
) -> nn.Module:
    """A convolution of odd `kernel` on (B, in_channels, *spatial) that divides each axis by its stride, rounding up."""
    kernel, stride = (value if isinstance(value, int) else tuple(value) for value in (kernel, stride))
    padding = kernel // 2 if isinstance(kernel, int) else tuple(side // 2 for side in kernel)
    layer: nn.Module = _CONVOLUTIONS[dims](in_channels, out_channels, kernel, stride, padding, bias=bias)
    return layer


def check_levels(widths: Sequence[int], least_width: int, strides: Sequence[Sequence[int]] | None) -> None:
    """Raise ValueError if the widths of a U-Net's levels, or the strides between them, are not possible."""
    steps = len(widths) - 1
    if steps < 1:
        raise ValueError("widths must name at least two levels")
    if min(widths) < least_width:
        raise ValueError(f"widths must be at least {least_width}")
    if strides is not None and len(strides) != steps:
        raise ValueError(f"strides names {len(strides)} steps, but {steps + 1} widths need {steps}")
    check_strides(strides)


def check_strides(strides: Sequence[Sequence[int]] | None) -> None:
    """Raise ValueError if a stride is not two or three whole numbers from 1 on."""
    for stride in strides or ():
        if len(stride) not in (2, 3) or min(stride) < 1:
            raise ValueError(f"stride {stride} is not two or three whole numbers from 1 on")


def strides_for(strides: Sequence[tuple[int, ...]] | None, steps: int, dims: int) -> Sequence[tuple[int, ...]]:
    """The strides of a configuration; None is 2 everywhere. Raises ValueError if they are not for `dims` axes."""
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

    Unlike PyTorch's it accepts a single voxel, which becomes the shift. On a CPU group norm is the faster kernel, whose
    last bits differ; with `is_exact` it is for training only.
    """

    def __init__(self, channels: int, epsilon: float = 1e-5, *, is_exact: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.epsilon = epsilon
        self.is_exact = is_exact

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) to the same shape."""
        if x.device.type == "cpu" and (self.training or not self.is_exact):
            return torch.group_norm(x, x.shape[1], self.weight, self.bias, self.epsilon)
        return torch.instance_norm(
            x, self.weight, self.bias, None, None, True, 0.0, self.epsilon, torch.backends.cudnn.enabled
        )


def channels_innermost(x: Tensor) -> Tensor:
    """The same (B, C, *spatial), with C innermost in memory in 3D on a CPU, where 3 x 3 x 3 kernels are then faster.

    One channel is in both orders already and stays unchanged. So does everything in a trace: PyTorch's group norm of
    channels that lie innermost adds up so many squares in sequence that logits differ by 1e-3.
    """
    if x.dim() == 5 and x.device.type == "cpu" and not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return x.contiguous(memory_format=torch.channels_last_3d)
    return x


class UNet(SegmentationNetwork):
    """An encoder, a decoder, and a pointwise head for each supervised level, full resolution first."""

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        heads: Sequence[nn.Module],
        strides: Sequence[Sequence[int]],
        input_weights: str,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.heads = nn.ModuleList(heads)
        self.divisor = divisor_of(strides)
        self.input_weights = (input_weights,)

    def encode(self, x: Tensor) -> list[Tensor]:
        """One feature map per level."""
        features: list[Tensor] = self.encoder(x)
        return features

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """In training one entry per supervised level."""
        features = self.decoder(self.encode(x))
        if self.training:
            return [head(feature) for head, feature in zip(self.heads, features, strict=False)]
        return cast(Tensor, self.heads[0](features[0]))


def divisor_of(strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What each axis must be a multiple of, in voxels."""
    return tuple(prod(axis) for axis in zip(*strides, strict=True))


def encode_levels(x: Tensor, downs: nn.ModuleList, stages: nn.ModuleList) -> list[Tensor]:
    """(B, C, *spatial) to one feature map per stage, full resolution first; `downs` are the steps between stages."""
    features = [stages[0](x)]
    for down, stage in zip(downs, stages[1:], strict=True):
        features.append(stage(down(features[-1])))
    return features


def decode_levels(
    features: list[Tensor], ups: nn.ModuleList, stages: nn.ModuleList, join: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """Encoder features to decoder features, full resolution first, without the deepest: stage(join(skip, up(x)))."""
    x = features[-1]
    decoded = []
    for up, stage, skip in zip(reversed(ups), reversed(stages), features[-2::-1], strict=True):
        x = stage(join(skip, up(x)))
        decoded.append(x)
    return decoded[::-1]


def checkpointed(function: Callable[..., Any], *inputs: Tensor, within: nn.Module) -> Any:
    """`function(*inputs)` of the module `within`, keeping only the inputs and computed again in the backward pass.

    Batch norms count the batch once, dropout draws the same numbers.
    """
    more: dict[str, Any] = {"preserve_rng_state": is_stochastic(within)}
    # A compiled pass computes again without running the module, so no statistics count twice.
    if not torch.compiler.is_compiling():
        more["context_fn"] = lambda: (nullcontext(), without_statistics(within))
    return checkpoint(function, *inputs, use_reentrant=False, **more)


def is_stochastic(module: nn.Module) -> bool:
    """Whether a module draws random numbers as it is now."""
    return any(isinstance(part, _STOCHASTIC) and part.training for part in module.modules())


@contextmanager
def without_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the batch norms of a module from counting a recomputed pass as another batch: they count into copies.

    With `track_running_stats` off, other tensors would be saved than in the first pass, which `checkpoint` rejects.
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


class SlicewiseConfig(Config):
    """How a 2D network is applied to volumes; without effect for images."""

    slice_axis: int | None = Field(default=None, ge=0, le=2)
    """Spatial axis across which volumes are sliced, 0 is the first after the channels; None is 0 or planned."""
    neighbours: int = Field(default=0, ge=0)
    """Slices on each side that a slice sees as further channels."""
    slices_at_once: int = Field(default=16, ge=1)
    """Slices that are computed together in evaluation; training computes all of a patch together."""

    def image_channels(self, in_channels: int, dims: int) -> int:
        """Image channels of the 2D network, for data of `in_channels` and `dims` axes.

        Raises:
            ValueError: slices are set, but the data have two axes.
        """
        if dims == 2 and (self.neighbours or self.slice_axis is not None):
            raise ValueError("slice_axis and neighbours need data of three axes")
        return in_channels * (2 * self.neighbours + 1)

    def applied_to(self, network: SegmentationNetwork, dims: int) -> SegmentationNetwork:
        """`network` itself for images, its slice-wise form for volumes."""
        if dims == 2:
            return network
        return Slicewise(network, self.slice_axis or 0, self.neighbours, self.slices_at_once)


class Slicewise(SegmentationNetwork):
    """A 2D network of (B, C * (2 * neighbours + 1), H, W), applied to each slice of (B, C, *spatial) across an axis.

    It has the parts of the 2D network as its own children, so that a checkpoint of one loads into the other. With
    `neighbours` n a slice has the n slices on each side as further channels ("2.5D"): all channels of slice z - n, then
    of z - n + 1, up to z + n; beyond the border the outermost slice is repeated. One channel with one neighbour on each
    side gives three channels, as encoders pre-trained on colour pictures have.
    """

    def __init__(
        self, network: SegmentationNetwork, axis: int = 0, neighbours: int = 0, slices_at_once: int = 16
    ) -> None:
        super().__init__()
        for name, part in network.named_children():
            self.add_module(name, part)
        # In a tuple, because a registered module would add its name to the names of the weights.
        self._network = (network,)
        self.axis = axis
        self.neighbours = neighbours
        self.slices_at_once = slices_at_once
        self.divisor = (*network.divisor[:axis], 1, *network.divisor[axis:])
        self.input_weights = network.input_weights
        self.head_prefixes = network.head_prefixes
        self.encoder_prefix = network.encoder_prefix

    def train(self, mode: bool = True) -> Slicewise:
        """Set training or evaluation mode, also of the 2D network itself."""
        super().train(mode)
        self._network[0].train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(B, C, *spatial) to logits of the same spatial size; in training a list of them."""
        (network,) = self._network
        slices = x.movedim(2 + self.axis, 1)  # (B, S, C, H, W)
        if self.training:
            return [self._volume(level, len(x)) for level in network(self._images(slices, 0, slices.shape[1]))]
        is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if torch.compiler.is_exporting() or is_traced:  # of which the batch is not known
            return self._volume(network(self._images(slices, 0, slices.shape[1])), x.shape[0])
        step = max(1, self.slices_at_once // len(x))
        parts = [
            self._volume(network(self._images(slices, start, min(start + step, slices.shape[1]))), len(x))
            for start in range(0, slices.shape[1], step)
        ]
        return torch.cat(parts, dim=2 + self.axis)

    def encode(self, x: Tensor) -> list[Tensor]:
        """(B, C, *spatial) to the feature maps of its slices, stacked again; the slice axis keeps its length."""
        slices = x.movedim(2 + self.axis, 1)  # (B, S, C, H, W)
        return [
            self._volume(level, len(x)) for level in self._network[0].encode(self._images(slices, 0, slices.shape[1]))
        ]

    def _images(self, slices: Tensor, start: int, stop: int) -> Tensor:
        """Slices start to stop of (B, S, C, H, W), each with its neighbours, as (B * (stop - start), C', H, W)."""
        if self.neighbours == 0:
            return slices[:, start:stop].flatten(0, 1)
        positions = torch.arange(start, stop, device=slices.device)
        offsets = torch.arange(-self.neighbours, self.neighbours + 1, device=slices.device)
        index = (positions[:, None] + offsets).clamp(0, slices.shape[1] - 1)
        return slices[:, index].flatten(2, 3).flatten(0, 1)  # (B, S', 2n + 1, C, H, W) before

    def _volume(self, images: Tensor, batch: int) -> Tensor:
        """(B * S', K, H, W) to (B, K, *spatial), S' long on the slice axis."""
        return images.view(batch, -1, *images.shape[1:]).movedim(1, 2 + self.axis)
