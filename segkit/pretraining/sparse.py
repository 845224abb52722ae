"""Sparse masking: an encoder that sees visible voxels alone (SparK, Tian et al. 2023, arXiv 2301.03580, section 3.2).

If only the image is masked, hidden parts fill up from layer to layer, and norms count their zeros. Here features are 0
in hidden voxels after every convolution and pooling of the encoder, and norms take moments of the visible voxels. So
features at visible voxels are those of an image that ends where the hidden ones begin. A voxel of a coarse map is
hidden if all that it covers are.

This holds for the encoders of `revmbunet`, `stunet`, `plainunet`, `resencunet`, `r2unet` (tied kernels need a norm) and
the convolutional ones of `smp`. Attention (`vit`, transformers of `smp`) and squeeze-and-excitation count hidden voxels
as zeros. Where the paper gives the decoder a learnt vector in hidden voxels, ours gets 0.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AvgPoolNd, _MaxPoolNd

from segkit.models.blocks import InstanceNorm, SegmentationNetwork
from segkit.models.revmbunet import InvertedBottleneck
from segkit.training.optim import encoder_of

_LARGEST = {2: functional.adaptive_max_pool2d, 3: functional.adaptive_max_pool3d}


class SparseMasking:
    """Masks the encoder of a network for good: hidden voxels of its images (B, C, *patch) are NaN in all channels.

    The mask of the last images is kept, for passes that compute parts of them again.
    """

    def __init__(self, network: SegmentationNetwork) -> None:
        self._visible: dict[tuple[int, ...], Tensor] = {}  # size of a map -> (B, 1, *map), boolean
        network.register_forward_pre_hook(self._take_mask)
        for module in encoder_of(network).modules():
            if isinstance(module, (_ConvNd, _MaxPoolNd, _AvgPoolNd, _AdaptiveAvgPoolNd)):
                module.register_forward_hook(self._hide)
            elif isinstance(module, (nn.GroupNorm, InstanceNorm, _BatchNorm)):
                # In place of the method of its class; names of weights stay.
                module.forward = partial(self._normalise, module)  # type: ignore[method-assign]
            elif isinstance(module, InvertedBottleneck):
                module.chunks = 1  # parts of a norm have no `forward`

    def _take_mask(self, _: nn.Module, images: tuple[Tensor]) -> tuple[Tensor]:
        hidden = images[0][:, :1].isnan()
        self._visible = {tuple(hidden.shape[2:]): ~hidden}
        return (images[0].masked_fill(hidden, 0),)

    def _at(self, size: tuple[int, ...]) -> Tensor:
        """The visible voxels of a feature map, (B, 1, *size)."""
        if size not in self._visible:
            finest = next(iter(self._visible.values()))
            self._visible[size] = _LARGEST[len(size)](finest.float(), size) > 0
        return self._visible[size]

    def _hide(self, _: nn.Module, __: Any, features: Tensor) -> Tensor:
        return features * self._at(tuple(features.shape[2:]))  # keeps the memory order, as `masked_fill` does not

    def _normalise(self, norm: Any, x: Tensor) -> Tensor:
        """The norm of the visible voxels of (B, C, *spatial), 0 in the others."""
        visible, is_batch = self._at(tuple(x.shape[2:])), isinstance(norm, _BatchNorm)
        seen = visible[:, None]  # (B, 1, 1, *spatial)
        groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else x.shape[1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        parts = wide.reshape(len(x), groups, -1, *x.shape[2:])  # (B, G, C / G, *spatial)
        axes = [*range(2, parts.dim()), *([0] if is_batch else [])]
        count = seen.sum(axes, keepdim=True) * parts.shape[2]
        mean = (parts * seen).sum(axes, keepdim=True) / count
        variance = ((parts - mean) * seen).square().sum(axes, keepdim=True) / count
        if is_batch and norm.running_mean is not None:
            if norm.training:
                _count_batch(norm, mean, variance * count / (count - 1).clamp(min=1))
            else:
                mean, variance = (value.view_as(mean) for value in (norm.running_mean, norm.running_var))
        epsilon = norm.epsilon if isinstance(norm, InstanceNorm) else norm.eps
        result: Tensor = ((parts - mean) * (variance + epsilon).rsqrt()).flatten(1, 2)
        if norm.weight is not None:
            weight, bias = (value.view(-1, *(1,) * (x.dim() - 2)) for value in (norm.weight, norm.bias))
            result = result * weight + bias
        for layer in ("drop", "act"):  # with which the norms of timm end
            result = getattr(norm, layer, nn.Identity())(result)
        return (result * visible).to(x.dtype)


@torch.no_grad()
def _count_batch(norm: Any, mean: Tensor, variance: Tensor) -> None:
    """Add the moments of a batch to the running ones, as the layer does."""
    norm.num_batches_tracked += 1
    share = norm.momentum if norm.momentum is not None else 1 / norm.num_batches_tracked
    for running, value in ((norm.running_mean, mean), (norm.running_var, variance)):
        running += (value.flatten() - running) * share
