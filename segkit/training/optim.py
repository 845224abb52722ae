"""The optimiser and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from segkit.errors import RequestError
from segkit.training.config import OptimiserConfig
from segkit.training.sharding import take_parts

_SHARE = "share"
"""Key of a parameter group: its learning rate as a share of the optimiser's."""


def build_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW over trainable parameters; biases and norms (tensors of one axis) are not decayed.

    Where `encoder_lr` is not 1, the encoder has groups of its own, which `set_lr` gives their share of the rate.

    Raises:
        RequestError: the encoder is to have a rate of its own, and the model does not say which part that is.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if config.encoder_lr == 1:
        groups = _by_decay(trained.values(), config, share=1.0)
    else:
        encoder = {id(parameter) for parameter in encoder_of(model).parameters()}
        of_encoder = [parameter for parameter in trained.values() if id(parameter) in encoder]
        others = [parameter for parameter in trained.values() if id(parameter) not in encoder]
        groups = [
            *_by_decay(others, config, share=1.0),
            *(_by_decay(of_encoder, config, share=config.encoder_lr) if of_encoder else ()),
        ]
    return torch.optim.AdamW(groups, lr=config.lr)


def encoder_of(model: nn.Module) -> nn.Module:
    """The part of a network that its `encoder_prefix` names.

    Raises:
        RequestError: it names none.
    """
    prefix: str = getattr(model, "encoder_prefix", "")
    if not prefix:
        raise RequestError(
            f"{type(model).__name__} does not say which part is its encoder",
            remedy="Leave optimiser.encoder_lr at 1",
        )
    return model.get_submodule(prefix.removesuffix("."))


def _by_decay(parameters: Iterable[nn.Parameter], config: OptimiserConfig, *, share: float) -> list[dict[str, Any]]:
    listed = list(parameters)
    return [
        {"params": [p for p in listed if p.dim() > 1], "weight_decay": config.weight_decay, _SHARE: share},
        {"params": [p for p in listed if p.dim() <= 1], "weight_decay": 0.0, _SHARE: share},
    ]


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group: its share of `lr`."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group.get(_SHARE, 1.0)


def restore_optimiser(optimiser: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take over the state of an earlier session; shares of the rate stay those of the settings at hand.

    Raises:
        RequestError: it moved other weights: the encoder was frozen then and is not now, or the other way round.
    """
    shares = [group.get(_SHARE, 1.0) for group in optimiser.param_groups]
    try:
        optimiser.load_state_dict(dict(state))
    except ValueError as error:
        raise RequestError(
            f"the optimiser of the run moved other groups of weights ({error})",
            remedy="Resume with the optimiser.encoder_lr that the run began with",
        ) from error
    for group, share in zip(optimiser.param_groups, shares, strict=True):
        group[_SHARE] = share


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

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, tensors whole.

        Raises:
            TypeError: it is something else.
            RuntimeError: its tensors have other names or shapes.
        """
        updates, average = state["updates"], state["average"]
        if not isinstance(updates, int) or not isinstance(average, dict):
            raise TypeError("the state of the moving average holds `updates` and `average`")
        self.updates = updates
        take_parts(self.average, average)
