"""Parameter groups, their rates, and what a resumed run takes over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from segkit.errors import RequestError
from segkit.training.config import OptimiserConfig
from segkit.training.optim import MovingAverage, build_optimiser, encoder_of, restore_optimiser, set_lr


class TwoParts(nn.Module):
    """An encoder and a decoder, each with a weight of two axes and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Linear(2, 3)])
        self.up = nn.Linear(3, 1)
        self.encoder_prefix = "down."

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.up(self.down[0](x))
        return result


def rates(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Parameter name to learning rate and decay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimiser.param_groups
        for parameter in group["params"]
    }


def test_the_encoder_has_its_share_of_the_rate() -> None:
    model = TwoParts()
    optimiser = build_optimiser(model, OptimiserConfig(encoder_lr=0.25, weight_decay=0.5))
    set_lr(optimiser, 8.0)
    assert rates(model, optimiser) == {
        "down.0.weight": (2.0, 0.5),
        "down.0.bias": (2.0, 0.0),
        "up.weight": (8.0, 0.5),
        "up.bias": (8.0, 0.0),
    }


def test_without_a_share_there_are_two_groups_as_in_runs_of_before() -> None:
    model = TwoParts()
    optimiser = build_optimiser(model, OptimiserConfig())
    set_lr(optimiser, 8.0)
    assert [len(group["params"]) for group in optimiser.param_groups] == [2, 2]
    assert {rate for rate, _ in rates(model, optimiser).values()} == {8.0}
    for group in optimiser.param_groups:  # as such runs saved it
        del group["share"]
    resumed = build_optimiser(model, OptimiserConfig())
    restore_optimiser(resumed, optimiser.state_dict())
    set_lr(resumed, 4.0)
    assert {rate for rate, _ in rates(model, resumed).values()} == {4.0}


def test_a_step_moves_the_encoder_by_its_share() -> None:
    """The first step of Adam is as long as the rate, whatever the gradient."""
    model = TwoParts()
    optimiser = build_optimiser(model, OptimiserConfig(encoder_lr=0.1, weight_decay=0))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    set_lr(optimiser, 0.01)
    torch.autograd.backward(model(torch.tensor([[1.0, 2.0]])).sum())
    optimiser.step()
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - before[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.001 if name.startswith("down") else 0.01))


def test_a_frozen_encoder_is_not_in_the_optimiser() -> None:
    model = TwoParts()
    encoder_of(model).requires_grad_(False)
    optimiser = build_optimiser(model, OptimiserConfig(encoder_lr=0))
    assert set(rates(model, optimiser)) == {"up.weight", "up.bias"}
    average = MovingAverage(model, 0.9)
    with torch.no_grad():
        model.up.weight += 1
    average.update(model)
    assert torch.equal(average.average["down.0.weight"], model.down[0].weight), "not even rounding moves it"
    assert not torch.equal(average.average["up.weight"], model.up.weight)


def test_a_network_without_a_known_encoder_is_refused() -> None:
    with pytest.raises(RequestError, match=r"Linear does not say which part is its encoder.*encoder_lr at 1"):
        build_optimiser(nn.Linear(1, 1), OptimiserConfig(encoder_lr=0.5))


def test_a_resumed_run_allow_changes_the_share_but_not_thaw_the_encoder() -> None:
    model = TwoParts()
    state = build_optimiser(model, OptimiserConfig(encoder_lr=0.5)).state_dict()
    resumed = build_optimiser(model, OptimiserConfig(encoder_lr=0.25))
    restore_optimiser(resumed, state)
    set_lr(resumed, 4.0)
    assert rates(model, resumed)["down.0.weight"][0] == 1.0
    encoder_of(model).requires_grad_(False)
    frozen = build_optimiser(model, OptimiserConfig(encoder_lr=0))
    with pytest.raises(RequestError, match=r"has other groups of weights.*encoder_lr that the run began with"):
        restore_optimiser(frozen, state)
