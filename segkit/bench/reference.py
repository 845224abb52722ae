"""RevMBUNet with PyTorch's own layers in the places of segkit's: the yardstick of the speed table."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from segkit.models.blocks import PointwiseConv3d
from segkit.models.kernels.depthwise import DepthwiseConv3d
from segkit.models.revmbunet import Encoder, InvertedBottleneck
from segkit.models.table import build_model

_CHANNELS, _OUTPUTS = 4, 3


def build_network(size: str, mode: str = "plain") -> nn.Module:
    """RevMBUNet of a named size, 4 inputs and 3 outputs, the same weights every time."""
    torch.manual_seed(0)
    network = build_model("revmbunet", in_channels=_CHANNELS, out_channels=_OUTPUTS, size=size, mode=mode)
    # Blocks start as the identity: without a scale the depthwise kernels would get no gradient to compare.
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
    return network


def with_library_layers(network: nn.Module, layers: str) -> nn.Module:
    """The network, in place, with "segkit" layers, depthwise layers replaced ("grouped"), or all of them ("library").

    "library" is what one would write by hand: `nn.Conv3d`, `nn.GroupNorm` and SiLU on tensors as they come.
    """
    if layers == "segkit":
        return network
    replaced = (DepthwiseConv3d,) if layers == "grouped" else (DepthwiseConv3d, PointwiseConv3d)
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, replaced):
                setattr(parent, name, _library_convolution(layer))
            elif layers == "library" and isinstance(layer, InvertedBottleneck):
                setattr(parent, name, _LibraryBottleneck(layer))
    if layers == "library":
        encoder = network.encoder
        network.encoder = _LibraryEncoder(encoder.stem, encoder.downs, encoder.stages)  # type: ignore[arg-type, union-attr]
    return network


def _library_convolution(layer: nn.Conv3d) -> nn.Conv3d:
    plain = nn.Conv3d(
        layer.in_channels,
        layer.out_channels,
        (layer.kernel_size[0], layer.kernel_size[1], layer.kernel_size[2]),
        padding=layer.kernel_size[0] // 2,
        groups=layer.groups,
        bias=layer.bias is not None,
    )
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


class _LibraryBottleneck(nn.Module):
    """The inverted bottleneck of another, layer by layer."""

    def __init__(self, bottleneck: InvertedBottleneck) -> None:
        super().__init__()
        self.bottleneck = bottleneck

    def forward(self, x: Tensor) -> Tensor:
        layers = self.bottleneck
        x = functional.silu(layers.expand_norm(layers.expand(x)))
        x = functional.silu(layers.depthwise_norm(layers.depthwise(x)))
        result: Tensor = layers.project_norm(layers.project(x))
        return result


class _LibraryEncoder(Encoder):
    """The encoder on tensors as they come."""

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [self.stages[0](self.stem(x))]
        for down, stage in zip(self.downs, self.stages[1:], strict=True):
            features.append(stage(down(features[-1])))
        return features
