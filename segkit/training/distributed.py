"""Training in several processes (ranks), which exchange values through `Ranks`.

torchrun, or `segkit train --gpus N`, starts the processes; each runs the whole command. Rank 0 plans and writes, the
others use its decisions. Objects are exchanged through the rendezvous store, where a process may wait for another as
long as that one lives; tensors through the process group, gloo on CPUs and NCCL between GPUs.
"""

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
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from segkit.errors import SegkitError, TrainingError
from segkit.runtime import process_place
from segkit.training.heartbeat import Heartbeat
from segkit.training.interruption import InterruptedTrainingError

T = TypeVar("T")
Item = TypeVar("Item")

_MISSING: Any = object()

_GRACE_S = 60.0
"""Seconds by which the timeout of the process group exceeds that of the heartbeat, whose error has more detail."""
_SAME_ERROR_S = 2.0
"""If rank 0 reports the same error within this time, the other ranks do not report it."""
_LOST_PROCESS_SIGNS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe", "store")
"""Parts of the messages of torch about another process that is gone."""


class RemoteRankError(SegkitError):
    """An error that another rank has already reported; this process ends silently with the same exit code."""

    is_reported = True

    def __init__(self, error: SegkitError) -> None:
        super().__init__(error.found, where=error.where, expected=error.expected, remedy=error.remedy)
        self.exit_code = error.exit_code


@dataclass
class Ranks:
    """The processes that train together. `Ranks()` is a single process.

    All ranks must call the same methods in the same order.
    """

    rank: int = 0
    size: int = 1
    store: Store | None = None
    heartbeat: Heartbeat | None = None
    _exchanges: int = 0
    _should_stop: Callable[[], bool] = lambda: False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def mark(self, stage: str, step: int | None = None) -> None:
        """Publish what this process does now: a stage of `segkit.training.heartbeat`."""
        if self.heartbeat is not None:
            self.heartbeat.mark(stage, step)

    def exchange(self, value: T) -> list[T]:
        """The values of all processes, in order of rank; waits for the others as long as they live."""
        if self.store is None or self.heartbeat is None:
            return [value]
        number, stage = self._exchanges, self.heartbeat.stage
        self._exchanges += 1
        keys = [f"exchange/{number}/{other}" for other in range(self.size)]
        self.store.set(keys[self.rank], pickle.dumps(value))  # type: ignore[arg-type]
        if number >= 2:
            self.store.delete_key(f"exchange/{number - 2}/{self.rank}")  # all have read it before their next exchange
        self.heartbeat.mark("waiting")
        _wait_for(self.store, keys)
        self.heartbeat.mark(stage)
        return [pickle.loads(self.store.get(key)) for key in keys]

    def from_first(self, make: Callable[[], T]) -> T:
        """The result of `make` in rank 0, for all ranks.

        Raises:
            RemoteRankError: in the other ranks, if `make` raises a SegkitError in rank 0.
        """
        if self.size == 1:
            return make()
        try:
            made: Any = make() if self.is_first else None
        except SegkitError as error:
            self.exchange(error)
            raise
        found: Any = self.exchange(made)[0]
        if isinstance(found, SegkitError):
            raise RemoteRankError(found)
        return found  # type: ignore[no-any-return]

    def first_before_others(self, make: Callable[[], T]) -> T:
        """The result of `make` in each rank; rank 0 runs it before the others, because it may repair files.

        Raises:
            RemoteRankError: as for `from_first`.
        """
        made: list[T] = []
        self.from_first(lambda: made.append(make()))
        return made[0] if made else make()

    def map(self, function: Callable[[Item], T], items: Iterable[Item]) -> list[T]:
        """`function` of every item, in order, in all ranks; each rank computes its part.

        Raises:
            KeyboardInterrupt: in all ranks, if one of them was asked to stop before its part was done.
        """
        if self.heartbeat is None:
            return [function(item) for item in items]
        mine, is_cut = [], False
        for item in islice(items, self.rank, None, self.size):
            if is_cut := self._should_stop():
                break
            self.heartbeat.mark(self.heartbeat.stage)
            mine.append(function(item))
        parts = self.exchange((is_cut, mine))
        if any(is_cut for is_cut, _ in parts):
            raise KeyboardInterrupt
        in_turn = zip_longest(*(part for _, part in parts), fillvalue=_MISSING)
        return [result for results in in_turn for result in results if result is not _MISSING]

    @contextmanager
    def stopping_when(self, should_stop: Callable[[], bool]) -> Iterator[None]:
        """Let `map` stop between two items when `should_stop` is true."""
        self._should_stop = should_stop
        try:
            yield
        finally:
            self._should_stop = lambda: False

    def sum(self, *values: float) -> list[float]:
        """The sum over ranks of each number, in one message."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers)
        return numbers.tolist()


@contextmanager
def joined_ranks(device: torch.device, timeout_s: float) -> Iterator[Ranks]:
    """Join the processes that torchrun started beside this one, and leave them together.

    Raises:
        TrainingError: another process failed, is gone, or has held up the others for longer than `timeout_s`.
    """
    if process_place().size == 1:
        yield Ranks()
        return
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout_s + _GRACE_S)
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=size, timeout=limit)
    heartbeat = Heartbeat(store.clone(), rank, size, timeout_s)
    ranks = Ranks(rank, size, store, heartbeat)
    heartbeat.start()
    try:
        yield ranks
        _leave(ranks, store, heartbeat)
    except InterruptedTrainingError as error:  # in all of them, after the same step
        _leave(ranks, store, heartbeat)
        if ranks.is_first:
            raise
        raise RemoteRankError(error) from error
    except BaseException as error:
        _report_error(error, heartbeat)
        raise
    finally:
        heartbeat.stop()
        dist.destroy_process_group()


def _leave(ranks: Ranks, store: Store, heartbeat: Heartbeat) -> None:
    """Leave together; rank 0, which holds the store, last."""
    ranks.exchange(None)
    heartbeat.stop()
    if ranks.is_first:
        _wait_for(store, [f"left/{other}" for other in range(1, ranks.size)])
    else:
        store.set(f"left/{ranks.rank}", "")


def _wait_for(store: Store, keys: list[str]) -> None:
    pause_s = 0.001
    while not store.check(keys):
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.1)


def _report_error(error: BaseException, heartbeat: Heartbeat) -> None:
    """Publish an error for the other ranks; if another rank caused it, raise that cause instead."""
    if isinstance(error, RemoteRankError):
        return
    is_of_group = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_PROCESS_SIGNS)
    fault = heartbeat.fault_of_another(heartbeat.silence_s + 2 * heartbeat.interval_s) if is_of_group else None
    heartbeat.fail(fault or str(error) or type(error).__name__)
    if isinstance(error, SegkitError) and heartbeat.rank and heartbeat.has_failed_alike(str(error), _SAME_ERROR_S):
        raise RemoteRankError(error) from error
    if fault is not None:
        found = f"{fault} (reported by rank {heartbeat.rank})"
        raise TrainingError(found, remedy="Start all processes again with --resume") from error
