"""The reversible engine against plain autograd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from segkit.models.reversible import ReversibleBlock, ReversibleSequence


def _sequence(blocks: int = 3, channels: int = 4, dropout: float = 0.0, mode: str = "plain") -> ReversibleSequence:
    def half() -> nn.Module:
        return nn.Sequential(nn.Conv3d(channels // 2, channels // 2, 3, padding=1), nn.Tanh(), nn.Dropout(dropout))

    return ReversibleSequence([ReversibleBlock(half(), half()) for _ in range(blocks)], mode)  # type: ignore[arg-type]


def _copy_in_mode(sequence: ReversibleSequence, mode: str) -> ReversibleSequence:
    copy = _sequence(len(sequence.blocks), mode=mode).to(next(sequence.parameters()).dtype)
    copy.load_state_dict(sequence.state_dict())
    return copy


def _gradients(sequence: ReversibleSequence, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    sequence(x).square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in sequence.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_gradients_are_those_of_plain_mode(mode: str, dtype: torch.dtype, tolerance: float) -> None:
    plain = _sequence(blocks=8).to(dtype)
    x = torch.randn(2, 4, 3, 4, 5, dtype=dtype)
    other = _copy_in_mode(plain, mode)
    torch.testing.assert_close(other(x), plain(x))
    for ours, expected in zip(_gradients(other, x), _gradients(plain, x), strict=True):
        assert (ours - expected).norm() <= tolerance * expected.norm()


def test_saved_bytes_do_not_grow_with_depth() -> None:
    def saved(blocks: int, mode: str) -> int:
        sizes: dict[int, int] = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()), t)[1],
            lambda t: t,
        )
        sequence = _sequence(blocks, mode=mode)
        for parameter in sequence.parameters():
            sizes[parameter.untyped_storage().data_ptr()] = 0
        known = set(sizes)
        with hooks:
            sequence(torch.randn(1, 4, 8, 8, 8, requires_grad=True))
        return sum(size for pointer, size in sizes.items() if pointer not in known)

    assert saved(2, "reversible") == saved(16, "reversible") == 4 * 8**3 * 4  # the output, float32
    assert saved(16, "plain") > 7 * saved(2, "plain")


@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
def test_dropout_draws_the_same_numbers_again(mode: str) -> None:
    reversible = _sequence(dropout=0.5, mode=mode).double()
    x = torch.randn(1, 4, 4, 4, 4, dtype=torch.float64)
    plain = _sequence(dropout=0.5).double()
    plain.load_state_dict(reversible.state_dict())
    found = []
    for sequence in (plain, reversible):
        torch.manual_seed(3)
        found.append(_gradients(sequence, x))
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_frozen_parts_and_inputs_without_gradient() -> None:
    sequence = _sequence(mode="reversible")
    for parameter in sequence.blocks[0].f.parameters():
        parameter.requires_grad_(False)
    sequence(torch.randn(1, 4, 3, 3, 3)).sum().backward()
    assert all(parameter.grad is None for parameter in sequence.blocks[0].f.parameters())
    assert all(parameter.grad is not None for parameter in sequence.blocks[0].g.parameters())


def test_autograd_grad_and_retained_graph() -> None:
    sequence = _sequence(mode="reversible").double()
    x = torch.randn(1, 4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    y = sequence(x).square().sum()
    first = torch.autograd.grad(y, [x, *sequence.parameters()], retain_graph=True)
    second = torch.autograd.grad(y, [x, *sequence.parameters()])
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one, two)


def test_two_live_graphs_accumulate() -> None:
    reversible, x1, x2 = _sequence(mode="reversible").double(), torch.randn(1, 4, 3, 3, 3), torch.randn(1, 4, 3, 3, 3)
    plain = _copy_in_mode(reversible, "plain")
    for sequence in (reversible, plain):
        losses = [sequence(x.double()).square().sum() for x in (x1, x2)]
        for loss in losses:
            loss.backward()
    for ours, expected in zip(reversible.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


def test_editing_the_output_in_place_is_noticed() -> None:
    y = _sequence(mode="reversible")(torch.randn(1, 4, 3, 3, 3, requires_grad=True))
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_batch_statistics_are_counted_once() -> None:
    norms = [nn.BatchNorm3d(2), nn.BatchNorm3d(2)]
    sequence = ReversibleSequence([ReversibleBlock(*norms)], "reversible")
    sequence(torch.randn(2, 4, 3, 3, 3, requires_grad=True)).sum().backward()
    assert [int(norm.num_batches_tracked) for norm in norms] == [1, 1]  # type: ignore[arg-type]


def test_residual_stream_is_float32_under_autocast() -> None:
    reversible = _sequence(blocks=4, mode="reversible")
    plain = _copy_in_mode(reversible, "plain")
    x = torch.randn(1, 4, 6, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = reversible(x.bfloat16())
        assert y.dtype == torch.float32
        ours, expected = _gradients(reversible, x), _gradients(plain, x)
    for one, two in zip(ours, expected, strict=True):
        assert (one - two).norm() <= 1e-2 * two.norm()  # bfloat16 keeps 8 bits: its own noise is larger


def test_float32_gradients_hold_through_32_blocks() -> None:
    plain = _sequence(blocks=32)
    x = torch.randn(1, 4, 4, 4, 4)
    ours, expected = _gradients(_copy_in_mode(plain, "reversible"), x), _gradients(plain, x)
    for one, two in zip(ours, expected, strict=True):
        assert (one - two).norm() <= 1e-3 * two.norm()


def test_error_under_autocast_is_below_the_noise_of_bfloat16_itself() -> None:
    plain = _sequence(blocks=16)
    reversible = _copy_in_mode(plain, "reversible")
    x = torch.randn(1, 4, 6, 6, 6)
    exact = _gradients(plain, x)
    plain.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rounded, ours = _gradients(plain, x), _gradients(reversible, x)

    def error(found: list[Tensor], expected: list[Tensor]) -> float:
        return float(torch.stack([(a - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]).median())

    assert error(ours, rounded) < error(rounded, exact)


def test_checkpoint_mode_counts_batch_statistics_once() -> None:
    norms = [nn.BatchNorm3d(2), nn.BatchNorm3d(2)]
    sequence = ReversibleSequence([ReversibleBlock(*norms)], "checkpoint")
    sequence(torch.randn(2, 4, 3, 3, 3, requires_grad=True)).sum().backward()
    assert [int(norm.num_batches_tracked) for norm in norms] == [1, 1]  # type: ignore[arg-type]


# The compiler looks at .grad, and that of torch 2.11 at what makes an autograd function.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
def test_compiled_network_has_the_same_gradients_and_stays_reversible() -> None:
    sequence, x = _sequence(blocks=8, mode="reversible"), torch.randn(1, 4, 4, 4, 4)
    expected = _gradients(sequence, x)
    sequence.zero_grad()
    compiled = torch.compile(sequence, backend="aot_eager")
    calls = []
    sequence.blocks[0].f.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for ours, one in zip(_gradients(compiled, x), expected, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(ours, one)
    assert calls == [False, True]  # once without a graph, once to undo it


def test_distributed_training_finds_every_gradient(tmp_path: Path) -> None:
    sequence = _sequence(mode="reversible")
    x = torch.randn(1, 4, 3, 3, 3)
    expected = _gradients(sequence, x)[1:]
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for options in ({}, {"static_graph": True}, {"find_unused_parameters": True}):
            copy = _copy_in_mode(sequence, "reversible")
            parallel = nn.parallel.DistributedDataParallel(copy, **options)  # type: ignore[arg-type]
            parallel(x).square().sum().backward()
            for parameter, one in zip(copy.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, one)
    finally:
        torch.distributed.destroy_process_group()


def test_odd_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="5 channels"):
        _sequence(mode="reversible")(torch.randn(1, 5, 3, 3, 3))


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'clever' is not one of plain, checkpoint, reversible"):
        ReversibleSequence([], "clever")  # type: ignore[arg-type]
