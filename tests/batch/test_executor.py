"""Work side by side: the same results as one after the other, bounded, and every failure where it belongs."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import pytest

from segkit.batch.worker import CaseJob, LocalExecutor


@dataclass
class Log:
    """What happened, in order, and how much was waiting at once."""

    events: list[str] = field(default_factory=list)
    threads: dict[str, set[int]] = field(default_factory=dict)
    waiting: int = 0
    most_waiting: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, stage: str, task: str) -> None:
        with self.lock:
            self.events.append(f"{stage} {task}")
            self.threads.setdefault(stage, set()).add(threading.get_ident())


class SpellingJob:
    """Spells a word letter by letter; a word with a stage's name in it fails there."""

    def __init__(self, word: str, log: Log, tries: int = 0) -> None:
        self.word, self.log, self.tries = word, log, tries

    @property
    def waiting_bytes(self) -> int:
        return len(self.word)

    def read(self) -> None:
        self.log.note("read", self.word)
        if "read" in self.word:
            raise ValueError("unreadable")
        with self.log.lock:
            self.log.waiting += 1
            self.log.most_waiting = max(self.log.most_waiting, self.log.waiting)

    def compute(self) -> None:
        with self.log.lock:
            self.log.waiting -= 1
        self.spelt = ""
        for letter in self.word:
            self.log.note("compute", self.word)
            if letter == "!" and self.tries == 0:
                raise MemoryError("too long")
            if letter == "^":
                raise KeyboardInterrupt
            self.spelt += letter

    def write(self) -> str:
        for letter in self.spelt:
            self.log.note("write", self.word)
            if letter == "?":
                raise OSError("disk full")
        return self.spelt

    def recover(self, error: BaseException) -> str:
        if isinstance(error, MemoryError):
            return SpellingJob(self.word, self.log, 1).run()
        return f"{self.word} failed: {error}"

    run = CaseJob.run


@dataclass
class Spelling:
    log: Log = field(default_factory=Log)

    def start(self, word: str) -> SpellingJob:
        return SpellingJob(word, self.log)

    def __call__(self, word: str) -> str:
        return self.start(word).run()


WORDS = ["one", "two", "bad read", "three", "wh?at", "four", "too! long", "five"]
RESULTS = ["one", "two", "bad read failed: unreadable", "three", "wh?at failed: disk full", "four", "too! long", "five"]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_whatever_fails(workers: int) -> None:
    assert list(LocalExecutor(workers).map(Spelling(), WORDS)) == RESULTS


def test_without_workers_there_are_no_threads() -> None:
    work = Spelling()
    list(LocalExecutor(0).map(work, ["one", "two"]))
    assert set().union(*work.log.threads.values()) == {threading.get_ident()}
    assert work.log.events[:3] == ["read one", "compute one", "compute one"]


def test_with_workers_only_the_network_stays_in_this_thread() -> None:
    work = Spelling()
    list(LocalExecutor(1).map(work, ["one", "two"]))
    assert work.log.threads["compute"] == {threading.get_ident()}
    assert threading.get_ident() not in work.log.threads["read"] | work.log.threads["write"]


def test_the_next_case_is_read_while_one_is_computed() -> None:
    read_second = threading.Event()

    class Watching(SpellingJob):
        def read(self) -> None:
            super().read()
            if self.word == "second":
                read_second.set()

        def compute(self) -> None:
            if self.word == "first":
                assert read_second.wait(10), "the second case was not read meanwhile"
            super().compute()

    work = Spelling()
    work.start = lambda word: Watching(word, work.log)  # type: ignore[method-assign]
    assert list(LocalExecutor(1).map(work, ["first", "second"])) == ["first", "second"]


def test_what_waits_is_bounded_in_bytes() -> None:
    work = Spelling()
    words = ["abcdefgh"] * 6
    for result in LocalExecutor(4, waiting_bytes=16).map(work, words):
        assert result == "abcdefgh"
        time.sleep(0.01)
    assert work.log.most_waiting <= 2


def test_an_interruption_keeps_what_was_done() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        done.extend(LocalExecutor(1).map(Spelling(), ["one", "t^o", "three"]))
    assert done == ["one"]
