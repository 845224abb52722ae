"""Processes that compute samples of a batch, against the whole batch at once."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from segkit.models import sample_processes
from segkit.models.region_layers import RegionNormLearnable
from segkit.models.sample_processes import LostProcessError, SampleProcesses
from segkit.models.table import build_model

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="processes are forked on Linux only")


class Doubling(nn.Module):
    """Doubles its input with a weight."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.unused = nn.Parameter(torch.tensor(1.0))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x

    def encode(self, x: Tensor) -> list[Tensor]:
        return [self(x), 3 * self.weight * x]


class Telling(Doubling):
    """Returns for each sample: its process, the size of its part, threads, and whether there are autocast and graph."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        facts = (os.getpid(), len(x), torch.get_num_threads(), torch.is_autocast_enabled("cpu"))
        told = torch.tensor([[*facts, torch.is_grad_enabled() and not torch.is_inference_mode_enabled()]])
        return told.double().repeat(len(x), 1) + 0 * self.weight


def told(network: nn.Module, samples: int = 2, processes: SampleProcesses | None = None) -> list[list[int]]:
    """What `Telling` says of each sample, the process as whether it is this one."""
    rows = (processes or SampleProcesses())(network, torch.ones(samples)).long().tolist()
    return [[int(row[0] == os.getpid()), *row[1:]] for row in rows]


def test_samples_are_shared_by_two_processes(two_threads: None) -> None:
    network, x = Doubling(), torch.arange(5.0)
    found = SampleProcesses()(network, x)
    (3 * found).sum().backward()
    assert found.tolist() == [0, 2, 4, 6, 8]
    assert network.weight.grad == 30  # 3 x (0 + 1 + 2 + 3 + 4)
    assert network.unused.grad is None
    assert told(Telling(), 5) == [[1, 3, 1, 0, 1]] * 3 + [[0, 2, 1, 0, 1]] * 2
    assert torch.get_num_threads() == 2


def test_operations_of_a_process_may_have_threads() -> None:
    torch.set_num_threads(4)
    try:
        x = torch.randn(2, 4, 64, 64)
        network = nn.Conv2d(4, 4, 3)
        torch.testing.assert_close(SampleProcesses()(network, x), network(x))  # each has threads of its own after that
        assert [row[2] for row in told(Telling())] == [2, 2]
    finally:
        torch.set_num_threads(1)


def test_a_level_without_a_gradient_takes_no_part(two_threads: None) -> None:
    network = Doubling()
    first, second = SampleProcesses()(network, torch.ones(2), "encode")
    second.sum().backward()
    assert (first.tolist(), second.tolist(), network.weight.grad) == ([2, 2], [6, 6], 6)


def test_two_calls_wait_for_their_backward_pass(two_threads: None) -> None:
    network, processes = Doubling(), SampleProcesses()
    first, second = (processes(network, value * torch.ones(2)) for value in (1, 10))
    processes(network, torch.ones(2))  # its graph is dropped
    (first * second).sum().backward()
    assert network.weight.grad == 80  # d/dw of 2 x (w x 1) x (w x 10) at w = 2


def test_present_weights_modes_and_frozen_parts_are_used(two_threads: None) -> None:
    network, processes = Doubling(nn.Identity()), SampleProcesses()
    processes(network, torch.ones(2))
    with torch.no_grad():
        network.weight.copy_(5)
    network.eval()
    network.unused.requires_grad_(False)
    assert processes(network, torch.ones(2)).tolist() == [5, 5]
    network.weight.requires_grad_(False)
    assert not processes(network, torch.ones(2)).requires_grad
    other = Doubling()
    assert processes(other, torch.ones(2)).tolist() == [2, 2]
    other.weight.data = torch.tensor(7.0)
    assert processes(other, torch.ones(2)).tolist() == [7, 7]


def test_weights_that_change_in_place_need_no_new_process(two_threads: None) -> None:
    network, processes = Telling(), SampleProcesses()
    before = processes(network, torch.ones(2))
    with torch.no_grad():
        network.weight.copy_(5)
    assert torch.equal(processes(network, torch.ones(2)), before)  # the same processes
    assert copy.deepcopy(network).weight == 5


def test_present_running_statistics_are_used(two_threads: None) -> None:
    network, processes, x = nn.BatchNorm1d(1).eval(), SampleProcesses(), torch.ones(2, 1)
    with torch.inference_mode():
        assert torch.equal(processes(network, x), network(x))
    network.train()(torch.tensor([[4.0], [8.0]]))
    with torch.inference_mode():
        assert torch.equal(processes(network.eval(), x), network(x))


def test_precision_and_wanted_gradients_reach_the_processes(two_threads: None) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert told(Telling()) == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 0]]
    assert told(Telling()) == [[1, 1, 1, 0, 1], [0, 1, 1, 0, 1]]


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm3d(2), nn.Dropout(0.1), RegionNormLearnable(3)], ids=lambda layer: type(layer).__name__
)
def test_networks_whose_samples_depend_on_each_other_get_the_whole_batch(layer: nn.Module, two_threads: None) -> None:
    assert told(Telling(layer), 4) == [[1, 4, 2, 0, 1]] * 4


def test_compiled_networks_get_the_whole_batch(two_threads: None) -> None:
    network = Telling()
    network.compile(backend="eager")
    assert told(network, 4) == [[1, 4, 2, 0, 1]] * 4


def test_one_sample_and_inputs_with_gradients_are_not_shared(two_threads: None) -> None:
    network, x = Doubling(), torch.ones(3, requires_grad=True)
    SampleProcesses()(network, x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]
    assert told(Telling(), 1) == [[1, 1, 2, 0, 1]]


def test_an_error_in_a_part_is_raised_and_the_next_call_works(two_threads: None) -> None:
    network, processes = Failing(), SampleProcesses()
    for bad in ([-1.0, 1.0], [1.0, -1.0]):
        with pytest.raises(RuntimeError, match="no root of -1"):
            processes(network, torch.tensor(bad))
        assert processes(network, torch.tensor([4.0, 9.0])).tolist() == [8, 18]


class Failing(Doubling):
    def forward(self, x: Tensor) -> Tensor:
        if (x < 0).any():
            raise ArithmeticError(f"no root of {x.min():.0f}") if x.min() < -1 else RuntimeError("no root of -1")
        return super().forward(x)


def test_a_killed_process_is_reported_and_replaced(two_threads: None) -> None:
    network, processes = Doubling(), SampleProcesses()
    before = set(multiprocessing.active_children())
    processes(network, torch.ones(2))
    (started,) = set(multiprocessing.active_children()) - before
    os.kill(started.pid or 0, signal.SIGKILL)
    with pytest.raises(LostProcessError, match=r"has ended \(exit code -9\).*--resume"):
        processes(network, torch.ones(2))
    assert processes(network, torch.ones(2)).tolist() == [2, 2]


def test_where_forked_processes_cannot_train_the_whole_batch_is_computed(
    two_threads: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sample_processes, "_found_unable", lambda: RuntimeError("Unable to handle autograd's threads"))
    network, processes, before = Telling(), SampleProcesses(), set(multiprocessing.active_children())
    for _ in range(2):
        assert told(network, 2, processes) == [[1, 2, 2, 0, 1]] * 2
    assert caplog.messages == ["all samples are computed in one process: Unable to handle autograd's threads"]
    assert not set(multiprocessing.active_children()) - before


def test_processes_train_after_planning() -> None:
    """torch forbids it where the first backward pass of the process was one of fake tensors."""
    script = """
