"""An inpainting U-Net with region normalisation in place of instance norm, in 2D and 3D.

Region normalisation is that of Yu et al. 2020 (arXiv 1911.10375); the U-Net is our own design:

    stem -> stage 0 -> stage 1 -> ... -> [upsample, skip, stage] x (stages - 1) -> head -> + image

The encoder gets the hole (RN-B normalises background, tissue and hole separately), the decoder detects a region (RN-L),
which is the hole if `learning` is supervised. The network adds a correction to its input, whose hole is filled. An
image without a hole may be given alone.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from segkit.config import Config
from segkit.models.blocks import InstanceNorm, SegmentationNetwork, channels_innermost, convolution
from segkit.models.kernels.convolutions import pointwise
from segkit.models.kernels.region_norm import Rule, Statistics
from segkit.models.region_layers import Learning, RegionNormBasic, RegionNormLearnable

REFERENCE = "Yu et al. 2020, arXiv 1911.10375 (region normalisation)"

_SLOPE = 0.01
_BACKGROUND, _TISSUE, _HOLE = 0, 1, 2
"""Regions of RN-B; of two that fall on one voxel of a small map the larger number wins."""

Context = Literal["none", "hole", "mirror"]
DecoderNorm = Literal["learnable", "region", "instance"]


class InpainterConfig(Config):
    """Sizes and norms of an inpainting U-Net."""

    widths: tuple[int, ...] = Field(default=(32, 64, 128, 256), min_length=2)
    """Channels of each stage, full resolution first; each further one halves the resolution."""
    context: Context = "none"
    """Further input of the first layer. hole: which voxels are missing; mirror: that, the image mirrored at the midline
    and the voxels where the mirrored image is known; none: nothing, for networks that only segment."""
    encoder_norm: Literal["region", "instance"] = "region"
    """region: RN-B, which gets the hole; instance: instance norm, as a baseline."""
    decoder_norm: DecoderNorm = "learnable"
    """learnable: RN-L, which detects its region; region: RN-B; instance: instance norm."""
    statistics: Statistics = "instance"
    """Whether regions are normalised in each image or over the batch, as in the released code."""
    learning: Learning = "affine"
    """How RN-L learns its region. affine: by its affine alone, as in the released code, by which it does not learn to
    find the hole; supervised: also by a loss of its own against the hole (inpainting only)."""
    threshold: float = Field(default=0.8, gt=0, lt=1)
    """Response from which on a voxel belongs to RN-L's region."""


SIZES: dict[str, dict[str, object]] = {
    "tiny": {"widths": (8, 16, 32)},
    "small": {"widths": (16, 32, 64, 128)},
    "base": {"widths": (32, 64, 128, 256)},
    "large": {"widths": (32, 64, 128, 256, 512)},
}


class Unit(nn.Module):
    """A 3 x 3 (x 3) convolution, a norm and a leaky ReLU of slope 0.01."""

    def __init__(self, dims: int, inputs: int, width: int, norm: nn.Module, stride: int = 1) -> None:
        super().__init__()
        self.conv = convolution(dims, inputs, width, stride=stride)
        self.norm = norm

    def forward(self, x: Tensor, regions: Tensor) -> Tensor:
        """(B, inputs, *spatial) to (B, width, *spatial / stride); `regions` (B, 1, *) on any grid."""
        return _normed(self.norm, self.conv(x), regions)


def _normed(norm: nn.Module, x: Tensor, regions: Tensor) -> Tensor:
    x = norm(x, regions) if isinstance(norm, RegionNormBasic) else norm(x)
    return functional.leaky_relu_(x, _SLOPE)


class Encoder(nn.Module):
    """Stem with context, then one feature map for each stage."""

    def __init__(
        self, stem: nn.Module, context: nn.Module | None, norm: nn.Module, stages: Sequence[Sequence[nn.Module]]
    ) -> None:
        super().__init__()
        self.image_channels: int = stem.get_parameter("weight").shape[1]
        self.stem = stem
        self.context = context
        self.norm = norm
        self.stages = nn.ModuleList(nn.ModuleList(stage) for stage in stages)

    def forward(self, image: Tensor, context: Tensor | None, regions: Tensor) -> list[Tensor]:
        """Feature maps, full resolution first; `context` is None if nothing is missing."""
        x = self.stem(image)
        if self.context is not None:
            seen = self.context.get_parameter("weight").shape[1]
            if context is None:
                context = image.new_zeros((len(image), seen, *image.shape[2:]))
            x = x + self.context(context[:, :seen])
        x = channels_innermost(_normed(self.norm, x, regions))
        features = []
        for stage in self.stages:
            for unit in stage:  # type: ignore[attr-defined]
                x = unit(x, regions)
            features.append(x)
        return features


