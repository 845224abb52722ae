"""Gradients of convolutions on maps that are shorter than the kernel, in bfloat16."""

import pytest
import torch
from torch import Tensor, nn

from segkit.models.kernels.convolutions import DepthwiseConv3d, SmallMapsInFloat32


def _weight_gradient(layer: nn.Module, x: Tensor, *, is_short: bool) -> Tensor:
    with SmallMapsInFloat32():
        with torch.autocast("cpu", torch.bfloat16, enabled=is_short):
            y = layer(x)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), layer.weight)  # type: ignore[arg-type]
    return gradient


@pytest.mark.parametrize("size", [(2, 2, 2), (2, 8, 8), (8, 2, 8), (1, 1, 1), (8, 8, 8)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("is_depthwise", [False, True])
def test_weights_have_the_gradient_of_float32(size: tuple[int, ...], stride: int, is_depthwise: bool) -> None:
    torch.manual_seed(0)
    if is_depthwise:
        layer: nn.Module = DepthwiseConv3d(16, 16, 3, padding=1, groups=16, bias=False)
    else:
        layer = nn.Conv3d(16, 16, 3, padding=1, stride=stride)
    x = torch.randn(2, 16, *size)
    full, short = (_weight_gradient(layer, x, is_short=is_short).flatten() for is_short in (False, True))
    assert nn.functional.cosine_similarity(full, short, dim=0) > 0.999


def test_only_short_maps_are_computed_in_float32() -> None:
    layer = nn.Conv2d(1, 1, 3, padding=1)
    with SmallMapsInFloat32(), torch.autocast("cpu", torch.bfloat16):
        dtypes = [layer(torch.zeros(1, 1, *size)).dtype for size in ((3, 3), (2, 3))]
    assert dtypes == [torch.bfloat16, torch.float32]
