"""The inverted bottleneck: its parts one after another give the same sum, in less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from segkit.models.revmbunet import InvertedBottleneck


def _bottleneck(dims: int, chunks: int) -> InvertedBottleneck:
    torch.manual_seed(0)
    block = InvertedBottleneck(8, 4, dims, chunks).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


def _saved_bytes(block: nn.Module, x: Tensor) -> int:
    sizes: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(x)
    return sum(sizes.values())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("chunks", [2, 4, 8])
def test_parts_give_the_same_output_and_gradients(dims: int, chunks: int) -> None:
    x = torch.randn(2, 8, *(5,) * dims, dtype=torch.float64, requires_grad=True)
    results = []
    for parts in (1, chunks):
        block = _bottleneck(dims, parts)
        y = block(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])])
        with torch.no_grad():
            torch.testing.assert_close(block(x), y)
    for whole, in_parts in zip(*results, strict=True):
        torch.testing.assert_close(in_parts, whole, rtol=1e-10, atol=1e-10)


def test_a_part_holds_whole_groups_of_the_norm() -> None:
    assert _bottleneck(3, 8).chunks == 8  # 32 hidden channels in 8 groups
    assert InvertedBottleneck(2, 2, 3, 8).chunks == 2  # 4 hidden channels make 2 groups


def test_parts_keep_the_input_and_the_sum_only() -> None:
    x = torch.randn(1, 8, 6, 6, 6, dtype=torch.float64)
    map_bytes = 8 * 6**3 * 8  # 8 channels in float64; the 32 hidden ones take four times as much
    assert _saved_bytes(_bottleneck(3, 1), x) > 6 * 4 * map_bytes
    assert _saved_bytes(_bottleneck(3, 4), x) < 3 * map_bytes


def test_all_weights_of_a_fresh_block_learn_from_the_first_step() -> None:
    block = InvertedBottleneck(4, 2, 3)
    torch.autograd.backward(block(torch.randn(1, 4, 3, 3, 3)).square().sum())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())
