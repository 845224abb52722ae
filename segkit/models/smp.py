"""Two-dimensional networks of segmentation-models-pytorch, for images and, slice by slice, for volumes.

Unet (Ronneberger et al. 2015), UnetPlusPlus (Zhou et al. 2018), FPN (Kirillov et al. 2019), DeepLabV3Plus (Chen et al.
2018) and Segformer (Xie et al. 2021) on any encoder of the library, its own and timm's ("tu-" before the name).
State-dict names are the library's: "encoder.", "decoder.", "segmentation_head.". With "resnet50" at depth 5 the names
below "encoder." are those of torchvision's ResNet-50 without its classifier, as in the file of LVM-Med.

Most encoders have batch norm, so the output of evaluation differs from that of training. The library is imported inside
functions, so that segkit also runs without it or without a matching torchvision.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from segkit.models.blocks import SegmentationNetwork, SlicewiseConfig

REFERENCE = "segmentation-models-pytorch: Unet, UnetPlusPlus, FPN, DeepLabV3Plus, Segformer"

Architecture = Literal["unet", "unetplusplus", "fpn", "deeplabv3plus", "segformer"]

_ARCHITECTURES: dict[Architecture, tuple[str, tuple[int, ...]]] = {
    "unet": ("Unet", (256, 128, 64, 32, 16)),
    "unetplusplus": ("UnetPlusPlus", (256, 128, 64, 32, 16)),
    "fpn": ("FPN", (256, 128)),
    "deeplabv3plus": ("DeepLabV3Plus", (256,)),
    "segformer": ("Segformer", (256,)),
}
"""The library's class and its widths of the decoder."""
_NESTED: tuple[Architecture, ...] = ("unet", "unetplusplus")
_TIMM = "tu-"  # prefix of the encoders that come from timm


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
        expected = len(self._library_widths())
        if self.decoder_channels is not None and len(self.decoder_channels) != expected:
            has = f"{self.architecture} at depth {self.encoder_depth} has {expected}"
            raise ValueError(f"decoder_channels names {len(self.decoder_channels)} widths, but {has}")
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

    def _library_widths(self) -> tuple[int, ...]:
        _, widths = _ARCHITECTURES[self.architecture]
        return widths[-self.encoder_depth :] if self.architecture in _NESTED else widths

    def library_options(self) -> dict[str, object]:
        """Keyword arguments of the library's class, without encoder name, weights and channel counts."""
        widths = self.decoder_channels or self._library_widths()
        options: dict[str, object] = {"encoder_depth": self.encoder_depth}
        if self.architecture in _NESTED:
            return {**options, "decoder_channels": widths, "decoder_attention_type": self.decoder_attention}
        if self.architecture == "segformer":
            return {**options, "decoder_segmentation_channels": widths[0]}
        if self.architecture == "fpn":
            dropout = 0.2 if self.dropout is None else self.dropout
            options |= {"decoder_pyramid_channels": widths[0], "decoder_segmentation_channels": widths[1]}
            # The pyramid ends three levels above the deepest features.
            return {**options, "decoder_dropout": dropout, "upsampling": 2 ** (self.encoder_depth - 3)}
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


def build_smp(config: SmpConfig, in_channels: int, out_channels: int, dims: int) -> SegmentationNetwork:
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


def _library_network(config: SmpConfig, encoder_weights: str | None, in_channels: int, out_channels: int) -> nn.Module:
    """The library's network; nothing is downloaded if `encoder_weights` is None.

    On the meta device or with fake tensors it has shapes but no contents, and nothing is downloaded.

    Raises:
        ValueError: the library rejects the options, has no such weights or cannot download them.
    """
    architecture, encoder = _ARCHITECTURES[config.architecture][0], config.encoder
    kind = getattr(_library(), architecture)
    options = {**config.library_options(), "in_channels": in_channels, "classes": out_channels}

    def make(weights: object) -> nn.Module:
        network: nn.Module = kind(encoder_name=encoder, encoder_weights=weights, **options)
        return network

    probe = torch.empty(0)
    try:
        if probe.is_meta or isinstance(probe, FakeTensor):
            return without_contents(lambda: make(None))
        # timm has the weights in the network's name and takes a boolean.
        return make(True if encoder_weights and encoder.startswith(_TIMM) else encoder_weights)
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError) as error:
        found = f"{architecture} on {encoder} cannot be built"
        raise ValueError(f"{found}: {str(error) or type(error).__name__}") from error


