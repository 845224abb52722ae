"""Who does what, and what is tried again: with a crew made up for the test, one event after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from segkit.batch.ray_executor import Lost, distribute
from segkit.errors import ClusterError


@dataclass(eq=False)
class Worker:
    node: str
    task: str | None = None


@dataclass
class Crew:
    """Workers that finish in the order in which they began. A task is lost on a node where `kills` says so.

    A worker that is lost is replaced at once, unless its node is in `mortal`.
    """

    workers: list[Worker]
    kills: set[tuple[str, str]] = field(default_factory=set)
    mortal: set[str] = field(default_factory=set)
    begun: list[str] = field(default_factory=list)
    running: list[Worker] = field(default_factory=list)
    most_running: int = 0

    def idle(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.task is None]

    def nodes(self) -> set[str]:
        return {worker.node for worker in self.workers}

    def give(self, worker: Worker, task: str) -> None:
        assert worker.task is None
        worker.task = task
        self.begun.append(f"{task} on {worker.node}")
        self.running.append(worker)
        self.most_running = max(self.most_running, len(self.running))

    def wait(self) -> list[tuple[Worker, Any]]:
        if not self.workers:
            raise ClusterError("nobody is left")
        worker = self.running.pop(0)
        task, worker.task = worker.task, None
        assert task is not None
        if (task, worker.node) not in self.kills:
            return [(worker, task.upper())]
        self.workers.remove(worker)
        if worker.node not in self.mortal:
            self.workers.append(Worker(worker.node))
        return [(worker, Lost(f"{worker.node} died"))]


def give_up(task: str, reasons: list[str]) -> str:
    return f"{task}: {', '.join(reasons)}"


def crew_of(nodes: str, **options: Any) -> Crew:
    return Crew([Worker(node) for node in nodes], **options)


def test_every_task_is_done_once_by_whoever_is_free() -> None:
    crew = crew_of("xy")
    assert list(distribute("abcde", crew, give_up)) == list("ABCDE")
    assert crew.begun == ["a on x", "b on y", "c on x", "d on y", "e on x"]


def test_no_more_tasks_are_taken_than_there_are_workers() -> None:
    taken: list[int] = []

    def endless() -> Iterator[str]:
        for number in itertools.count():
            taken.append(number)
            yield "t"

    crew = crew_of("xyz")
    results = distribute(endless(), crew, give_up)
    assert list(itertools.islice(results, 1000)) == ["T"] * 1000
    assert crew.most_running == 3
    assert len(taken) <= 1000 + 3 + 1  # one is looked at ahead


def test_a_lost_task_goes_first_and_to_another_node() -> None:
    crew = crew_of("xy", kills={("a", "x")})
    assert list(distribute("abcd", crew, give_up)) == ["B", "C", "A", "D"]
    assert crew.begun == ["a on x", "b on y", "c on x", "a on y", "d on x"]


def test_with_one_node_it_is_tried_there_again() -> None:
    crew = crew_of("x", kills={("a", "x")})
    assert list(distribute("ab", crew, give_up, tries=2)) == ["a: x died, x died", "B"]
    assert crew.begun == ["a on x", "a on x", "b on x"]


def test_a_task_that_kills_every_worker_is_given_up_and_the_others_are_done() -> None:
    crew = crew_of("xyz", kills={("b", node) for node in "xyz"})
    results = list(distribute("abcdefgh", crew, give_up))
    assert sorted(results) == ["A", "C", "D", "E", "F", "G", "H", "b: y died, z died, x died"]
    assert sorted(begun for begun in crew.begun if begun.startswith("b")) == ["b on x", "b on y", "b on z"]


def test_the_last_task_is_tried_again_as_well() -> None:
    crew = crew_of("xy", kills={("b", "y")}, mortal={"y"})
    assert list(distribute("ab", crew, give_up)) == ["A", "B"]
    assert crew.begun == ["a on x", "b on y", "b on x"]


def test_without_any_worker_left_it_ends_and_what_was_done_is_kept() -> None:
    crew = crew_of("x", kills={("b", "x")}, mortal={"x"})
    done: list[str] = []
    with pytest.raises(ClusterError, match="nobody is left"):
        done.extend(distribute("abc", crew, give_up))
    assert done == ["A"]
