"""The networks of MONAI by their `network_def`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from segkit.errors import RequestError
from segkit.models.table import build_model
from tests.monai_bundles import network_of

DEFINITIONS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "SegResNet": ({"blocks_down": [1, 1], "blocks_up": [1]}, (2, 2, 2)),
    "SegResNetDS": ({"init_filters": 8, "blocks_down": [1, 1, 1], "dsdepth": 2}, (4, 4, 4)),
    "UNet": ({"channels": [4, 8, 8], "strides": [2, [2, 2, 1]], "num_res_units": 1}, (4, 4, 2)),
    "DynUNet": (
        {
            **{"kernel_size": [3, 3, 3], "strides": [1, 2, [2, 2, 1]], "upsample_kernel_size": [2, [2, 2, 1]]},
            **{"filters": [4, 8, 8], "deep_supervision": True, "deep_supr_num": 1},
        },
        (4, 4, 2),
    ),
    "SwinUNETR": ({"feature_size": 12}, (32, 32, 32)),
    "FlexibleUNet": ({"backbone": "efficientnet-b0"}, (32, 32, 32)),
}
"""Arguments and what each axis must be a multiple of."""


def build(name: str, **more: Any) -> Any:
    definition = {"_target_": name, **DEFINITIONS[name][0]}
    return build_model("monai", in_channels=2, out_channels=3, network_def=definition, **more)


@pytest.mark.parametrize("name", sorted(set(DEFINITIONS) - {"SwinUNETR"}))  # as slow as tests/inference/test_bundle.py
def test_every_network_computes_what_monai_computes(name: str) -> None:
    arguments, divisor = DEFINITIONS[name]
    network = build(name).eval()
    assert network.divisor == divisor
    theirs = network_of({"_target_": name, "spatial_dims": 3, "in_channels": 2, "out_channels": 3, **arguments}).eval()
    network.load_state_dict({f"network.{key}": tensor for key, tensor in theirs.state_dict().items()})
    image = torch.randn(1, 2, *(axis * (2 if axis < 32 else 1) for axis in divisor[:2]), 2 * divisor[2])
    with torch.no_grad():
        assert torch.equal(network(image), theirs(image))
        shapes = [tuple(level.shape) for level in network.train()(image)]
    assert shapes[0] == (1, 3, *image.shape[2:])
    assert len(shapes) == (2 if name in ("SegResNetDS", "DynUNet") else 1)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_tensors_of_image_channels_and_outputs_are_found_without_memory(name: str) -> None:
    with torch.device("meta"):
        network = build(name)
    tensors = network.state_dict()
    assert all(tensor.is_meta for tensor in tensors.values())
    assert {tensors[key].shape[1] for key in network.input_weights} == {2}
    assert all(any(key.startswith(prefix) for key in tensors) for prefix in network.head_prefixes)


def test_outputs_are_put_in_the_order_of_painting() -> None:
    torch.manual_seed(0)
    plain = build("SegResNet").eval()
    torch.manual_seed(0)
    ordered = build("SegResNet", output_order=(1, 0, 2)).eval()
    image = torch.randn(1, 2, 8, 8, 8)
    with torch.no_grad():
        assert torch.equal(ordered(image), plain(image)[:, [1, 0, 2]])


@pytest.mark.parametrize(
    ("definition", "order", "expected"),
    [
        ({"_target_": "VNet"}, None, r"_target_ is 'VNet'; expected one of SegResNet, "),
        ({"_target_": "UNet", "chanels": [4, 8]}, None, r"UNet has no argument 'chanels'; expected some of channels, "),
        ({"_target_": "UNet", "in_channels": 2}, None, r"UNet has no argument 'in_channels'"),
        ({"_target_": "UNet", "channels": [4, 8]}, None, r"UNet: .*missing 1 required positional argument: 'strides'"),
        ({"_target_": "FlexibleUNet", "backbone": "efficientnet-b0", "pretrained": True}, None, r"downloads weights"),
        ({"_target_": "SegResNet"}, (0, 0, 1), r"output_order \(0, 0, 1\) is not an order of 3 outputs"),
    ],
)
def test_wrong_definitions_are_named(definition: dict[str, Any], order: tuple[int, ...] | None, expected: str) -> None:
    with pytest.raises(RequestError, match=expected):
        build_model("monai", in_channels=2, out_channels=3, network_def=definition, output_order=order)
