"""Which process of a training holds up the others, and what it was doing.

The processes wait for each other in every step, so one that is stuck or dead stops all of them without any message.
Each has a thread here that publishes its progress in the store by which the processes found each other, and reads that
of the others. A fault that it finds ends the process with a message that names the rank.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from torch.distributed.distributed_c10d import Store

from segkit.errors import printable

_log = logging.getLogger(__name__)

_STAGES = ("preparing", "loading a batch", "computing", "updating the weights", "in validation", "writing", "waiting")
"""Stages of a step, in order."""

_UNLIMITED = ("preparing", "waiting")
"""Stages without a time limit: data may be large, and a waiting process holds up none."""

_MOST_BETWEEN_BEATS_S = 5.0
_MOST_SILENCE_S = 60.0


@dataclass(frozen=True)
class Sign:
    """What a process publishes: `beats` grows as long as it lives, `marks` as long as it makes progress."""

    step: int = 0
    stage: str = "preparing"
    beats: int = 0
    marks: int = 0
    host: str = ""
    process: int = 0
    failure: str = ""
    verdict: str = ""
    """The fault for which it ended itself."""

    @property
    def place(self) -> tuple[int, int]:
        """How far the process is: the smaller one is behind."""
        return self.step, _STAGES.index(self.stage)


@dataclass
class Seen:
    """The last sign of a process, and when its beats and marks last changed, by the clock of this process."""

    sign: Sign
    beaten_s: float
    marked_s: float


def find_fault(seen: Mapping[int, Seen], now_s: float, timeout_s: float, silence_s: float) -> str | None:
    """A sentence that names the rank at fault, None as long as all make progress."""
    if verdicts := [other.sign.verdict for other in seen.values() if other.sign.verdict]:
        return verdicts[0]
    for rank, other in seen.items():
        if other.sign.failure:
            return f"rank {rank} failed at step {other.sign.step}: {other.sign.failure}"
    for rank, other in seen.items():
        if now_s - other.beaten_s > silence_s or _is_dead(other.sign):
            return f"rank {rank} is gone; it was last seen {other.sign.stage} at step {other.sign.step}"
    held = {rank: other for rank, other in seen.items() if other.sign.stage not in _UNLIMITED}
    still = {rank: other for rank, other in held.items() if now_s - other.marked_s > timeout_s}
    if not still:
        return None
    furthest_back = min(other.sign.place for other in held.values())
    ranks = [rank for rank, other in still.items() if other.sign.place == furthest_back]
    if not ranks:
        return None  # the one behind still makes progress
    sign = still[ranks[0]].sign
    names = " and ".join(f"rank {rank}" for rank in ranks)
    have = "has" if len(ranks) == 1 else "have"
    return f"{names} {have} not got beyond step {sign.step} for {timeout_s:g} s, last seen {sign.stage}"


def _is_dead(sign: Sign) -> bool:
    """Whether a process on the same host has ended; unknown, so False, for those on other hosts."""
    if not sign.host or sign.host != _host():
        return False
    status = Path("/proc", str(sign.process), "stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] == "Z"  # a zombie
    except OSError:
        return True


@cache
def _host() -> str:
    """The machine and PID namespace in which a process id is valid; "" where unknown."""
    try:
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


class Heartbeat:
    """Publishes how far this process is, and ends it when another one holds up all.

    `give_up` is called in the heartbeat's thread with the fault; by default it ends the process at once, since the main
    thread is blocked inside a library.
    """

    def __init__(
        self, store: Store, rank: int, size: int, timeout_s: float, give_up: Callable[[str], None] | None = None
    ) -> None:
        self.store = store
        self.rank = rank
        self.size = size
        self.timeout_s = timeout_s
        self.interval_s = min(_MOST_BETWEEN_BEATS_S, timeout_s / 6)
        self.silence_s = min(_MOST_SILENCE_S, timeout_s / 2)  # shorter than the timeout: dead is not taken for stuck
        self.give_up = give_up or self._end_process
        self._mark = (0, "preparing", 0)
        self._beats = 0
        self._failure = ""
        self._verdict = ""
        self._seen: dict[int, Seen] = {}
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._publish()
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread."""
        self._is_over.set()
        self._thread.join(timeout=2 * self.interval_s)

    def mark(self, stage: str, step: int | None = None) -> None:
        """Set what the process does now; the thread publishes it later."""
        before, _, marks = self._mark
        self._mark = (before if step is None else step, stage, marks + 1)

    @property
    def stage(self) -> str:
        """The stage marked last."""
        return self._mark[1]

    def fail(self, message: str) -> None:
        """Publish why this process ends."""
        self._is_over.set()
        self._failure = _first_line(message)
        self._publish()

    def fault_of_another(self, within_s: float) -> str | None:
        """The fault of another process as soon as it shows; None if none does in that time."""
        for now_s in self._looking(within_s):
            others = {rank: seen for rank, seen in self._seen.items() if rank != self.rank}
            if (fault := find_fault(others, now_s, self.timeout_s, self.silence_s)) is not None:
                return fault
        return None

    def has_failed_alike(self, message: str, within_s: float) -> bool:
        """Whether rank 0 fails with the same message within that time."""
        return any(
            0 in self._seen and self._seen[0].sign.failure == _first_line(message) for _ in self._looking(within_s)
        )

    def _looking(self, within_s: float) -> Iterator[float]:
        """The time after each look at the other processes."""
        until_s = time.monotonic() + within_s
        while time.monotonic() < until_s:
            self._look()
            yield time.monotonic()
            time.sleep(min(0.1, self.interval_s))

    def _run(self) -> None:
        while not self._is_over.wait(self.interval_s):
            self._publish()
            self._look()
            fault = find_fault(self._seen, time.monotonic(), self.timeout_s, self.silence_s)
            if fault is not None:
                # The main thread may just get the error, too, and reports more.
                if not self._is_over.wait(self.interval_s):
                    self._verdict = fault
                    self._publish()
                    self.give_up(fault)
                return

    @property
    def _sign(self) -> Sign:
        step, stage, marks = self._mark
        return Sign(step, stage, self._beats, marks, _host(), os.getpid(), self._failure, self._verdict)

    def _publish(self) -> None:
        with self._lock:
            self._beats += 1
            self._quietly(lambda: self.store.set(_key(self.rank), json.dumps(vars(self._sign))))

    def _look(self) -> None:
        with self._lock:
            for rank in range(self.size):
                self._quietly(partial(self._note, rank))

    def _note(self, rank: int) -> None:
        if rank != self.rank and not self.store.check([_key(rank)]):
            return
        sign = self._sign if rank == self.rank else Sign(**json.loads(self.store.get(_key(rank))))
        now, before = time.monotonic(), self._seen.get(rank)
        if before is None:
            self._seen[rank] = Seen(sign, now, now)
            return
        beaten_s = now if sign.beats != before.sign.beats or rank == self.rank else before.beaten_s
        marked_s = now if sign.marks != before.sign.marks else before.marked_s
        self._seen[rank] = Seen(sign, beaten_s, marked_s)

    def _quietly(self, ask: Callable[[], None]) -> None:
        try:
            ask()
        except RuntimeError as error:  # the process that holds the store has ended; its silence will show that
            _log.debug("the store does not answer: %s", error)

    def _end_process(self, sentence: str) -> None:
        sys.stderr.write(f"Error: {printable(sentence)} (told by rank {self.rank})\n")
        sys.stderr.flush()
        os._exit(1)


def _first_line(text: str) -> str:
    return (text.splitlines() or ["without a word"])[0]


def _key(rank: int) -> str:
    return f"watch/{rank}"
