"""The table of networks: family name to configuration, builder and sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from segkit.config import Config
from segkit.errors import RequestError
from segkit.models import generator, inpainter, monai, nnunet, r2unet, revmbunet, smp, stunet, vit
from segkit.models.blocks import SegmentationNetwork


@dataclass(frozen=True)
class ModelEntry:
    """One family: its configuration, its builder (config, in_channels, out_channels, dims), its named sizes."""

    config: type[Config]
    build: Callable[[Any, int, int, int], SegmentationNetwork]
    sizes: Mapping[str, Mapping[str, object]]
    dims: tuple[int, ...]
    reference: str
    default_size: str = "base"


_DIMS = (2, 3)

MODELS: dict[str, ModelEntry] = {
    "revmbunet": ModelEntry(
        revmbunet.RevMBUNetConfig, revmbunet.build_revmbunet, revmbunet.SIZES, _DIMS, revmbunet.REFERENCE
    ),
    "r2unet": ModelEntry(r2unet.R2UNetConfig, r2unet.build_r2unet, r2unet.SIZES, _DIMS, r2unet.REFERENCE, "small"),
    "runet": ModelEntry(r2unet.R2UNetConfig, r2unet.build_r2unet, r2unet.RUNET_SIZES, _DIMS, r2unet.REFERENCE, "small"),
    "plainunet": ModelEntry(nnunet.PlainUNetConfig, nnunet.NnUNet, nnunet.PLAIN_SIZES, _DIMS, nnunet.PLAIN_REFERENCE),
    "resencunet": ModelEntry(
        nnunet.ResEncUNetConfig, nnunet.NnUNet, nnunet.RESIDUAL_SIZES, _DIMS, nnunet.RESIDUAL_REFERENCE, "M"
    ),
    "stunet": ModelEntry(stunet.StuNetConfig, stunet.StuNet, stunet.SIZES, _DIMS, stunet.REFERENCE, "B"),
    "smp": ModelEntry(smp.SmpConfig, smp.build_smp, smp.SIZES, _DIMS, smp.REFERENCE, "unet"),
    "vit": ModelEntry(vit.VitConfig, vit.build_vit, vit.SIZES, _DIMS, vit.REFERENCE),
    "monai": ModelEntry(monai.MonaiConfig, monai.build_monai, monai.SIZES, _DIMS, monai.REFERENCE, "segresnet"),
    "inpainter": ModelEntry(
        inpainter.InpainterConfig, inpainter.Inpainter, inpainter.SIZES, _DIMS, inpainter.REFERENCE
    ),
    "generator": ModelEntry(
        generator.GeneratorConfig, generator.build_generator, generator.SIZES, _DIMS, generator.REFERENCE, "paper"
    ),
}
"""Family name -> entry."""

_SCALE = ("tiny", "small S unet-small", "base B M unet paper", "large L unet-resnet50", "H XL")
"""Names of sizes, from small to large; other sizes are variants of one of these."""


@dataclass(frozen=True)
class ModelInfo:
    """One size of one family in 3D; `tensors` counts the entries of the state dict, running statistics included."""

    name: str
    size: str
    parameters: int
    divisor: tuple[int, ...]
    dims: tuple[int, ...]
    reference: str
    tensors: int


def configure(family: str, size: str | None = None, arguments: Mapping[str, object] | None = None) -> Config:
    """The configuration of a family: its named size, with `arguments` in place of its values.

    Raises:
        RequestError: the family, the size or an argument is unknown or out of range.
    """
    entry = MODELS.get(family)
    if entry is None:
        raise RequestError(f"network {family!r} is not known", expected=f"one of {', '.join(MODELS)}")
    size = size or entry.default_size
    if size not in entry.sizes:
        raise RequestError(f"{family} has no size {size!r}", expected=f"one of {', '.join(entry.sizes)}")
    try:
        return entry.config(**{**entry.sizes[size], **(arguments or {})})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "arguments"
        raise RequestError(f"{family}: {key}: {first['msg']}") from error


def nearest_size(family: str, size: str) -> str:
    """The size of a family that is nearest to a size of another family, the smaller of two that are equally near.

    Sizes that are not on the scale from tiny to large give the usual size of the family.
    """
    places = {name: place for place, names in enumerate(_SCALE) for name in names.split()}
    offered = MODELS[family].sizes
    if size in offered or size not in places:
        return size if size in offered else MODELS[family].default_size
    on_scale = sorted((name for name in offered if name in places), key=places.__getitem__)
    return min(on_scale, key=lambda name: abs(places[name] - places[size]))


def build_model(
    family: str,
    *,
    in_channels: int,
    out_channels: int,
    dims: int = 3,
    size: str | None = None,
    deep_supervision: bool = True,
    **arguments: object,
) -> SegmentationNetwork:
    """A network with fresh weights: (B, in_channels, *spatial) to logits (B, out_channels, *spatial).

    In training mode it returns a list of logits, full resolution first; without `deep_supervision` the first of them,
    as MONAI's losses expect. Each spatial axis must be a multiple of its entry of `model.divisor`, in voxels.

    Raises:
        RequestError: the family, the size, an argument or `dims` is not offered.
    """
    config = configure(family, size, arguments)
    entry = MODELS[family]
    if dims not in entry.dims:
        raise RequestError(f"{family} has no {dims}-dimensional form", expected=f"dims in {entry.dims}")
    try:
        network = entry.build(config, in_channels, out_channels, dims)
    except ValueError as error:
        raise RequestError(f"{family}: {error}", expected=f"arguments for {dims} spatial axes") from error
    if not deep_supervision:
        network.register_forward_hook(_first_of)
    return network


def _first_of(_: nn.Module, __: Any, logits: Tensor | list[Tensor]) -> Tensor:
    """A forward hook: the logits of full resolution."""
    return logits[0] if isinstance(logits, list) else logits


def list_models(in_channels: int = 4, out_channels: int = 3) -> list[ModelInfo]:
    """Every size of every family with these channels, counted without allocating weights."""
    found = []
    for family, entry in MODELS.items():
        for size in entry.sizes:
            with torch.device("meta"):
                model = build_model(
                    family, in_channels=in_channels, out_channels=out_channels, dims=entry.dims[-1], size=size
                )
            parameters, tensors = sum(parameter.numel() for parameter in model.parameters()), len(model.state_dict())
            found.append(ModelInfo(family, size, parameters, model.divisor, entry.dims, entry.reference, tensors))
    return found
