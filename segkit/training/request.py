"""What a user asks of a training, whatever is learnt."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch

from segkit.training.config import RunConfig, TrainConfig
from segkit.training.distributed import Ranks

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
    resume: bool = False
    overwrite: bool = False
    allow_changes: bool = False
    """Whether a resumed run may have other settings than before."""
    on_progress: Callable[[float, str], None] | None = None
    """Called after each step with the progress, 0 to 1, and a message; None writes log lines."""
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that train together."""

    @property
    def deadline_s(self) -> float | None:
        """When the time asked for is over, as `time.monotonic` has it; None without a budget."""
        budget = self.config.training.budget_minutes
        return None if budget is None else self.started_s + 60 * budget


RunRequest = TrainingRequest[Path, TrainConfig]
"""What is learnt from label maps, from one folder."""

UnlabelledRequest = TrainingRequest[tuple[Path, ...], ConfigT]
"""What is learnt without label maps, from one folder or several."""