@lru_cache(maxsize=32)  # planning builds the same network many times
def _trial(config: SmpConfig, in_channels: int, out_channels: int) -> Sketch:
    """A training step on an image as high as the divisor and twice as wide.

    The divisor is the encoder's output stride, or two or four times as much (SegFormer's encoders pool tokens 8 x 8).

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


class SmpNetwork(SegmentationNetwork):
    """Encoder, decoder and head of a network of the library, under the library's names.

    Weights beyond the chosen depth are kept, so that files of the whole encoder load, but are frozen.
    """

    head_prefixes = ("segmentation_head.",)

    def __init__(self, network: nn.Module, divisor: int, input_weights: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder: nn.Module = network.encoder  # type: ignore[assignment]
        self.decoder: nn.Module = network.decoder  # type: ignore[assignment]
        self.segmentation_head: nn.Module = network.segmentation_head  # type: ignore[assignment]
        self.divisor = (divisor, divisor)
        self.input_weights = input_weights
        make_single_values_safe(self)

    def encode(self, x: Tensor) -> list[Tensor]:
        """One feature map per halving of the resolution."""
        _image, *features = self.encoder(x)
        return [level for level in features if level.shape[1]]  # SegFormer's encoders have nothing at half resolution

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """In training the list has one entry, in full resolution."""
        logits: Tensor = self.segmentation_head(self.decoder(self.encoder(x)))
        return [logits] if self.training else logits


def require_known_encoder(name: str) -> None:
    """Check that the library has an encoder `name`: one of its own, or "tu-" and the name of a timm network.

    Raises:
        ValueError: it has none (the message names close matches), or the library cannot be imported.
    """
    encoders = _library().encoders
    import timm

    own: list[str] = encoders.get_encoder_names()
    if name in own or encoders.is_equivalent_to_timm_universal(name):
        return
    if name.startswith(_TIMM) and timm.is_model(name.removeprefix(_TIMM).partition(".")[0]):
        return
    known = [*own, *(_TIMM + model for model in timm.list_models())]
    close = difflib.get_close_matches(name, known, n=4)
    hint = f"close are {', '.join(close)}" if close else f"known are {', '.join(own[:8])} and more, also tu-<timm name>"
    raise ValueError(f"encoder {name!r} is not known; {hint}")


@dataclass(frozen=True)
class Sketch:
    """Result of a training step without contents: shapes of image, logits and tensors, and unused parameters."""

    image: tuple[int, ...]
    logits: tuple[int, ...]
    tensors: Mapping[str, tuple[int, ...]]
    unused: frozenset[str]


def sketch(make: Callable[[], nn.Module], images: Callable[[nn.Module], Sequence[tuple[int, ...]]]) -> Sketch:
    """Run one training step of a network on the meta device, without allocating memory.

    `images` gives shapes (B, C, H, W) for the network; the first that works is taken.

    Raises:
        ValueError: none of them works; the message is about the last.
    """
    with unset_fake_temporarily(), torch.device("meta"), torch.inference_mode(mode=False), torch.enable_grad():
        network = without_contents(make).train()
        *others, last = images(network)
        for image in (*others, last):
            try:
                logits: Tensor = network(torch.empty(image))
                break
            except (AssertionError, RuntimeError) as error:
                if image == last:
                    raise ValueError(f"images of {image[-2]} x {image[-1]} pixels fail: {error}") from error
        torch.autograd.backward(logits.sum())
        tensors = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    unused = frozenset(name for name, parameter in network.named_parameters() if parameter.grad is None)
    return Sketch(image, tuple(logits.shape), tensors, unused)


def make_single_values_safe(network: nn.Module) -> None:
    """Let batch norms that get a single value per channel in training use their running statistics for that pass.

    A batch of one has one value per channel if the deepest map is 1 x 1, and after global pooling (DeepLab).
    """
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(_leave_training_for_one_value)
            module.register_forward_hook(_return_to_training, always_call=True)


def _leave_training_for_one_value(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if module.training and inputs[0].numel() == inputs[0].shape[1] and isinstance(module.running_mean, Tensor):
        module.training, module.is_interrupted = False, True  # type: ignore[assignment]


def _return_to_training(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
    if getattr(module, "is_interrupted", False):
        module.training, module.is_interrupted = True, False  # type: ignore[assignment]


def _library() -> Any:
    try:
        import segmentation_models_pytorch
    except (ImportError, RuntimeError) as error:  # RuntimeError: torch and torchvision do not match
        remedy = "install it, with a torchvision that was made for the torch at hand"
        raise ValueError(f"segmentation-models-pytorch cannot be imported ({error}); {remedy}") from error
    return segmentation_models_pytorch


def without_contents(make: Callable[[], nn.Module]) -> nn.Module:
    """`make()` with tensors of the surrounding device or mode, without allocating memory.

    The library reads numbers from tensors while it builds networks and always places some weights on the CPU, so the
    network is built on the meta device, and then each tensor is replaced by one of its shape.
    """
    with unset_fake_temporarily(), torch.device("meta"), _RatesOnCpu():
        network = make()
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return network


class _RatesOnCpu(TorchFunctionMode):
    """Give `linspace` contents: rates of stochastic depth are read from one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({"device": "cpu", **kwargs} if func is torch.linspace else kwargs))
