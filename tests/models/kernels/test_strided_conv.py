"""Steps between resolutions against PyTorch's layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from segkit.models.kernels.convolutions import StepDown3d, StepUp3d, step_down, step_up


def _pair(kind: str, stride: tuple[int, int, int]) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    ours, theirs = {"down": (step_down, nn.Conv3d), "up": (step_up, nn.ConvTranspose3d)}[kind]
    layer = ours(3, 4, 6, stride).double()
    reference = theirs(4, 6, stride, stride=stride).double()
    reference.load_state_dict(layer.state_dict())
    shape = [2 * step for step in stride] if kind == "down" else [2, 3, 2]
    return layer, reference, torch.randn(2, 4, *shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["down", "up"])
@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (3, 1, 2)])
@pytest.mark.parametrize("is_innermost", [True, False])
def test_output_and_gradients_are_those_of_the_layer(
    kind: str, stride: tuple[int, int, int], is_innermost: bool
) -> None:
    layer, reference, x = _pair(kind, stride)
    x = x.contiguous(memory_format=torch.channels_last_3d) if is_innermost else x
    mine, other = x.clone(memory_format=torch.preserve_format).requires_grad_(), x.clone().requires_grad_()
    result, expected = layer(mine), reference(other)
    torch.testing.assert_close(result, expected)
    weights = torch.randn_like(expected)
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad)
    for one, two in zip(layer.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("kind", ["down", "up"])
def test_frozen_weights_and_images_without_gradient(kind: str) -> None:
    layer, _, x = _pair(kind, (2, 2, 2))
    x = x.contiguous(memory_format=torch.channels_last_3d)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    layer.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_one_voxel_by_hand() -> None:
    down, up = StepDown3d(2, 1, (1, 1, 2), stride=(1, 1, 2)), StepUp3d(2, 1, (1, 1, 2), stride=(1, 1, 2))
    for layer in (down, up):
        nn.init.constant_(layer.bias, 0.5)
    with torch.no_grad():
        down.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 2, 1, 1, 2))
        up.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(2, 1, 1, 1, 2))
    x = torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 1, 1, 2, 2).movedim(-1, 1).requires_grad_()
    y = down(x)  # (1, 10) and (100, 1000) by channels: 1 + 2 * 100 + 3 * 10 + 4 * 1000
    assert y.flatten().tolist() == [4231.5]
    y.sum().backward()
    assert x.grad.flatten().tolist() == [1.0, 2.0, 3.0, 4.0]  # type: ignore[union-attr]
    z = torch.tensor([1.0, 10.0]).view(1, 1, 1, 1, 2).movedim(-1, 1).requires_grad_()
    assert up(z).flatten().tolist() == [31.5, 42.5]


def test_a_size_that_the_stride_does_not_divide_loses_its_rest_as_in_the_layer() -> None:
    layer, reference, _ = _pair("down", (2, 2, 2))
    x = torch.randn(1, 4, 5, 4, 7, dtype=torch.float64).contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(layer(x), reference(x))
