"""Sparse masking: visible voxels are computed as if the image ended at the hidden ones, in every family."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import segkit
from segkit.pretraining.masked import MaskedReconstruction
from segkit.pretraining.sparse import SparseMasking

FAMILIES: dict[str, dict[str, object]] = {
    "revmbunet": {"dims": 3, "widths": (8, 16), "blocks": 2},
    "revmbunet in parts": {"dims": 2, "widths": (8, 16), "chunks": 2, "mode": "reversible"},
    "revmbunet again": {"dims": 3, "widths": (8, 16), "mode": "checkpoint"},
    "stunet": {"dims": 3, "width": 2, "strides": ((2, 2, 2), (2, 2, 2), (1, 1, 1), (1, 1, 1), (1, 1, 1))},
    "plainunet": {"dims": 2, "widths": (4, 8), "blocks": 1},
    "resencunet": {"dims": 3, "widths": (4, 8), "blocks": 1, "norm": "batch"},
    "r2unet": {"dims": 2, "widths": (4, 8)},
    "r2unet tied": {"dims": 2, "widths": (4, 8), "share": "tied", "norm": "batch_shared"},
    "smp": {"dims": 2, "encoder": "resnet18", "decoder_channels": (16, 8, 8, 4, 4)},
    "smp of timm": {"dims": 2, "encoder": "tu-regnetx_002", "decoder_channels": (16, 8, 8, 4, 4)},
}


def network_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    network = segkit.build_model(name.split()[0], in_channels=2, out_channels=2, **FAMILIES[name])
    for parameter in network.parameters():  # biases that are 0 could hide that they reach hidden voxels
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return network.train()


def half_hidden(image: Tensor) -> Tensor:
    hidden = image.clone()
    hidden[..., image.shape[-1] // 2 :] = math.nan
    return hidden


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_those_of_the_visible_half_alone(name: str) -> None:
    network = network_of(name)
    plain = copy.deepcopy(network)
    SparseMasking(network)
    divisor = max(network.divisor)
    image = torch.randn(2, 2, *(2 * divisor,) * (len(network.divisor) - 1), 4 * divisor)

    network(half_hidden(image))  # sets the mask
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.reset_running_stats()
    found = network.encode(half_hidden(image).nan_to_num(0))
    expected = plain.encode(image[..., : 2 * divisor])

    for features, whole in zip(found, expected, strict=True):
        visible, hidden = features.chunk(2, dim=-1)
        assert torch.allclose(visible, whole, atol=2e-4), (visible - whole).abs().max()
        assert not hidden.any()
    for (_, running), (where, wanted) in zip(network.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.allclose(running.float(), wanted.float(), atol=1e-4), where


def test_only_the_image_masked_lets_hidden_voxels_in() -> None:
    """What the test above would find without the masks of the layers."""
    network = network_of("stunet")
    image = half_hidden(torch.randn(2, 2, 8, 8, 16)).nan_to_num(0)
    found, expected = network.encode(image), network.encode(image[..., :8])
    assert any((a[..., : b.shape[-1]] - b).abs().max() > 0.1 for a, b in zip(found, expected, strict=True))
    assert found[0][..., 8:].any()


def test_a_coarse_voxel_is_hidden_if_all_that_it_covers_are() -> None:
    """Of 4 x 4 voxels all but the first are hidden: of the 2 x 2 coarse ones all but the first."""
    network = network_of("plainunet")
    SparseMasking(network)
    image = torch.full((1, 2, 4, 4), math.nan)
    image[:, :, 0, 0] = 1
    network(image)
    deepest = network.encode(image.nan_to_num(0))[-1]
    assert (deepest != 0).any(1).tolist() == [[[True, False], [False, False]]]


@pytest.mark.parametrize("name", ["revmbunet in parts", "revmbunet again", "smp"])
def test_gradients_do_not_depend_on_what_is_hidden(name: str) -> None:
    """The decoder and the passes that compute the encoder again included."""
    gradients = []
    for value in (0.0, 7.0):
        method = MaskedReconstruction(network_of(name))
        side = 4 * max(method.network.divisor)
        image = torch.randn(4, 2, *(side,) * len(method.network.divisor), generator=torch.Generator().manual_seed(1))
        hidden = torch.zeros(4, 1, *image.shape[2:], dtype=torch.bool)
        hidden[..., side // 2 :] = True
        found = method._found(image.masked_fill(hidden, value), hidden)
        torch.autograd.backward(sum(level.square().mean() for level in found))
        gradients.append([p.grad for p in method.network.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in gradients[0] if gradient.dim() > 1)


def test_a_pass_in_two_processes_is_that_in_one() -> None:
    image = torch.randn(4, 2, 16, 16, 16)
    hidden = torch.rand(4, 1, 16, 16, 16) < 0.6
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = MaskedReconstruction(network_of("revmbunet"))._found(image, hidden)
            results.append(found[0].detach())
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(*results, atol=1e-5)
