"""Networks of MONAI, built from the `network_def` of a bundle: a class of the table below and literal arguments."""

from __future__ import annotations

import importlib.util
import inspect
from math import prod
from typing import Any

import torch
from monai.networks.nets import DynUNet, FlexibleUNet, SegResNet, SegResNetDS, SwinUNETR, UNet
from pydantic import field_validator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from segkit.config import Config
from segkit.errors import RequestError
from segkit.models.blocks import SegmentationNetwork
from segkit.models.smp import without_contents

REFERENCE = "Cardoso et al. 2022, arXiv 2211.02701 (networks of MONAI)"

NETWORKS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (SegResNet, SegResNetDS, UNet, DynUNet, SwinUNETR, FlexibleUNet)
}
"""`_target_` of a `network_def` -> class."""

SIZES: dict[str, dict[str, object]] = {
    "segresnet": {
        "network_def": {
            **{"_target_": "SegResNet", "init_filters": 16, "blocks_down": [1, 2, 2, 4], "blocks_up": [1, 1, 1]},
            "dropout_prob": 0.2,
        }
    },
    "unet": {
        "network_def": {
            **{"_target_": "UNet", "channels": [16, 32, 64, 128, 256], "strides": [2, 2, 2, 2]},
            **{"num_res_units": 2, "norm": "batch"},
        }
    },
}
"""As in brats_mri_segmentation and spleen_ct_segmentation of MONAI's model zoo."""

OF_THE_DATA = ("in_channels", "out_channels", "spatial_dims")
"""Arguments that are not in a configuration: the data decide them."""
_UNUSED = ("img_size",)
"""Arguments of older versions of MONAI without any effect on the network."""
_STEPS = 5
"""Halvings of the resolution in SwinUNETR and FlexibleUNet."""


class MonaiConfig(Config):
    """A network of MONAI."""

    network_def: dict[str, Any]
    """`_target_`, one of `NETWORKS`, and literal arguments, without those of `OF_THE_DATA`."""
    output_order: tuple[int, ...] | None = None
    """Position in MONAI's output of each output, where a bundle has them in another order than they are painted."""

    @field_validator("network_def")
    @classmethod
    def _has_known_arguments(cls, network_def: dict[str, Any]) -> dict[str, Any]:
        kind = NETWORKS.get(str(network_def.get("_target_")))
        if kind is None:
            raise ValueError(f"_target_ is {network_def.get('_target_')!r}; expected one of {', '.join(NETWORKS)}")
        offered = [name for name in inspect.signature(kind).parameters if name not in OF_THE_DATA]
        for name in network_def:
            if name not in ("_target_", *offered):
                raise ValueError(f"{kind.__name__} has no argument {name!r}; expected some of {', '.join(offered)}")
        if network_def.get("pretrained"):
            raise ValueError("pretrained downloads weights; expected false, the weights come from a file")
        return network_def


def arguments_of(network_def: dict[str, Any]) -> dict[str, Any]:
    """The `network_def` of a bundle without the arguments that the data decide, and those without effect."""
    return {name: value for name, value in network_def.items() if name not in (*OF_THE_DATA, *_UNUSED)}


class MonaiNetwork(SegmentationNetwork):
    """A network of MONAI below the name `network`; its encoder has no name of its own, so it cannot be pre-trained."""

    encoder_prefix = ""

    def __init__(self, network: nn.Module, dims: int, output_order: tuple[int, ...] | None) -> None:
        super().__init__()
        self.network = network
        self.divisor = _divisor(network, dims)
        self.output_order = output_order

    def encode(self, x: Tensor) -> list[Tensor]:
        """RequestError."""
        raise RequestError(
            f"the encoder of {type(self.network).__name__} of MONAI cannot be trained alone",
            remedy="Choose another network.family",
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """In training one entry for each supervised level; DynUNet has them in full resolution."""
        made = self.network(x)
        levels: list[Tensor] = list(made) if isinstance(made, (list, tuple)) else [made]
        if levels[0].dim() > x.dim():
            levels = list(levels[0].unbind(1))
        if self.output_order is not None:
            levels = [torch.cat([level[:, k : k + 1] for k in self.output_order], 1) for level in levels]
        return levels if self.training else levels[0]


def build_monai(config: MonaiConfig, in_channels: int, out_channels: int, dims: int) -> MonaiNetwork:
    """The network with fresh weights.

    Raises:
        ValueError: MONAI rejects the arguments.
        RequestError: a library that the network needs is not installed.
    """
    order = config.output_order
    if order is not None and sorted(order) != list(range(out_channels)):
        raise ValueError(f"output_order {order} is not an order of {out_channels} outputs")
    probe = torch.empty(0)
    is_empty = probe.is_meta or isinstance(probe, FakeTensor)

    def make(inputs: int, outputs: int) -> nn.Module:
        return _library_network(config.network_def, inputs, outputs, dims)

    network = without_contents(lambda: make(in_channels, out_channels)) if is_empty else make(in_channels, out_channels)
    built = MonaiNetwork(network, dims, order)
    shapes = {name: tensor.shape for name, tensor in built.state_dict().items()}
    # Other channel counts show which tensors depend on them.
    for_inputs, for_outputs = (
        without_contents(lambda i=inputs, o=outputs: make(i, o)).state_dict()  # type: ignore[misc]
        for inputs, outputs in ((in_channels + 1, out_channels), (in_channels, out_channels + 1))
    )
    built.input_weights = tuple(n for n in shapes if shapes[n] != for_inputs[n.removeprefix("network.")].shape)
    heads = [n for n in shapes if shapes[n] != for_outputs[n.removeprefix("network.")].shape]
    built.head_prefixes = tuple(dict.fromkeys(f"{name.rpartition('.')[0]}." for name in heads))
    return built


def _library_network(network_def: dict[str, Any], in_channels: int, out_channels: int, dims: int) -> nn.Module:
    kind = NETWORKS[network_def["_target_"]]
    if kind is SwinUNETR and importlib.util.find_spec("einops") is None:
        raise RequestError("SwinUNETR needs einops, which is not installed", remedy="pip install 'segkit[monai]'")
    arguments = {name: value for name, value in network_def.items() if name != "_target_"}
    sizes = {"spatial_dims": dims, "in_channels": in_channels, "out_channels": out_channels}
    try:
        return kind(**arguments, **sizes)
    except (AssertionError, AttributeError, KeyError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(f"{kind.__name__}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _divisor(network: Any, dims: int) -> tuple[int, ...]:
    if isinstance(network, SegResNet):
        return (2 ** (len(network.blocks_down) - 1),) * dims
    if isinstance(network, SegResNetDS):
        return tuple(int(factor) for factor in network.shape_factor())
    if isinstance(network, (SwinUNETR, FlexibleUNet)):
        return (int(getattr(network, "patch_size", 2)) ** _STEPS,) * dims
    strides = [(stride,) * dims if isinstance(stride, int) else tuple(stride) for stride in network.strides]
    return tuple(prod(axis) for axis in zip(*strides, strict=True))
