"""AdamW over trainable parameters, its learning rate over the progress of a run, and the average of the weights."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from segkit.errors import RequestError
from segkit.training.config import OptimiserConfig
from segkit.training.sharding import take_parts

_SHARE = "share"
"""Key of a parameter group: its learning rate as a share of the optimiser's."""
_HALVINGS = 5
"""Equal parts of a run; the schedule "halving" halves the rate between them."""
_VALIDATION_SHARE = 0.1
"""Part of a budget that validations may take."""
_LARGEST_RESERVE = 0.3
"""Largest part of a budget reserved for what follows the last step."""
_FINISHING_S, _FINISHING_SHARE = 5.0, 0.01
"""Time, and part of a budget, reserved for the last checkpoint, the figures and the choice of post-processing."""
_ALMOST_DONE = 0.999


def build_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW over trainable parameters, without weight decay for biases and norms (tensors of one axis).

    On a GPU one kernel updates many tensors.

    If `encoder_lr` is not 1, the encoder has its own groups, with this share of the learning rate (see `set_lr`).

    Raises:
        RequestError: `encoder_lr` is not 1 and the model does not name its encoder.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    encoder = set() if config.encoder_lr == 1 else {id(parameter) for parameter in encoder_of(model).parameters()}
    groups = _by_decay([p for p in trained if id(p) not in encoder], config, share=1.0)
    if of_encoder := [p for p in trained if id(p) in encoder]:
        groups += _by_decay(of_encoder, config, share=config.encoder_lr)
    is_on_gpu = bool(trained) and all(parameter.is_cuda for parameter in trained)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True if is_on_gpu else None)


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


def get_lr(progress: float, config: OptimiserConfig) -> float:
    """Learning rate at a progress of 0 (start) to 1 (end): linear warm-up, then the decay of the schedule."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < config.warmup:
        return config.lr * max(progress / config.warmup, 0.01)
    rest = (progress - config.warmup) / (1 - config.warmup)
    if config.schedule == "poly":
        return config.lr * math.pow(1 - rest, 0.9)
    if config.schedule == "halving":
        return config.lr * 0.5 ** min(int(_HALVINGS * rest), _HALVINGS - 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * rest))


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
        found = f"the optimiser of the run has other groups of weights ({error})"
        raise RequestError(found, remedy="Resume with the optimiser.encoder_lr that the run began with") from error
    for group, share in zip(optimiser.param_groups, shares, strict=True):
        group[_SHARE] = share


@dataclass
class Clock:
    """Progress of a run, 0 to 1: by steps, or by time where there is a deadline (`time.monotonic` seconds).

    `final_s` is the forecast of the scoring after the last step, in seconds; None: as long as a validation.
    """

    steps: int
    deadline_s: float | None = None
    started_s: float = field(default_factory=lambda: time.monotonic())
    validation_s: float = 0.0
    """How long the last validation took."""
    final_s: float | None = None
    validated_s: float = field(default_factory=lambda: time.monotonic())
    """When the last validation ended."""

    def progress(self, step: int) -> float:
        """Completed part of the training; time reserved for the last validations does not count as training.

        If the budget is spent before the first step, one step is still taken, so that there is a model.
        """
        if self.deadline_s is None:
            return step / self.steps
        span = self.deadline_s - self.started_s
        final_s = self.validation_s if self.final_s is None else self.final_s
        kept = min(1.5 * self.validation_s + final_s, _LARGEST_RESERVE * span)
        kept += _FINISHING_S + _FINISHING_SHARE * span
        end = max(self.deadline_s - kept, self.started_s + 1e-6)
        spent = (time.monotonic() - self.started_s) / (end - self.started_s)
        return min(spent, _ALMOST_DONE) if step == 0 else spent

    def may_validate(self) -> bool:
        """Whether there is time for another validation in the part of the budget for validations."""
        pause = time.monotonic() - self.validated_s
        return self.deadline_s is None or pause >= self.validation_s / _VALIDATION_SHARE

    def note_validation(self, began_s: float, final_s: float | None) -> None:
        """Store the duration of a validation that began at `began_s`, and what it forecasts for the end."""
        self.validated_s = time.monotonic()
        self.validation_s, self.final_s = self.validated_s - began_s, final_s


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
        for name in state.keys() - set(floating):
            self.average[name].copy_(state[name])

    def state_dict(self) -> dict[str, object]:
        """The number of updates and the averages."""
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, with whole tensors.

        Raises:
            RuntimeError: names or shapes of tensors differ.
        """
        self.updates = int(state["updates"])
        take_parts(self.average, state["average"])
