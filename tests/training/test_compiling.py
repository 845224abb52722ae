"""Networks are compiled for long runs on GPUs, and computed as they are where that fails; here with dynamo alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from segkit.training import compiling
from segkit.training.compiling import compile_network, is_compiled, or_uncompiled, uncompiled
from segkit.training.config import LoopConfig

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "device", "expected"),
    [
        ({"steps": 2000}, GPU, True),
        ({"steps": 1999}, GPU, False),
        ({"steps": 2000}, CPU, False),
        ({"steps": 10, "budget_minutes": 30}, GPU, True),
        ({"steps": 9999, "budget_minutes": 29}, GPU, False),
        ({"steps": 10, "compile": True}, CPU, True),
        ({"steps": 9999, "compile": False}, GPU, False),
    ],
)
def test_long_runs_on_gpus_are_compiled(settings: dict[str, Any], device: torch.device, expected: bool) -> None:
    network = nn.Linear(2, 2)
    compile_network(network, LoopConfig(**settings), device)
    assert is_compiled(network) == expected
    assert list(network.state_dict()) == ["weight", "bias"]


class Layer(nn.Linear):
    """Counts the calls in which Python runs this function itself, and not dynamo."""

    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.calls += 1
        return super().forward(input)


class Broken(Layer):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (1 if input.sum() > 0 else 2)


def compiled(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(compiling, "_BACKEND", "eager")
    compile_network(network, LoopConfig(compile=True), CPU)
    return network


def test_one_graph_is_compiled_except_in_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = compiled(Layer(2, 2), monkeypatch), torch.ones(1, 2)
    expected = or_uncompiled(network, lambda: network(x))
    assert network.calls == 0
    with uncompiled(network):
        torch.testing.assert_close(network(x), expected)
    assert network.calls == 1
    assert is_compiled(network)


def test_a_network_of_several_graphs_is_not_compiled(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    network, x = compiled(Broken(2, 2), monkeypatch), torch.ones(1, 2)
    torch.autograd.backward(or_uncompiled(network, lambda: network(x)).sum())
    assert network.calls == 1
    assert not is_compiled(network)
    assert "the network is not compiled: " in caplog.text
    or_uncompiled(network, lambda: network(x))
    assert network.calls == 2


def test_the_network_of_a_model_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Layer(2, 2)

    model = compiled(Model(), monkeypatch)
    assert is_compiled(model)
    or_uncompiled(model, lambda: model.network(torch.ones(1, 2)))
    assert model.network.calls == 0


def test_other_errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("a wrong batch")

    network = compiled(Layer(2, 2), monkeypatch)
    with pytest.raises(ValueError, match="a wrong batch"):
        or_uncompiled(network, fail)
    assert is_compiled(network)
