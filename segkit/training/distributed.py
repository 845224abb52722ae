"""Training in several processes: who is who, what the first one decides for all, and one loss of a spread batch.

Processes are started by torchrun, or by `segkit train --gpus N`, which is torchrun on this machine. Each runs the whole
command. The first (rank 0) plans and writes; the others take over what it decided. Objects travel through the store by
which the processes found each other, where one may wait for another as long as that one lives; tensors travel through
the process group, gloo on CPUs and NCCL between GPUs. In a single process everything here is the identity.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice, zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from segkit.errors import SegkitError, TrainingError
from segkit.losses.global_batch import spread_batch
from segkit.runtime import process_place
from segkit.training.heartbeat import Store, Watch
from segkit.training.interruption import InterruptedTrainingError
from segkit.training.task import Batch, Task

_log = logging.getLogger(__name__)

T = TypeVar("T")
Item = TypeVar("Item")

_NOTHING: Any = object()

_GRACE_S = 60.0
"""By how much the process group's own timeout is longer than the watch, whose sentence says more."""
_TOGETHER_S = 2.0
"""Time within which an error of all processes is one of the first, too, which then tells it."""
_SIGNS_OF_THE_GROUP = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe", "store")


@dataclass
class _Group:
    """The processes that this one has joined."""

    rank: int
    size: int
    store: Store
    watch: Watch
    exchanges: int = 0
    is_to_end: Callable[[], bool] = lambda: False
    """Whether this process was asked to end, so that work in parts may be cut short."""


_joined: _Group | None = None


class OthersError(SegkitError):
    """What another process has said already; this one ends with the same exit code and without a word."""

    is_told = True

    def __init__(self, error: SegkitError) -> None:
        super().__init__(error.found, where=error.where, expected=error.expected, remedy=error.remedy)
        self.exit_code = error.exit_code


@contextmanager
def joined_processes(device: torch.device, timeout_s: float) -> Iterator[None]:
    """Join the processes that torchrun started beside this one, and leave them together.

    Raises:
        TrainingError: another process failed, is gone, or has held up the others for longer than `timeout_s`.
    """
    global _joined
    place = process_place()
    if place.size == 1 or _joined is not None:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout_s + _GRACE_S)
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=size, timeout=limit)
    watch = Watch(store.clone(), rank, size, timeout_s)
    _joined = _Group(rank, size, store, watch)
    watch.start()
    try:
        yield
        _leave(_joined)
    except InterruptedTrainingError as error:  # in all of them, after the same step
        _leave(_joined)
        if rank == 0:
            raise
        raise OthersError(error) from error
    except BaseException as error:
        _end_with(error, watch)
        raise
    finally:
        watch.stop()
        _joined = None
        dist.destroy_process_group()


def _leave(group: _Group) -> None:
    """End together; the first one, which holds the store, last."""
    exchanged(None)
    group.watch.stop()
    if group.rank:
        group.store.set(f"left/{group.rank}", "")
    else:
        _wait_for(group.store, [f"left/{other}" for other in range(1, group.size)])


def _wait_for(store: Store, keys: list[str]) -> None:
    pause_s = 0.001
    while not store.check(keys):
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.1)


def _end_with(error: BaseException, watch: Watch) -> None:
    """Tell the others of an error, or be told by them whose it really is."""
    if isinstance(error, OthersError):
        return
    is_of_group = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_THE_GROUP)
    fault = watch.fault_of_another(watch.silence_s + 2 * watch.interval_s) if is_of_group else None
    watch.fail(fault or str(error) or type(error).__name__)
    if isinstance(error, SegkitError) and watch.rank and watch.has_failed_alike(str(error), _TOGETHER_S):
        raise OthersError(error) from error
    if fault is not None:
        raise TrainingError(
            f"{fault} (told by rank {watch.rank})", remedy="Start all processes again with --resume"
        ) from error


def rank() -> int:
    """The number of this process, 0 where it is alone."""
    return 0 if _joined is None else _joined.rank


def size() -> int:
    """How many processes learn together."""
    return 1 if _joined is None else _joined.size


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def mark(stage: str, step: int | None = None) -> None:
    """Tell the others what this process does now: a stage of `segkit.training.heartbeat`."""
    if _joined is not None:
        _joined.watch.mark(stage, step)


