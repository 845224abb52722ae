"""Tasks to workers on several nodes: one at a time each, tried again elsewhere where a worker is lost.

Nothing here knows of Ray; what does is behind `Crew`. A task is handed out only when a worker is free for it, so what
is under way is bounded by the number of workers, however many tasks there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")

TRIES = 3
"""Times that a task is begun at most: what loses three workers would lose all of them."""


class Worker(Protocol):
    """A process that does one task at a time."""

    @property
    def node(self) -> str:
        """The machine it runs on, as a user knows it."""
        ...


@dataclass(frozen=True)
class Lost:
    """What comes instead of a result where the worker was lost, and why."""

    reason: str


class Crew(Protocol):
    """The workers that there are; they come and go."""

    def idle(self) -> list[Any]:
        """Workers ready for a task."""
        ...

    def nodes(self) -> set[str]:
        """The nodes with a worker that takes tasks, now or when it is done with its present one."""
        ...

    def give(self, worker: Any, task: Any) -> None:
        """Let an idle worker begin a task."""
        ...

    def wait(self) -> list[tuple[Any, Any]]:
        """Wait until something has happened: workers with the result of their task or `Lost`, or none.

        Raises:
            SegkitError: there is no worker any more and none will come.
        """
        ...


@dataclass
class _Attempt(Generic[_T]):
    task: _T
    nodes: set[str] = field(default_factory=set)
    """Where it was begun and lost."""
    reasons: list[str] = field(default_factory=list)


def distribute(
    tasks: Iterable[_T], crew: Crew, give_up: Callable[[_T, list[str]], _R], *, tries: int = TRIES
) -> Iterator[_R]:
    """The result of every task, as they come; `give_up` makes that of a task lost `tries` times, of the reasons.

    A task whose worker was lost goes before the others, and to another node as long as there is one.
    """
    fresh = (_Attempt(task) for task in tasks)
    again: deque[_Attempt[_T]] = deque()
    ahead = next(fresh, None)
    running: dict[Any, _Attempt[_T]] = {}
    while ahead is not None or again or running:
        for worker in crew.idle():
            attempt = _take(again, worker, crew)
            if attempt is None and ahead is not None:
                attempt, ahead = ahead, next(fresh, None)
            if attempt is not None:
                running[worker] = attempt
                crew.give(worker, attempt.task)
        for worker, outcome in crew.wait():
            attempt = running.pop(worker)
            if not isinstance(outcome, Lost):
                yield outcome
                continue
            attempt.nodes.add(worker.node)
            attempt.reasons.append(outcome.reason)
            if len(attempt.reasons) < tries:
                again.append(attempt)
            else:
                yield give_up(attempt.task, attempt.reasons)


def _take(again: deque[_Attempt[_T]], worker: Worker, crew: Crew) -> _Attempt[_T] | None:
    """The first of the tasks to be tried again that this worker may have."""
    nodes = crew.nodes() if again else set()
    for attempt in again:
        if worker.node not in attempt.nodes or nodes <= attempt.nodes:
            again.remove(attempt)
            return attempt
    return None
