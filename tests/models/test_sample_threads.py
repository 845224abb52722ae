"""Threads that compute samples of a batch, against the whole batch at once."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

from segkit.models.region_layers import RegionNormLearnable
from segkit.models.sample_threads import SampleThreads
from segkit.models.table import build_model


class Noting(nn.Module):
    """Doubles its input with a weight, and notes the sizes, threads and precision of its calls."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.unused = nn.Parameter(torch.tensor(1.0))
        self.layers = nn.Sequential(*layers)
        self.calls: list[tuple[int, int, bool, bool]] = []

    def __deepcopy__(self, memo: dict[int, object]) -> Noting:
        same = Noting(*copy.deepcopy(list(self.layers), memo))
        same.calls = self.calls
        return same

    def forward(self, x: Tensor) -> Tensor:
        is_cast = torch.is_autocast_enabled("cpu")
        self.calls.append((len(x), torch.get_num_threads(), is_cast, torch.is_grad_enabled()))
        return self.weight * x

    def encode(self, x: Tensor) -> list[Tensor]:
        return [self(x), 3 * self.weight * x]


def test_samples_are_shared_by_two_threads(two_threads: None) -> None:
    network, x = Noting(), torch.arange(5.0)
    found = SampleThreads()(network, x)
    (3 * found).sum().backward()
    assert found.tolist() == [0, 2, 4, 6, 8]
    assert network.weight.grad == 30  # 3 x (0 + 1 + 2 + 3 + 4)
    assert network.unused.grad is None
    assert sorted(call[:2] for call in network.calls) == [(2, 1), (3, 1)]
    assert torch.get_num_threads() == 2


def test_a_level_without_a_gradient_takes_no_part(two_threads: None) -> None:
    network = Noting()
    first, second = SampleThreads()(network, torch.ones(2), "encode")
    second.sum().backward()
    assert (first.tolist(), second.tolist(), network.weight.grad) == ([2, 2], [6, 6], 6)


def test_present_weights_modes_and_frozen_parts_are_used(two_threads: None) -> None:
    network, threads = Noting(nn.Identity()), SampleThreads()
    threads(network, torch.ones(2))
    with torch.no_grad():
        network.weight.copy_(5)
    network.eval()
    network.unused.requires_grad_(False)
    assert threads(network, torch.ones(2)).tolist() == [5, 5]
    network.weight.requires_grad_(False)
    assert not threads(network, torch.ones(2)).requires_grad
    other = Noting()
    assert threads(other, torch.ones(2)).tolist() == [2, 2]


def test_present_running_statistics_are_used(two_threads: None) -> None:
    network, threads, x = nn.BatchNorm1d(1).eval(), SampleThreads(), torch.ones(2, 1)
    with torch.inference_mode():
        assert torch.equal(threads(network, x), network(x))
    network.train()(torch.tensor([[4.0], [8.0]]))
    with torch.inference_mode():
        assert torch.equal(threads(network.eval(), x), network(x))


def test_precision_and_wanted_gradients_reach_the_threads(two_threads: None) -> None:
    network = Noting()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        SampleThreads()(network, torch.ones(2))
    assert [call[2:] for call in network.calls] == [(True, False)] * 2
    SampleThreads()(network, torch.ones(2))
    assert [call[2:] for call in network.calls[2:]] == [(False, True)] * 2


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm3d(2), nn.Dropout(0.1), RegionNormLearnable(3)], ids=lambda layer: type(layer).__name__
)
def test_networks_whose_samples_depend_on_each_other_get_the_whole_batch(layer: nn.Module, two_threads: None) -> None:
    network = Noting(layer)
    SampleThreads()(network, torch.ones(4))
    assert [call[:2] for call in network.calls] == [(4, 2)]


def test_compiled_networks_get_the_whole_batch(two_threads: None) -> None:
    network = Noting()
    network.compile(backend="eager")
    SampleThreads()(network, torch.ones(4))
    assert [call[0] for call in network.calls] == [4]


def test_one_sample_and_inputs_with_gradients_are_not_shared(two_threads: None) -> None:
    network = Noting()
    x = torch.ones(3, requires_grad=True)
    SampleThreads()(network, x).sum().backward()
    SampleThreads()(network, torch.ones(1))
    assert [call[0] for call in network.calls] == [3, 1]
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]


def test_an_error_in_a_thread_is_raised(two_threads: None) -> None:
    with pytest.raises(RuntimeError, match="expected input"):
        SampleThreads()(nn.Conv3d(2, 2, 3), torch.ones(2, 3, 4, 4, 4))


def test_a_network_is_validated_and_trained_in_turn(two_threads: None) -> None:
    torch.manual_seed(0)
    network = build_model("revmbunet", in_channels=2, out_channels=2, size="tiny", widths=(8, 12, 16))
    x, threads = torch.randn(2, 2, 16, 16, 16), SampleThreads()
    for _ in range(2):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            found, expected = threads(network.eval(), x), network(x)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
        assert found.is_inference()
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(level.float().square().mean() for level in threads(network.train(), x))
        loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("mode", ["plain", "checkpoint", "reversible"])
def test_two_runs_are_equal_to_the_last_bit(mode: str, two_threads: None) -> None:
    torch.manual_seed(0)
    network = build_model("revmbunet", in_channels=2, out_channels=2, size="tiny", widths=(8, 12, 16), mode=mode)
    x, threads = torch.randn(2, 2, 16, 16, 16), SampleThreads()
    found = []
    for _ in range(2):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(level.float().square().mean() for level in threads(network.train(), x))
        loss.backward()
        found.append([parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert threading.active_count() < 10
