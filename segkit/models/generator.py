"""The generator and the discriminator of Yu et al. 2020 (arXiv 1911.10375).

The generator is EdgeConnect's with region normalisation (RN-B, RN-L: `region_layers`):

    part                 kernel          channels     norm  then
    encoder.0            7               C -> 64      RN-B  ReLU
    encoder.1            4, stride 2     64 -> 128    RN-B  ReLU
    encoder.2            4, stride 2     128 -> 256   RN-B  ReLU
    middle, 8 blocks of  3, dilation 2   256 -> 256   RN-L  ReLU
                         3               256 -> 256   RN-L  + input of the block
    decoder.0            3               256 -> 512         pixel shuffle to 128, RN-L, ReLU
    decoder.1            3               128 -> 256         pixel shuffle to 64, RN-L, ReLU
    head                 7               64 -> C            (tanh + 1) / 2

At 3 channels it has 11.60 million parameters. Kernels of 7 and those of the blocks see the image mirrored at its
border, the others zeros. The encoder gets the hole for its norms (RN-B), not as an input channel; from there on each
layer detects its region (RN-L). The released code has images from 0 to 1, holes filled with 1: `output="unit"`. Scans
have no such bounds: by default holes are 0, as background is, and there is no tanh.

The discriminator classifies patches of 70 pixels along each axis as true or generated:

    kernel 4, stride 2     C -> 64, 64 -> 128, 128 -> 256     leaky ReLU of slope 0.2
    kernel 4               256 -> 512                         leaky ReLU of slope 0.2
    kernel 4               512 -> 1

This is MONAI's patch discriminator without norms and biases, each kernel divided by its largest singular value
(spectral norm, Miyato et al. 2018). In 3D all kernels have a third axis.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from monai.networks.nets import PatchDiscriminator
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from segkit.models.blocks import SegmentationNetwork, SlicewiseConfig
from segkit.models.kernels.region_norm import Rule, Statistics
from segkit.models.region_layers import Learning, RegionNormBasic, RegionNormLearnable

REFERENCE = "Yu et al. 2020, arXiv 1911.10375"

Output = Literal["linear", "unit"]


class GeneratorConfig(SlicewiseConfig):
    """Sizes of the generator, and variants of the paper."""

    width: int = Field(default=64, ge=1)
    """Channels at full resolution; twice as many at half, four times at a quarter of the resolution."""
    blocks: int = Field(default=8, ge=0)
    """Residual blocks at a quarter of the resolution."""
    output: Output = "linear"
    """linear: any intensity, holes are filled with 0; unit: intensities from 0 to 1, holes filled with 1, as
    released."""
    statistics: Statistics = "instance"
    """Whether regions are normalised in each image or over the batch, as in the released code."""
    paper_affine: bool = True
    """Each region has its own shift; without it RN-B adds the shifts of both everywhere, as the released code does."""
    threshold: float = Field(default=0.8, gt=0, lt=1)
    """Response from which on a pixel belongs to RN-L's region."""
    learning: Learning = "affine"
    """How RN-L learns its region, see the family `inpainter`."""

    @model_validator(mode="after")
    def _sees_one_slice(self) -> GeneratorConfig:
        if self.neighbours:
            raise ValueError("neighbours must be 0: a slice comes with its own hole, not with those of others")
        return self


SIZES: dict[str, dict[str, object]] = {"paper": {}, "tiny": {"width": 16, "blocks": 2}}


def build_generator(config: GeneratorConfig, in_channels: int, out_channels: int, dims: int) -> SegmentationNetwork:
    """A generator for images (B, in_channels, H, W) or, slice by slice, volumes (B, in_channels, D, H, W)."""
    return config.applied_to(Generator(config, in_channels, out_channels), dims)


class MirroredConv2d(nn.Conv2d):
    """A convolution of odd kernel that keeps the size of (B, C, H, W), with the image mirrored at its border.

    If a map is too small for that, its outermost pixels are repeated.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, dilation=dilation)
        self.margin = dilation * (kernel // 2)

    def forward(self, input: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        mode = "reflect" if min(input.shape[2:]) > self.margin else "replicate"
        return super().forward(functional.pad(input, (self.margin,) * 4, mode=mode))


def _initialised(conv: nn.Conv2d) -> nn.Conv2d:
    """He-normal weights and zero biases; in the released code biases have deviation 1, by a missing argument."""
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.get_parameter("bias"))
    return conv


class Down(nn.Module):
    """A convolution, RN-B and ReLU."""

    def __init__(self, conv: nn.Conv2d, norm: RegionNormBasic) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm

    def forward(self, x: Tensor, hole: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride); `hole` (B, 1, *) on any grid."""
        return functional.relu_(self.norm(self.conv(x), hole))


