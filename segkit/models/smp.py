"""Two-dimensional networks of segmentation-models-pytorch, for images and, slice by slice, for volumes.

Unet (Ronneberger et al. 2015), UnetPlusPlus (Zhou et al. 2018), FPN (Kirillov et al. 2019), DeepLabV3Plus (Chen et al.
2018) and Segformer (Xie et al. 2021) on any encoder of the library, its own and timm's ("tu-" before the name).
State-dict names are the library's: "encoder.", "decoder.", "segmentation_head.". With "resnet50" at depth 5 the names
below "encoder." are those of torchvision's ResNet-50 without its classifier, as in the file of LVM-Med.

Most encoders have batch norm, so the output of evaluation differs from that of training. A batch norm with one value
per channel in training uses its running statistics (`make_single_values_safe`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from segkit.models.slicewise import SlicewiseConfig
from segkit.models.smp_encoders import (
    Sketch,
    build_library_network,
    make_single_values_safe,
    require_known_encoder,
    sketch,
)

REFERENCE = "segmentation-models-pytorch: Unet, UnetPlusPlus, FPN, DeepLabV3Plus, Segformer"

Architecture = Literal["unet", "unetplusplus", "fpn", "deeplabv3plus", "segformer"]

_CLASSES: dict[Architecture, str] = {
    "unet": "Unet",
    "unetplusplus": "UnetPlusPlus",
    "fpn": "FPN",
    "deeplabv3plus": "DeepLabV3Plus",
    "segformer": "Segformer",
}
_WIDTHS: dict[Architecture, tuple[int, ...]] = {
    "unet": (256, 128, 64, 32, 16),
    "unetplusplus": (256, 128, 64, 32, 16),
    "fpn": (256, 128),
    "deeplabv3plus": (256,),
    "segformer": (256,),
}
_NESTED: tuple[Architecture, ...] = ("unet", "unetplusplus")


class SmpConfig(SlicewiseConfig):
    """A decoder on an encoder of segmentation-models-pytorch."""

    architecture: Architecture = "unet"
    """Decoder: unet, unetplusplus, fpn, deeplabv3plus or segformer."""
    encoder: str = "resnet34"
    """Encoder, by the library's name (resnet50, mit_b0, ...) or "tu-" and a timm name (tu-regnetx_002)."""
    encoder_depth: int = Field(default=5, ge=3, le=5)
    """Halvings of the resolution in the encoder."""
    encoder_weights: str | None = None
    """Pre-trained weights to download, such as imagenet; None starts from random ones and downloads nothing."""
    decoder_channels: tuple[int, ...] | None = None
    """Widths of the decoder: one per halving from the deepest up (unet, unetplusplus), pyramid and segmentation (fpn),
    one (deeplabv3plus, segformer); None is the library's choice."""
    decoder_attention: Literal["scse"] | None = None
    """Attention in the decoder blocks of unet and unetplusplus."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout in the decoder of fpn (None is 0.2) and deeplabv3plus (None is 0.5)."""
    output_stride: Literal[8, 16] = 16
    """Pixels of the image per pixel of the deepest features of deeplabv3plus."""
    atrous_rates: tuple[int, int, int] = (12, 24, 36)
    """Dilations of the pyramid of deeplabv3plus."""

    @model_validator(mode="after")
    def _agrees(self) -> SmpConfig:
        expected = len(self._widths())
        if self.decoder_channels is not None and len(self.decoder_channels) != expected:
            raise ValueError(
                f"decoder_channels names {len(self.decoder_channels)} widths, but {self.architecture} "
                f"at depth {self.encoder_depth} has {expected}"
            )
        if min(self.decoder_channels or (1,)) < 1:
            raise ValueError("decoder_channels are numbers from 1 on")
        if self.decoder_attention and self.architecture not in _NESTED:
            raise ValueError(f"decoder_attention is an option of {' and '.join(_NESTED)}, not of {self.architecture}")
        if self.decoder_attention and min(self.decoder_channels or (16,)) < 16:
            raise ValueError("decoder_attention needs decoder_channels of 16 and more, which it narrows by 16")
        if self.dropout is not None and self.architecture not in ("fpn", "deeplabv3plus"):
            raise ValueError(f"dropout is an option of fpn and deeplabv3plus, not of {self.architecture}")
        if self.architecture == "fpn" and self.encoder_depth == 3:
            raise ValueError("fpn needs encoder_depth 4 or 5, because it merges four levels of features")
        if self.architecture == "fpn" and (self.decoder_channels or (0, 32))[1] % 32:
            raise ValueError("the second of fpn's decoder_channels is a multiple of 32, the groups of its norms")
        return self

    def _widths(self) -> tuple[int, ...]:
        """The library's own decoder widths."""
        widths = _WIDTHS[self.architecture]
        return widths[-self.encoder_depth :] if self.architecture in _NESTED else widths

    def library_options(self) -> dict[str, object]:
        """Keyword arguments of the library's class, without encoder name, weights and channel counts."""
        widths = self.decoder_channels or self._widths()
        options: dict[str, object] = {"encoder_depth": self.encoder_depth}
        if self.architecture in _NESTED:
            return {**options, "decoder_channels": widths, "decoder_attention_type": self.decoder_attention}
        if self.architecture == "segformer":
            return {**options, "decoder_segmentation_channels": widths[0]}
        if self.architecture == "fpn":
            return {
                **options,
                "decoder_pyramid_channels": widths[0],
                "decoder_segmentation_channels": widths[1],
                "decoder_dropout": 0.2 if self.dropout is None else self.dropout,
                # The pyramid ends three levels above the deepest features.
                "upsampling": 2 ** (self.encoder_depth - 3),
            }
        return {
            **options,
            "decoder_channels": widths[0],
            "decoder_aspp_dropout": 0.5 if self.dropout is None else self.dropout,
            "decoder_atrous_rates": self.atrous_rates,
            "encoder_output_stride": self.output_stride,
        }


