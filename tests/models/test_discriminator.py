"""The patch discriminator: its parameters, what a logit sees, its spectral norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from segkit.models.generator import build_discriminator

CONVS = {2: nn.Conv2d, 3: nn.Conv3d}


def test_the_layers_are_those_of_the_paper() -> None:
    discriminator = build_discriminator(3, 2)
    convs = [part for part in discriminator.modules() if isinstance(part, nn.Conv2d)]
    layers = [(conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0]) for conv in convs]
    assert layers == [(3, 64, 4, 2), (64, 128, 4, 2), (128, 256, 4, 2), (256, 512, 4, 1), (512, 1, 4, 1)]
    assert all(conv.bias is None for conv in convs)
    parameters = sum(parameter.numel() for parameter in discriminator.parameters())
    assert parameters == 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) == 2_763_776
    slopes = [part.negative_slope for part in discriminator.modules() if isinstance(part, nn.LeakyReLU)]
    assert slopes == [0.2] * 4
    others = {type(part) for part in discriminator.modules()} & {nn.BatchNorm2d, nn.InstanceNorm2d, nn.Sigmoid}
    assert others == set()


@pytest.mark.parametrize("dims", [2, 3])
def test_a_logit_sees_70_voxels_an_axis(dims: int) -> None:
    torch.manual_seed(0)
    discriminator = build_discriminator(1, dims, width=2).eval()
    image = torch.randn(1, 1, *(96,) * dims, requires_grad=True)
    logits = discriminator(image)
    assert logits.shape == (1, 1) + (10,) * dims
    logits[(0, 0, *(5,) * dims)].backward()
    assert image.grad is not None
    seen = image.grad[0, 0] != 0
    for axis in range(dims):
        others = tuple(other for other in range(dims) if other != axis)
        places = seen.sum(others).nonzero()[:, 0]
        assert (int(places[0]), int(places[-1])) == (17, 86)  # 70 voxels: 8 x 5 - 23 to 8 x 5 + 46


@pytest.mark.parametrize("dims", [2, 3])
def test_kernels_have_singular_values_up_to_1(dims: int) -> None:
    torch.manual_seed(0)
    discriminator = build_discriminator(2, dims, width=4)
    for conv in (part for part in discriminator.modules() if isinstance(part, CONVS[dims])):
        with torch.no_grad():
            conv.parametrizations.weight.original.mul_(5)
        for _ in range(30):  # each look at the weight in training comes closer
            weight = conv.weight.detach()
        assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_half_precision() -> None:
    torch.manual_seed(0)
    discriminator = build_discriminator(1, 2, width=8).eval()
    image = torch.randn(2, 1, 32, 32)
    expected = discriminator(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = discriminator(image)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, atol=0.1 * expected.abs().max().item(), rtol=0.1)


def test_the_smallest_image_and_one_below() -> None:
    discriminator = build_discriminator(1, 2, width=2)
    assert discriminator(torch.zeros(1, 1, 24, 24)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"\(24, 23\) voxels is too small for a discriminator; expected at least 24"):
        discriminator(torch.zeros(1, 1, 24, 23))
