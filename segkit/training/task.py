"""What `fit()` asks of a task: batches, a loss, a validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Score:
    """A validation: `value` chooses the best checkpoint (higher is better), `details` go to the journal."""

    value: float
    details: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """Segmentation, pre-training and inpainting look like this to the training loop."""

    model: nn.Module

    def batches(self, start: int) -> Iterator[Batch]:
        """Endless batches from the `start`-th on; the n-th batch is the same in every run with the same settings."""

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch on the model's device, a scalar."""

    def validate(self, weights: Mapping[str, Tensor]) -> Score:
        """The score of these weights on the cases kept for checkpoint choice."""

    def save(self, run: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write model.safetensors and model.json atomically; `facts` are the loop's (step, score)."""


@contextmanager
def borrowed(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other weights for a while; it has its own again whenever a signal may cut that short."""
    present = model.state_dict()
    if all(present[name] is value or present[name].data_ptr() == value.data_ptr() for name, value in weights.items()):
        yield
        return
    own = {name: value.detach().clone() for name, value in present.items()}
    try:
        model.load_state_dict(weights)
        yield
    finally:
        try:
            model.load_state_dict(own)
        except KeyboardInterrupt:  # half of its own weights would be kept as the state of the training
            model.load_state_dict(own)
            raise
