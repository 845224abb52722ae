"""Endless batches of a dataset whose items depend only on their index.

With w ranks and batches of b items, each rank loads its part of the batch of w b items that a single process would
load, so the ranks get the same items in the same order, and none twice.
"""

import multiprocessing
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from segkit.errors import TrainingError
from segkit.runtime import available_cores, process_place
from segkit.training.distributed import Ranks
from segkit.training.interruption import ignore_signals
from segkit.training.task import Batch

ENDLESS = 2**40
"""Length of a training dataset."""


def endless_batches(
    dataset: Dataset[dict[str, Tensor]],
    batch_size: int,
    start: int,
    workers: int | None,
    ranks: Ranks,
    device: torch.device | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Iterator[Any]:
    """Batches from the `start`-th on, the n-th always of the same items; `workers` None chooses by the cores.

    `batch_size` is that of this process, `device` that of the network: a GPU copies from pinned memory, and needs more
    patches prepared ahead. `collate` makes a batch of a list of items; None stacks their tensors.

    Raises:
        TrainingError: a worker was killed.
    """
    is_gpu = device is not None and device.type == "cuda"
    if workers is None:
        workers = _workers(available_cores() // process_place().local_size, is_gpu=is_gpu)
    stride = ranks.size * batch_size
    firsts = range(start * stride + ranks.rank * batch_size, ENDLESS - batch_size + 1, stride)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=(list(range(first, first + batch_size)) for first in firsts),
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=(4 if is_gpu else 2) if workers else None,
        collate_fn=collate,
        pin_memory=is_gpu,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # else the seed of the loader is drawn from the generator of dropout
    )
    before = set(multiprocessing.active_children())
    iterator = iter(loader)
    started = [process for process in multiprocessing.active_children() if process not in before]
    try:
        yield from iterator
    except (RuntimeError, OSError, EOFError) as error:  # reading from a process that has ended fails in many ways
        if started and wait([process.sentinel for process in started], timeout=1):
            raise _lost_worker(error) from error
        raise
    finally:
        if started:  # they ignore signals, so nothing else would end them
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _workers(cores: int, *, is_gpu: bool) -> int:
    """Processes that prepare patches: they compete with a training on two cores, but not with one on a GPU."""
    if is_gpu:
        return max(2, min(cores - 1, 16))
    return 0 if cores <= 2 else min(cores - 1, 8)


def to_device(batch: Batch, device: torch.device) -> Mapping[str, Tensor]:
    """The batch on that device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


@contextmanager
def drawn_from(batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """Batches whose worker processes end with the block.

    Raises:
        TrainingError: a worker was killed; torch raises its error anywhere in the block.
    """
    try:
        yield batches
    except Exception as error:
        if isinstance(error, TrainingError) or not is_lost_worker(error):
            raise
        raise _lost_worker(error) from error
    finally:
        if isinstance(batches, Generator):
            batches.close()


def is_lost_worker(error: Exception) -> bool:
    """Whether torch raised this because a worker was killed."""
    return "DataLoader worker" in str(error)


def _lost_worker(error: Exception) -> TrainingError:
    cause = error.__cause__ or error
    return TrainingError(
        "a process that prepared batches was killed, probably because memory ran out "
        f"({type(cause).__name__}: {str(cause).strip()})",
        remedy="Continue from the last checkpoint with --resume; with fewer training.workers if it happens again",
    )
