"""Endless batches of a dataset whose items are decided by their index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from segkit.runtime import available_cores
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
        generator=torch.Generator(),  # its own: a loader would draw its seed from the stream that dropout uses
    )
    yield from loader


def _worker_count(requested: int | None) -> int:
    """On one or two cores preparing patches in between steps is faster than competing with them."""
    if requested is not None:
        return requested
    cores = available_cores()
    return 0 if cores <= 2 else min(cores - 1, 8)
