"""Shared layers: what they compute differently from PyTorch's own must give the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from segkit.models.blocks import InstanceNorm, channels_innermost, without_statistics
from segkit.models.kernels.convolutions import PointwiseConv3d, pointwise


def _innermost(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()


@pytest.mark.parametrize("bias", [True, False])
def test_pointwise_with_channels_innermost_equals_the_convolution(bias: bool) -> None:
    layer = pointwise(3, 4, 3, bias=bias).double()
    assert isinstance(layer, PointwiseConv3d)
    outer = torch.randn(2, 4, 2, 3, 5, dtype=torch.float64)
    inner = outer.contiguous(memory_format=torch.channels_last_3d)
    outer.requires_grad_()
    inner.requires_grad_()
    expected = nn.functional.conv3d(outer, layer.weight, layer.bias)
    found = layer(inner)
    assert _innermost(found)
    torch.testing.assert_close(found, expected)
    expected_gradients = torch.autograd.grad(expected.square().sum(), [outer, *layer.parameters()])
    gradients = torch.autograd.grad(found.square().sum(), [inner, *layer.parameters()])
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_pointwise_leaves_the_memory_order_as_it_is() -> None:
    layer = pointwise(3, 4, 3)
    x = torch.randn(1, 4, 2, 3, 5)
    assert layer(x).is_contiguous()
    assert _innermost(layer(channels_innermost(x)))


def test_only_volumes_are_turned_innermost() -> None:
    assert _innermost(channels_innermost(torch.zeros(1, 2, 3, 3, 3)))
    assert channels_innermost(torch.zeros(1, 2, 3, 3)).is_contiguous()


@pytest.mark.parametrize(
    ("shape", "reference"), [((2, 3, 4, 5), nn.InstanceNorm2d), ((2, 3, 4, 5, 2), nn.InstanceNorm3d)]
)
def test_instance_norm_is_that_of_pytorch(shape: tuple[int, ...], reference: type[nn.Module]) -> None:
    norm, expected = InstanceNorm(3), reference(3, affine=True)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    expected.load_state_dict(norm.state_dict())
    x = torch.randn(shape)
    torch.testing.assert_close(norm(x), expected(x))


def test_instance_norm_of_a_single_voxel_is_its_shift() -> None:
    norm = InstanceNorm(2)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([3.0, -1.0]))
    for is_training in (True, False):
        found = norm.train(is_training)(torch.randn(1, 2, 1, 1, 1)).flatten()
        torch.testing.assert_close(found, torch.tensor([3.0, -1.0]), atol=1e-3, rtol=0)  # of x / sqrt(epsilon)


def test_batch_norms_do_not_count_without_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False))
    x = torch.randn(2, 2, 4, 4)
    expected = model(x)
    before = model[0].running_mean
    values = before.clone()
    with without_statistics(model):
        torch.testing.assert_close(model(x), expected)
    assert model[0].running_mean is before
    assert torch.equal(before, values)
    assert int(model[0].num_batches_tracked) == 1
