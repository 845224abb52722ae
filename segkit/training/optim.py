"""AdamW over trainable parameters, and the moving average of the weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from segkit.errors import RequestError
from segkit.training.config import OptimiserConfig
from segkit.training.sharding import take_parts

_SHARE = "share"
"""Key of a parameter group: its learning rate as a share of the optimiser's."""


def build_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW over trainable parameters, without weight decay for biases and norms (tensors of one axis).

    If `encoder_lr` is not 1, the encoder has its own groups, with this share of the learning rate (see `set_lr`).

    Raises:
        RequestError: `encoder_lr` is not 1 and the model does not name its encoder.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.encoder_lr == 1:
        return torch.optim.AdamW(_by_decay(trained, config, share=1.0), lr=config.lr)
    encoder = {id(parameter) for parameter in encoder_of(model).parameters()}
    groups = _by_decay([p for p in trained if id(p) not in encoder], config, share=1.0)
    if of_encoder := [p for p in trained if id(p) in encoder]:
        groups += _by_decay(of_encoder, config, share=config.encoder_lr)
    return torch.optim.AdamW(groups, lr=config.lr)


def encoder_of(model: nn.Module) -> nn.Module:
    """The submodule that `encoder_prefix` of a network names.

    Raises:
        RequestError: the network has no `encoder_prefix`.
    """
    prefix: str = getattr(model, "encoder_prefix", "")
    if not prefix:
        found = f"{type(model).__name__} does not say which part is its encoder"
        raise RequestError(found, remedy="Leave optimiser.encoder_lr at 1")
    return model.get_submodule(prefix.removesuffix("."))


def _by_decay(parameters: Sequence[nn.Parameter], config: OptimiserConfig, *, share: float) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay, _SHARE: share},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0, _SHARE: share},
    ]


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group: its share of `lr`."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group.get(_SHARE, 1.0)


def restore_optimiser(optimiser: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load the state of an earlier session; shares of the learning rate stay those of the present settings.

    Raises:
        RequestError: it has other groups of weights: the encoder was frozen in one of the sessions only.
    """
    shares = [group.get(_SHARE, 1.0) for group in optimiser.param_groups]
    try:
        optimiser.load_state_dict(dict(state))
    except ValueError as error:
        raise RequestError(
            f"the optimiser of the run has other groups of weights ({error})",
            remedy="Resume with the optimiser.encoder_lr that the run began with",
        ) from error
    for group, share in zip(optimiser.param_groups, shares, strict=True):
        group[_SHARE] = share


class MovingAverage:
    """Exponential moving average of a model's floating-point state; other tensors are copied.

    After n updates the decay is at most (1 + n) / (10 + n), so that the first weights do not dominate short runs.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Include the present weights of the model."""
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
        """The number of updates and the averages."""
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, with whole tensors.

        Raises:
            TypeError: the types differ.
            RuntimeError: names or shapes of tensors differ.
        """
        updates, average = state["updates"], state["average"]
        if not isinstance(updates, int) or not isinstance(average, dict):
            raise TypeError("the state of the moving average holds `updates` and `average`")
        self.updates = updates
        take_parts(self.average, average)