class ResidualBlock(nn.Module):
    """norm2(conv2(ReLU(norm1(conv1(x))))) + x."""

    def __init__(self, conv1: nn.Module, norm1: nn.Module, conv2: nn.Module, norm2: nn.Module) -> None:
        super().__init__()
        self.conv1 = conv1
        self.norm1 = norm1
        self.conv2 = conv2
        self.norm2 = norm2

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        y = functional.relu_(self.norm1(self.conv1(x)))
        return cast(Tensor, x + self.norm2(self.conv2(y)))


class Up(nn.Module):
    """A convolution, pixel shuffle by 2, RN-L and ReLU."""

    def __init__(self, conv: nn.Module, norm: RegionNormLearnable) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', 2 H, 2 W)."""
        return functional.relu_(self.norm(functional.pixel_shuffle(self.conv(x), 2)))


class Generator(SegmentationNetwork):
    """The generator for images (B, in_channels, H, W)."""

    divisor = (4, 4)
    input_weights = ("encoder.0.conv.weight",)
    head_prefixes = ("head.",)

    def __init__(self, config: GeneratorConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        rule = Rule(stats=config.statistics)
        full, half, quarter = (config.width * multiple for multiple in (1, 2, 4))

        def down(conv: nn.Conv2d) -> Down:
            norm = RegionNormBasic(conv.out_channels, rule=rule, paper_affine=config.paper_affine)
            return Down(_initialised(conv), norm)

        def learnable() -> RegionNormLearnable:
            return RegionNormLearnable(2, threshold=config.threshold, learning=config.learning, rule=rule)

        def block() -> ResidualBlock:
            conv1, conv2 = (_initialised(MirroredConv2d(quarter, quarter, 3, dilation)) for dilation in (2, 1))
            return ResidualBlock(conv1, learnable(), conv2, learnable())

        def up(below: int, width: int) -> Up:
            return Up(_initialised(nn.Conv2d(below, 4 * width, 3, padding=1)), learnable())

        strided = (nn.Conv2d(*widths, 4, stride=2, padding=1) for widths in ((full, half), (half, quarter)))
        self.encoder = nn.ModuleList([down(MirroredConv2d(in_channels, full, 7)), *(down(conv) for conv in strided)])
        self.middle = nn.Sequential(*(block() for _ in range(config.blocks)))
        self.decoder = nn.Sequential(up(quarter, half), up(half, full))
        self.head = _initialised(MirroredConv2d(full, out_channels, 7))
        self.output: Output = config.output
        self.channels = in_channels

    def encode(self, x: Tensor) -> list[Tensor]:
        """Feature maps of the encoder, full resolution first; x as in `forward`."""
        image, hole = x[:, : self.channels], x[:, self.channels : self.channels + 1] > 0.5
        if hole.shape[1] == 0:
            hole = torch.zeros_like(image[:, :1], dtype=torch.bool)
        y = torch.where(hole, 1.0 if self.output == "unit" else 0.0, image)
        features = []
        for down in self.encoder:
            y = down(y, hole)
            features.append(y)
        return features

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """The generated image (B, out_channels, H, W), in known pixels too; in training a list that holds it.

        x is (B, channels, H, W): the channels of the image, then optionally the hole, 1 in it, else 0. Image values in
        the hole and further channels are ignored.
        """
        y = self.head(self.decoder(self.middle(self.encode(x)[-1])))
        if self.output == "unit":
            y = (y.tanh() + 1) / 2
        return [y] if self.training else y


_SMALLEST = 24  # fewest voxels along an axis that give a logit


class Discriminator(nn.Module):
    """The layers of the table above; MONAI's module returns the maps of all of them."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *spatial) to logits of its patches being true, (B, 1, *), each axis about an eighth as long.

        Raises:
            ValueError: an axis is shorter than 24 voxels.
        """
        if min(image.shape[2:]) < _SMALLEST:
            found = f"an image of {tuple(image.shape[2:])} voxels is too small for a discriminator"
            raise ValueError(f"{found}; expected at least {_SMALLEST} along each axis")
        return cast(Tensor, self.layers(image)[-1])


def build_discriminator(channels: int, dims: int, width: int = 64) -> Discriminator:
    """A discriminator for images (B, channels, *spatial) of 2 or 3 spatial axes; `width` is that of its first layer."""
    layers = PatchDiscriminator(spatial_dims=dims, channels=width, in_channels=channels, num_layers_d=3, norm=None)
    for module in layers.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.bias = None
            spectral_norm(module)
    return Discriminator(layers)
