"""Learning rate, and the progress of a run that it follows."""

import math
import time
from dataclasses import dataclass, field

from segkit.training.config import OptimiserConfig

_HALVINGS = 5
"""Equal parts of a run; the schedule "halving" halves the rate between them."""
_VALIDATION_SHARE = 0.1
"""Part of a budget that validations may take."""
_LARGEST_RESERVE = 0.3
"""Largest part of a budget reserved for what follows the last step."""
_FINISHING_S = 5.0
"""Time reserved for the last checkpoint and the figures."""
_ALMOST_DONE = 0.999


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


@dataclass
class Clock:
    """Progress of a run, 0 to 1: by steps, or by time where there is a deadline (`time.monotonic` seconds).

    `final_validations` is how long the scoring after the last step takes, in validations of the loop.
    """

    steps: int
    deadline_s: float | None = None
    started_s: float = field(default_factory=lambda: time.monotonic())
    final_validations: float = 1.0
    validation_s: float = 0.0
    """How long the last validation took."""
    validated_s: float = field(default_factory=lambda: time.monotonic())
    """When the last validation ended."""

    def progress(self, step: int) -> float:
        """Completed part of the training; time reserved for the last validations does not count as training.

        If the budget is spent before the first step, one step is still taken, so that there is a model.
        """
        if self.deadline_s is None:
            return step / self.steps
        span = self.deadline_s - self.started_s
        kept = min((1.5 + self.final_validations) * self.validation_s, _LARGEST_RESERVE * span) + _FINISHING_S
        end = max(self.deadline_s - kept, self.started_s + 1e-6)
        spent = (time.monotonic() - self.started_s) / (end - self.started_s)
        return min(spent, _ALMOST_DONE) if step == 0 else spent

    def may_validate(self) -> bool:
        """Whether there is time for another validation in the part of the budget for validations."""
        pause = time.monotonic() - self.validated_s
        return self.deadline_s is None or pause >= self.validation_s / _VALIDATION_SHARE

    def note_validation(self, began_s: float) -> None:
        """Store the duration of a validation that began at `began_s`."""
        self.validated_s = time.monotonic()
        self.validation_s = self.validated_s - began_s
