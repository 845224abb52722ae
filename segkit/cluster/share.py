"""What a worker takes of its node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_MB = 1024**2


@dataclass(frozen=True)
class Share:
    """What each worker takes of its node: CPU cores, GPUs, and MB of memory where that is limited."""

    threads: int
    gpus: int = 0
    memory_mb: float | None = None

    def room(self, resources: Mapping[str, float]) -> int:
        """How many workers fit on a node with these resources of Ray."""
        fits = [resources.get("CPU", 0) // self.threads]
        if self.gpus:
            fits.append(resources.get("GPU", 0) // self.gpus)
        if self.memory_mb is not None:
            fits.append(resources.get("memory", 0) // (self.memory_mb * _MB))
        return int(min(fits))

    def __str__(self) -> str:
        parts = [f"{self.threads} CPUs", f"{self.gpus} GPU" if self.gpus else ""]
        return " and ".join([*filter(None, parts), *([] if self.memory_mb is None else [f"{self.memory_mb:.0f} MB"])])