def exchanged(value: T) -> list[T]:
    """What each process gave, by rank, in all of them; waits for the others as long as they live."""
    if _joined is None:
        return [value]
    group, number = _joined, _joined.exchanges
    group.exchanges += 1
    before = group.watch.stage
    keys = [f"exchange/{number}/{other}" for other in range(group.size)]
    group.store.set(keys[group.rank], pickle.dumps(value))
    if number >= 2:
        group.store.delete_key(f"exchange/{number - 2}/{group.rank}")  # all have gone on to the one after it
    group.watch.mark("waiting")
    _wait_for(group.store, keys)
    group.watch.mark(before)
    return [pickle.loads(group.store.get(key)) for key in keys]


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them; the others wait, and fail where it fails.

    Raises:
        OthersError: in the others, an error of segkit that the first one raises.
    """
    if _joined is None:
        return make()
    made: T | SegkitError | None = None
    if _joined.rank == 0:
        try:
            made = make()
        except SegkitError as error:
            exchanged(error)
            raise
    found = exchanged(made)[0]
    if isinstance(found, SegkitError):
        raise OthersError(found)
    return found  # type: ignore[return-value]


def mapped(function: Callable[[Item], T], items: Iterable[Item]) -> list[T]:
    """`function` of every item, in their order: each process does its part, and all get all results.

    Raises:
        KeyboardInterrupt: in all of them, where one was asked to end before its part was done.
    """
    if _joined is None:
        return [function(item) for item in items]
    mine: list[T] = []
    is_cut = False
    for item in islice(items, _joined.rank, None, _joined.size):
        is_cut = _joined.is_to_end()
        if is_cut:
            break
        _joined.watch.mark(_joined.watch.stage)
        mine.append(function(item))
    parts = exchanged((is_cut, mine))
    if any(is_cut for is_cut, _ in parts):
        raise KeyboardInterrupt
    in_turn = zip_longest(*(part for _, part in parts), fillvalue=_NOTHING)
    return [result for results in in_turn for result in results if result is not _NOTHING]


@contextmanager
def cut_short_when(is_to_end: Callable[[], bool]) -> Iterator[None]:
    """Let `mapped` stop between two items when this process is asked to end."""
    if _joined is not None:
        _joined.is_to_end = is_to_end
    try:
        yield
    finally:
        if _joined is not None:
            _joined.is_to_end = lambda: False


def first_before_others(make: Callable[[], T]) -> T:
    """What each process makes itself, the first one before the others: it may tidy up what all read.

    Raises:
        OthersError: in the others, an error of segkit that the first one raises.
    """
    made: list[T] = []
    from_first(lambda: made.append(make()))
    return made[0] if made else make()


def summed(*values: float) -> list[float]:
    """The sums over processes of a few numbers; one small message."""
    if _joined is None:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(numbers)
    return numbers.tolist()


class LossOfPart(nn.Module):
    """A task's loss as the forward pass of a module, which is what data parallelism wraps.

    The parameters are the model's, and the model is called as the task calls it: through its own forward pass, its
    encoder alone, or beside a discriminator.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._task = task

    def forward(self, batch: Batch) -> Tensor:
        """The loss of this process's part of a batch, a scalar."""
        with spread_batch():
            return self._task.loss(batch)


def data_parallel(task: Task) -> nn.Module:
    """The task's loss of a batch, whose backward pass leaves the mean gradient of all processes in the model.

    All processes begin with the weights of the first. Batch norms take their statistics from the whole batch on GPUs;
    on CPUs, for which torch has no such layer, from the part of each process.
    """
    if _joined is None:
        return LossOfPart(task)
    if next(task.model.parameters()).is_cuda:
        task.model = nn.SyncBatchNorm.convert_sync_batchnorm(task.model)  # type: ignore[no-untyped-call]
    loss = LossOfPart(task)
    return DistributedDataParallel(loss, gradient_as_bucket_view=True)


@contextmanager
def without_exchange(loss: nn.Module, *, is_wanted: bool) -> Iterator[None]:
    """Let gradients of several batches add up in each process, until those of the last are exchanged."""
    if is_wanted and isinstance(loss, DistributedDataParallel):
        with loss.no_sync():
            yield
    else:
        yield
