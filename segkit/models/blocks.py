"""What the networks share: their base class, layers in two and three dimensions, U-Net assembly, checkpointing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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

    Unlike PyTorch's it accepts a single voxel, which becomes the shift. On a CPU group norm is the faster kernel.
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


def channels_innermost(x: Tensor) -> Tensor:
    """The same (B, C, *spatial), with C innermost in memory in 3D on a CPU, where 3 x 3 x 3 kernels are then faster.

    One channel is in both orders already and stays unchanged.
    """
    if x.dim() == 5 and x.device.type == "cpu":
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
