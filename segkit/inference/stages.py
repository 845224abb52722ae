"""What jobs on cases have in common, whatever the task: the clock of their stages, and what they hold meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from math import prod

from segkit.data.case import Case
from segkit.data.files import read_grid
from segkit.data.volume import Grid
from segkit.errors import DataError
from segkit.inference.manifest import STAGES


class StageClock:
    """The seconds of a case by stage, of `STAGES`."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def timed(self, stage: str) -> AbstractContextManager[None]:
        """Add what is done meanwhile to a stage, also where it fails."""
        return self._counted(stage, 1)

    def paused(self, stage: str) -> AbstractContextManager[None]:
        """Take what is done meanwhile off a stage that is being timed."""
        return self._counted(stage, -1)

    def rounded(self) -> dict[str, float]:
        """The seconds as a manifest tells them."""
        return {stage: round(value, 4) for stage, value in self.seconds.items()}

    @contextmanager
    def _counted(self, stage: str, sign: int) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += sign * (time.perf_counter() - start)


def image_bytes(case: Case, channels: int, shape_of: Callable[[Grid], tuple[int, ...]]) -> int:
    """What an image of float32 takes, as the header of the case's first file tells; 0 where that cannot be read.

    `shape_of` tells how many voxels each axis of it has, of the grid of the file.
    """
    try:
        grid = read_grid(next(iter(case.images.values())).path)
    except DataError:
        return 0
    return 4 * channels * prod(shape_of(grid))
