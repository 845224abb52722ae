"""The depthwise convolution against `nn.Conv3d(groups=channels)`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from segkit.models.kernels.convolutions import DepthwiseConv3d


def _pair(channels: int, kernel: int) -> tuple[nn.Conv3d, DepthwiseConv3d]:
    arguments = {"padding": kernel // 2, "groups": channels, "bias": False}
    plain = nn.Conv3d(channels, channels, kernel, **arguments).double()  # type: ignore[arg-type]
    ours = DepthwiseConv3d(channels, channels, kernel, **arguments).double()  # type: ignore[arg-type]
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def _run(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    (y * torch.arange(y.numel()).view_as(y)).sum().backward()
    return y, x.grad, module.weight.grad  # type: ignore[return-value]


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("shape", [(2, 4, 5, 6, 7), (1, 4, 1, 3, 2), (3, 4, 2, 2, 2)])
def test_output_and_gradients_equal_the_grouped_convolution(shape: tuple[int, ...], kernel: int) -> None:
    plain, ours = _pair(4, kernel)
    x = torch.randn(shape, dtype=torch.float64)
    for expected, got in zip(_run(plain, x), _run(ours, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-8)


def test_frozen_weight_still_passes_the_gradient_on() -> None:
    plain, ours = _pair(4, 3)
    x = torch.randn(1, 4, 3, 3, 3, dtype=torch.float64)
    for module in (plain, ours):
        module.weight.requires_grad_(False)
    gradients = []
    for module in (plain, ours):
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert ours.weight.grad is None
    torch.testing.assert_close(gradients[1], gradients[0])
