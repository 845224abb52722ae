"""Endless batches of a dataset whose items are decided by their index."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from segkit.errors import TrainingError
from segkit.runtime import available_cores
from segkit.training.interruption import ignore_signals
from segkit.training.task import Batch

ENDLESS = 2**40
"""Length of a training dataset: items are drawn as long as the run lasts."""


def endless_batches(
    dataset: Dataset[dict[str, Tensor]], batch_size: int, start: int, workers: int | None
) -> Iterator[Batch]:
    """Batches from the `start`-th on, the n-th always of the same items; `workers` None suits them to the cores."""
    count = _worker_count(workers)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=range(start * batch_size, ENDLESS),
        num_workers=count,
        persistent_workers=count > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # its own: a loader would draw its seed from the stream that dropout uses
    )
    yield from loader


def _worker_count(requested: int | None) -> int:
    """On one or two cores preparing patches in between steps is faster than competing with them."""
    if requested is not None:
        return requested
    cores = available_cores()
    return 0 if cores <= 2 else min(cores - 1, 8)


@contextmanager
def lost_workers_named() -> Iterator[None]:
    """Say what happened where a process that prepared batches is gone: torch tells it wherever the training just is.

    Raises:
        TrainingError: such a process died, mostly because the system ran out of memory.
    """
    try:
        yield
    except Exception as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            f"a process that prepared batches was killed ({error}), probably because memory ran out",
            remedy="What was trained up to the last checkpoint is kept: go on with --resume, and with fewer"
            " training.workers if it happens again",
        ) from error
