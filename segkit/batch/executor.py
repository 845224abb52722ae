"""Where and when the work on cases is done: one after the other, or reading, computing and writing side by side.

Threads are enough: unpacking, arithmetic and the runtimes of networks all let other threads go on meanwhile. A stage
that fails ends its own case only, with its own trace.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

_T = TypeVar("_T", contravariant=True)
_R = TypeVar("_R", covariant=True)
_S = TypeVar("_S")

_PARTS_AHEAD = 2
"""Computed parts that may wait to be finished; each is a slab of logits."""


class Job(Protocol[_R]):
    """The work on one task in stages; each but `failed` may raise."""

    @property
    def waiting_bytes(self) -> int:
        """What the job holds between `read` and `compute`, as far as is known before."""
        ...

    def read(self) -> None:
        """Get ready for `compute`."""
        ...

    def compute(self) -> Iterator[Any]:
        """The parts of the result, one after the other."""
        ...

    def finish(self, parts: Iterator[Any]) -> _R:
        """Put the parts together as they come."""
        ...

    def again(self, error: BaseException) -> Job[_R] | None:
        """Another job to be tried, whole, in place of this one after `error`; None where that is no use."""
        ...

    def failed(self, error: BaseException) -> _R:
        """The result where a stage raised `error`."""
        ...


class Work(Protocol[_T, _R]):
    """What is done with each task."""

    def __call__(self, task: _T) -> _R:
        """All of it."""
        ...

    def begin(self, task: _T) -> Job[_R]:
        """The same in stages."""
        ...


class Executor(Protocol):
    """Where the work is done: maps `work` over `tasks` and yields each result as it is ready, in any order."""

    def map(self, work: Work[Any, _S], tasks: Iterable[Any]) -> Iterator[_S]:
        """Results of `work(task)` for every task; work and tasks that leave this process must survive pickling."""
        ...


class LocalExecutor:
    """In this process: with `workers` threads that read ahead and one that finishes, or, with 0, without any thread.

    Cases that were read wait for the network as long as they take no more than `waiting_bytes` together.
    """

    def __init__(self, workers: int = 0, waiting_bytes: int = 2**31) -> None:
        self.workers = workers
        self.waiting_bytes = waiting_bytes

    def map(self, work: Work[Any, _S], tasks: Iterable[Any]) -> Iterator[_S]:
        """Results in the order of the tasks."""
        if self.workers == 0:
            return (work(task) for task in tasks)
        return self._overlapped(work, iter(tasks))

    def _overlapped(self, work: Work[Any, _S], tasks: Iterator[Any]) -> Iterator[_S]:
        read_ahead: deque[tuple[Job[_S], Future[None]]] = deque()
        finishing: deque[tuple[Job[_S], Future[_S]]] = deque()
        following = _next_job(work, tasks)
        with ThreadPoolExecutor(self.workers) as readers, ThreadPoolExecutor(1) as finisher:
            while following is not None or read_ahead:
                while following is not None and self._has_room(following, read_ahead):
                    read_ahead.append((following, readers.submit(following.read)))
                    following = _next_job(work, tasks)
                job, reading = read_ahead.popleft()
                error = reading.exception()
                if error is None:
                    try:
                        finishing.append((job, _compute(job, finisher)))
                    except BaseException:
                        yield from (_result(*one) for one in finishing)  # what is done is not lost
                        raise
                    # One case may be finished while the next is computed, no more: each holds a mask.
                    ready = finishing.popleft() if len(finishing) > 1 else None
                    if ready is not None:
                        yield _result(*ready)
                else:
                    yield from (_result(*one) for one in finishing)
                    finishing.clear()
                    yield _ended(job, error)
            yield from (_result(*one) for one in finishing)

    def _has_room(self, job: Job[Any], waiting: deque[tuple[Job[_S], Future[None]]]) -> bool:
        if not waiting:
            return True
        held = sum(one.waiting_bytes for one, _ in waiting)
        return len(waiting) <= self.workers and held + job.waiting_bytes <= self.waiting_bytes


def _next_job(work: Work[Any, _S], tasks: Iterator[Any]) -> Job[_S] | None:
    for task in tasks:
        return work.begin(task)
    return None


def _compute(job: Job[_S], finisher: ThreadPoolExecutor) -> Future[_S]:
    """Compute in this thread while the parts are finished in another; any error is that of the future."""
    channel = _Channel()

    def finish() -> _S:
        try:
            return job.finish(channel.parts())
        finally:
            channel.close()

    future = finisher.submit(finish)
    try:
        for part in job.compute():
            if not channel.put(part):
                break  # nobody wants any more: finishing has failed
    except Exception as error:
        channel.close(error)
    except BaseException:
        channel.close(InterruptedError("interrupted"))
        raise
    else:
        channel.close()
    return future


def run_whole(job: Job[_S]) -> _S:
    """The result of a job whose stages are done one after the other in this thread."""
    try:
        job.read()
        return job.finish(job.compute())
    except Exception as error:
        return _ended(job, error)


def _ended(job: Job[_S], error: BaseException) -> _S:
    other = job.again(error)
    return job.failed(error) if other is None else run_whole(other)


def _result(job: Job[_S], future: Future[_S]) -> _S:
    error = future.exception()
    return future.result() if error is None else _ended(job, error)


class _Channel:
    """A few parts on their way from one thread to another."""

    def __init__(self) -> None:
        self._parts: deque[Any] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._error: BaseException | None = None

    def put(self, part: Any) -> bool:
        """Pass a part on, waiting while there are too many; False where nobody takes them any more."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._parts) < _PARTS_AHEAD or self._is_closed)
            if self._is_closed:
                return False
            self._parts.append(part)
            self._changed.notify_all()
            return True

    def close(self, error: BaseException | None = None) -> None:
        """No part follows; or, from the side that takes them, none is wanted."""
        with self._changed:
            self._is_closed = True
            self._error = self._error or error
            self._changed.notify_all()

    def parts(self) -> Iterator[Any]:
        """The parts in order; raises the error with which the channel was closed, where there is one."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._parts) or self._is_closed)
                if not self._parts:
                    if self._error is not None:
                        raise self._error
                    return
                part = self._parts.popleft()
                self._changed.notify_all()
            yield part
