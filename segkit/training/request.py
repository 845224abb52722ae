"""What a user asks of a training, whatever is learnt."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch

from segkit.training.config import RunConfig, TrainConfig

DataT = TypeVar("DataT", Path, tuple[Path, ...])
ConfigT = TypeVar("ConfigT", bound=RunConfig)


@dataclass(frozen=True)
class TrainingRequest(Generic[DataT, ConfigT]):
    """What a user asks for: one data folder or several, run folder, settings, and the machine to do it on."""

    data: DataT
    run: Path
    config: ConfigT
    device: torch.device
    memory_gb: float | None = None
    started_s: float = field(default_factory=time.monotonic)
    is_resumed: bool = False
    may_overwrite: bool = False
    may_change: bool = False
    """Whether a resumed run may have other settings than before."""
    tell: Callable[[float, str], None] | None = None
    """Shows the progress of the training, 0 to 1; None writes log lines."""

    @property
    def deadline_s(self) -> float | None:
        """When the time asked for is over, as `time.monotonic` has it; None without a budget."""
        budget = self.config.training.budget_minutes
        return None if budget is None else self.started_s + 60 * budget


RunRequest = TrainingRequest[Path, TrainConfig]
"""What is learnt from label maps, from one folder."""

UnlabelledRequest = TrainingRequest[tuple[Path, ...], ConfigT]
"""What is learnt without label maps, from one folder or several."""