class Inpainter(SegmentationNetwork):
    """The U-Net for images (B, in_channels, *spatial) of `dims` spatial axes; its decoder is coarsest first."""

    input_weights = ("encoder.stem.weight",)
    head_prefixes = ("head.",)

    def __init__(self, config: InpainterConfig, in_channels: int, out_channels: int, dims: int) -> None:
        super().__init__()
        rule = Rule(stats=config.statistics)

        def region(width: int) -> nn.Module:
            return RegionNormBasic(width, 3, rule=rule, keeps_thin=True)

        def learnable(_: int) -> nn.Module:
            return RegionNormLearnable(dims, threshold=config.threshold, learning=config.learning, rule=rule)

        norms: dict[DecoderNorm, Callable[[int], nn.Module]]
        norms = {"learnable": learnable, "region": region, "instance": InstanceNorm}
        encoder_norm, decoder_norm = norms[config.encoder_norm], norms[config.decoder_norm]
        first, *further = config.widths
        context_channels = {"none": 0, "hole": 1, "mirror": 2 + in_channels}[config.context]
        stages = [[Unit(dims, first, first, encoder_norm(first))]]
        for above, width in zip(config.widths, further, strict=False):
            stages.append(
                [Unit(dims, above, width, encoder_norm(width), stride=2), Unit(dims, width, width, encoder_norm(width))]
            )
        ups = list(zip(config.widths[:0:-1], config.widths[-2::-1], strict=True))  # (from below, this stage)
        self.encoder = Encoder(
            stem=convolution(dims, in_channels, first),
            context=convolution(dims, context_channels, first, bias=False) if context_channels else None,
            norm=encoder_norm(first),
            stages=stages,
        )
        self.upsamplings = nn.ModuleList(pointwise(dims, *up) for up in ups)
        self.decoder = nn.ModuleList(
            nn.ModuleList(Unit(dims, inputs, width, decoder_norm(width)) for inputs in (2 * width, width))
            for _, width in ups
        )
        self.head = pointwise(dims, first, out_channels)
        self.divisor = (2 ** len(further),) * dims
        # The first output is nearly the input image; with weights of 0 no layer before the head would learn.
        nn.init.normal_(self.head.get_parameter("weight"), std=1e-3)
        nn.init.zeros_(self.head.get_parameter("bias"))

    def encode(self, x: Tensor) -> list[Tensor]:
        """Feature maps of the encoder, full resolution first; x as in `forward`."""
        return self._encoded(x)[0]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """An image, alone or with its hole, to (B, out_channels, *spatial); in training a list that holds it.

        x is (B, channels, *spatial), each axis a multiple of `divisor`. The image alone: the output is a segmentation.
        The image with its hole filled, then the hole, 1 in it, else 0: the output is the restored image. The
        mirrored image may follow and, as another channel, where it is known.
        """
        features, regions = self._encoded(x)
        y = features.pop()
        for upsampling, stage in zip(self.upsamplings, self.decoder, strict=True):
            skip = features.pop()
            y = functional.interpolate(upsampling(y), size=skip.shape[2:], mode="nearest")
            y = torch.cat((y, skip), 1)
            for unit in stage:  # type: ignore[attr-defined]
                y = unit(y, regions)
        y = self.head(y)
        channels = self.encoder.image_channels
        if x.shape[1] > channels:
            y = y + x[:, :channels]
        return [y] if self.training else y

    def _encoded(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        channels = self.encoder.image_channels
        image, context = x[:, :channels], x[:, channels:]
        regions = (image.abs().amax(1, keepdim=True) > 0).to(torch.uint8)  # _BACKGROUND and _TISSUE
        if context.shape[1] == 0:
            return self.encoder(image, None, regions), regions
        regions = torch.where(context[:, :1] > 0.5, torch.full_like(regions, _HOLE), regions)
        return self.encoder(image, context, regions), regions