SIZES: dict[str, dict[str, object]] = {
    "unet": {},
    "unet-small": {"encoder": "tu-regnetx_002", "decoder_channels": (128, 64, 32, 16, 16)},
    "unet-resnet50": {"encoder": "resnet50"},
    "unetplusplus": {"architecture": "unetplusplus"},
    "fpn": {"architecture": "fpn"},
    "deeplabv3plus": {"architecture": "deeplabv3plus"},
    "segformer": {"architecture": "segformer", "encoder": "mit_b0"},
}
"""Size name -> the configuration it stands for."""


def build_smp(config: SmpConfig, in_channels: int, out_channels: int, dims: int) -> nn.Module:
    """The network for images (B, in_channels, H, W), or its slice-wise form for volumes.

    Raises:
        ValueError: the encoder is unknown, does not fit the decoder, or its weights are not available.
    """
    require_known_encoder(config.encoder)
    channels = config.image_channels(in_channels, dims)
    network = _library_network(config, config.encoder_weights, channels, out_channels)
    # Another channel count shows which weights depend on the channels, a training step which weights are used.
    trial = _trial(config, channels + 1, out_channels)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in trial.unused)
    input_weights = tuple(
        name for name, tensor in network.state_dict().items() if tuple(tensor.shape) != trial.tensors[name]
    )
    return config.applied_to(SmpNetwork(network, trial.image[-2], input_weights), dims)


def _library_network(config: SmpConfig, weights: str | None, in_channels: int, out_channels: int) -> nn.Module:
    options = {**config.library_options(), "in_channels": in_channels, "classes": out_channels}
    return build_library_network(_CLASSES[config.architecture], config.encoder, weights, options)


@lru_cache(maxsize=32)  # planning builds the same network many times
def _trial(config: SmpConfig, in_channels: int, out_channels: int) -> Sketch:
    """A training step on an image as high as the divisor and twice as wide.

    The divisor is the encoder's output stride, or two or four times as much if its deeper layers need larger maps
    (SegFormer's encoders pool tokens 8 x 8).

    Raises:
        ValueError: the network does not work on such images, or its logits have another size.
    """

    def images(network: nn.Module) -> list[tuple[int, ...]]:
        stride: int = network.encoder.output_stride  # type: ignore[union-attr, assignment]
        return [(2, in_channels, factor * stride, 2 * factor * stride) for factor in (1, 2, 4)]

    what = f"{config.architecture} on {config.encoder}"
    try:
        trial = sketch(lambda: _library_network(config, None, in_channels, out_channels), images)
    except ValueError as error:
        raise ValueError(f"{what} does not work: {error}") from error
    if trial.logits != (2, out_channels, *trial.image[2:]):
        raise ValueError(f"{what} does not work: images {trial.image} become logits {trial.logits}")
    return trial


class SmpNetwork(nn.Module):
    """Encoder, decoder and head of a network of the library, under the library's names.

    Weights beyond the chosen depth are kept, so that files of the whole encoder load, but are frozen.
    """

    def __init__(self, network: nn.Module, divisor: int, input_weights: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder: nn.Module = network.encoder  # type: ignore[assignment]
        self.decoder: nn.Module = network.decoder  # type: ignore[assignment]
        self.segmentation_head: nn.Module = network.segmentation_head  # type: ignore[assignment]
        self.divisor = (divisor, divisor)
        self.input_weights = input_weights
        self.head_prefixes = ("segmentation_head.",)
        self.encoder_prefix = "encoder."
        make_single_values_safe(self)

    def encode(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, H, W) to one feature map per halving of the resolution, the deepest last."""
        _image, *features = self.encoder(x)
        return [level for level in features if level.shape[1]]  # SegFormer's encoders have nothing at half resolution

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(B, in_channels, H, W), H and W multiples of `divisor`, to logits (B, out_channels, H, W).

        While training: a list of them, its only entry in full resolution.
        """
        logits: Tensor = self.segmentation_head(self.decoder(self.encoder(x)))
        return [logits] if self.training else logits
