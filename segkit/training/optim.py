"""The optimiser, its schedule, and the moving average of the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from segkit.training.config import OptimiserConfig


def build_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW; biases and norms (tensors of one axis) are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr)


def rate_at(progress: float, config: OptimiserConfig) -> float:
    """Learning rate at a progress of 0 (start) to 1 (end): linear warm-up, then decay to zero."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < config.warmup:
        return config.lr * max(progress / config.warmup, 0.01)
    rest = (progress - config.warmup) / (1 - config.warmup)
    if config.schedule == "poly":
        return config.lr * math.pow(1 - rest, 0.9)
    return config.lr * 0.5 * (1 + math.cos(math.pi * rest))


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimiser.param_groups:
        group["lr"] = rate


class MovingAverage:
    """Exponential moving average of a model's floating-point state; others are copied.

    Early on the decay is (1 + n) / (10 + n) after n updates, so that short runs are not held back by their start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards the model's present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        state = model.state_dict()
        floating = [name for name, value in state.items() if value.is_floating_point()]
        averages, values = [self.average[name] for name in floating], [state[name].detach() for name in floating]
        torch._foreach_lerp_(averages, values, 1 - decay)  # one call instead of hundreds of small ones
        for name, value in state.items():
            if not value.is_floating_point():
                self.average[name].copy_(value)

    def state_dict(self) -> dict[str, object]:
        """What `load_state_dict` takes."""
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take over what `state_dict` gave."""
        updates, average = state["updates"], state["average"]
        if not isinstance(updates, int) or not isinstance(average, dict):
            raise TypeError("the state of the moving average holds `updates` and `average`")
        self.updates = updates
        for name, value in average.items():
            tensor: Tensor = self.average[name]
            tensor.copy_(value)