import torch
from torch import nn
from segkit.models.sample_processes import SampleProcesses
from segkit.preparing.memory import step_bytes
torch.set_num_threads(2)
step_bytes(lambda: nn.Conv2d(1, 1, 1), (1, 1, 4, 4), lambda output, label: output.sum())
network = nn.Linear(1, 1, bias=False)
SampleProcesses()(network, torch.tensor([[1.0], [2.0]])).sum().backward()
print(network.weight.grad.item())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("3.0\n", "")


def test_processes_end_with_the_object_that_started_them(two_threads: None) -> None:
    before = set(multiprocessing.active_children())
    processes = SampleProcesses()
    found = processes(Doubling(), torch.ones(2))
    assert len(set(multiprocessing.active_children()) - before) == 1
    del found, processes
    gc.collect()
    assert not set(multiprocessing.active_children()) - before


def test_a_network_is_validated_and_trained_in_turn(two_threads: None) -> None:
    torch.manual_seed(0)
    network = build_model("revmbunet", in_channels=2, out_channels=2, size="tiny", widths=(8, 12, 16))
    x, processes = torch.randn(2, 2, 16, 16, 16), SampleProcesses()
    for _ in range(2):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            found, expected = processes(network.eval(), x), network(x)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
        assert found.is_inference()
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(level.float().square().mean() for level in processes(network.train(), x))
        loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("mode", ["plain", "checkpoint", "reversible"])
def test_gradients_are_those_of_the_whole_batch_and_the_same_in_two_runs(mode: str, two_threads: None) -> None:
    torch.manual_seed(0)
    network = build_model("revmbunet", in_channels=2, out_channels=2, size="tiny", widths=(8, 12, 16), mode=mode)
    x, processes = torch.randn(2, 2, 16, 16, 16), SampleProcesses()

    def gradients(levels: Sequence[Tensor]) -> list[Tensor]:
        network.zero_grad()
        torch.autograd.backward(sum(level.float().square().mean() for level in levels))
        return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]

    first, second, whole = (gradients(run(network.train(), x)) for run in (processes, processes, nn.Module.__call__))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    for found, expected in zip(first, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
