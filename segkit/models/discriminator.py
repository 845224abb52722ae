"""The discriminator of Yu et al. 2020 (arXiv 1911.10375): which patches of 70 pixels an axis look made up.

    kernel 4, stride 2     C -> 64, 64 -> 128, 128 -> 256     leaky ReLU of slope 0.2
    kernel 4               256 -> 512                         leaky ReLU of slope 0.2
    kernel 4               512 -> 1

This is MONAI's patch discriminator without norms, each kernel divided by its largest singular value (spectral norm,
Miyato et al. 2018), with no biases. In 3D all kernels have a third axis.
"""

from __future__ import annotations

from monai.networks.nets import PatchDiscriminator
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

_HALVINGS = 2
"""Layers with stride 2 behind the first."""

_SMALLEST = 24
"""Voxels an axis that leave a logit behind the layers."""


class Discriminator(nn.Module):
    """The layers of this file's table; MONAI's gives all of their maps."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, image: Tensor) -> Tensor:
        """How real each patch of (B, C, *spatial) is: logits (B, 1, *), each axis about an eighth as long.

        Raises:
            ValueError: an axis is shorter than 24 voxels, which leaves no patch.
        """
        if min(image.shape[2:]) < _SMALLEST:
            raise ValueError(
                f"an image of {tuple(image.shape[2:])} voxels is too small for a discriminator; "
                f"expected at least {_SMALLEST} along each axis"
            )
        logits: Tensor = self.layers(image)[-1]
        return logits


def build_discriminator(channels: int, dims: int, width: int = 64) -> Discriminator:
    """A discriminator for images (B, channels, *spatial) of `dims` spatial axes.

    Args:
        channels: Channels of an image.
        dims: 2 or 3.
        width: Channels of the first layer; the next three have two, four and eight times as many.
    """
    layers = PatchDiscriminator(
        spatial_dims=dims, channels=width, in_channels=channels, num_layers_d=_HALVINGS + 1, norm=None
    )
    for module in layers.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.bias = None
            spectral_norm(module)
    return Discriminator(layers)
