"""Detection of a process that is stuck or dead and so blocks the others, which wait for it in every step.

A thread in each process publishes its progress in the store shared by all and reads that of the others. If it finds a
fault, it ends the process with a message that names the rank.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch.distributed.distributed_c10d import Store

from segkit.errors import printable

_log = logging.getLogger(__name__)

_STAGES = ("preparing", "loading a batch", "computing", "updating the weights", "in validation", "writing", "waiting")
"""Stages of a step, in order."""
_UNLIMITED = ("preparing", "waiting")
"""Stages without a time limit: data may be large, and a waiting process blocks none."""
_KEY = "watch/"
_MOST_BETWEEN_BEATS_S = 5.0
_MOST_SILENCE_S = 60.0


@dataclass(frozen=True)
class Sign:
    """What a process publishes: `beats` increases while it lives, `marks` while it makes progress."""

    step: int = 0
    stage: str = "preparing"
    beats: int = 0
    marks: int = 0
    host: str = ""
    process: int = 0
    failure: str = ""
    verdict: str = ""
    """The fault that made it end itself."""

    @property
    def place(self) -> tuple[int, int]:
        """Step and stage, to compare: the smaller one is behind."""
        return self.step, _STAGES.index(self.stage)


@dataclass
class Seen:
    """The last sign of a process, and when its beats and marks last changed (`time.monotonic` of this process)."""

    sign: Sign
    beaten_s: float
    marked_s: float


def find_fault(seen: Mapping[int, Seen], now_s: float, timeout_s: float, silence_s: float) -> str | None:
    """A sentence that names the rank at fault; None while all make progress."""
    signs = {rank: other.sign for rank, other in seen.items()}
    found = [sign.verdict for sign in signs.values() if sign.verdict]
    found += [f"rank {rank} failed at step {sign.step}: {sign.failure}" for rank, sign in signs.items() if sign.failure]
    if found:
        return found[0]
    for rank, sign in signs.items():
        if now_s - seen[rank].beaten_s > silence_s or _is_dead(sign):
            return f"rank {rank} is gone; it was last seen {sign.stage} at step {sign.step}"
    limited = {rank: sign for rank, sign in signs.items() if sign.stage not in _UNLIMITED}
    last = min((sign.place for sign in limited.values()), default=None)
    late = [rank for rank in limited if signs[rank].place == last and now_s - seen[rank].marked_s > timeout_s]
    if not late:
        return None
    sign, names = signs[late[0]], " and ".join(f"rank {rank}" for rank in late)
    have = "has" if len(late) == 1 else "have"
    return f"{names} {have} not got beyond step {sign.step} for {timeout_s:g} s, last seen {sign.stage}"


def _is_dead(sign: Sign) -> bool:
    if not sign.host or sign.host != _host():
        return False  # not known of other hosts
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
    """Publishes the progress of this process, and ends the process if another one blocks all."""

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        self.store, self.rank, self.size, self.timeout_s = store, rank, size, timeout_s
        self.interval_s = min(_MOST_BETWEEN_BEATS_S, timeout_s / 6)
        self.silence_s = min(_MOST_SILENCE_S, timeout_s / 2)  # below the timeout: a dead process is not reported stuck
        self._mark = (0, "preparing", 0)
        self._beats = 0
        self._failure = self._verdict = ""
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
        """The first fault of another process; None if there is none in that time."""
        for now_s in self._looking(within_s):
            others = {rank: seen for rank, seen in self._seen.items() if rank != self.rank}
            if (fault := find_fault(others, now_s, self.timeout_s, self.silence_s)) is not None:
                return fault
        return None

    def has_failed_alike(self, message: str, within_s: float) -> bool:
        """Whether rank 0 fails with the same message within that time."""
        failure = _first_line(message)
        return any(0 in self._seen and self._seen[0].sign.failure == failure for _ in self._looking(within_s))

    def _looking(self, within_s: float) -> Iterator[float]:
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
            if fault is None:
                continue
            # The main thread may be about to get the error, too, and reports more.
            if not self._is_over.wait(self.interval_s):
                self._verdict = fault
                self._publish()
                sys.stderr.write(f"Error: {printable(fault)} (reported by rank {self.rank})\n")
                sys.stderr.flush()
                os._exit(1)  # at once: the main thread is blocked inside a library
            return

    @property
    def _sign(self) -> Sign:
        step, stage, marks = self._mark
        return Sign(step, stage, self._beats, marks, _host(), os.getpid(), self._failure, self._verdict)

    def _publish(self) -> None:
        with self._lock, _ignoring_lost_store():
            self._beats += 1
            self.store.set(f"{_KEY}{self.rank}", json.dumps(vars(self._sign)))

    def _look(self) -> None:
        with self._lock:
            for rank in range(self.size):
                with _ignoring_lost_store():
                    self._note(rank)

    def _note(self, rank: int) -> None:
        is_own = rank == self.rank
        if not is_own and not self.store.check([f"{_KEY}{rank}"]):
            return
        sign = self._sign if is_own else Sign(**json.loads(self.store.get(f"{_KEY}{rank}")))
        now_s = time.monotonic()
        before = self._seen.setdefault(rank, Seen(sign, now_s, now_s))
        is_alive, has_moved = is_own or sign.beats != before.sign.beats, sign.marks != before.sign.marks
        self._seen[rank] = Seen(sign, now_s if is_alive else before.beaten_s, now_s if has_moved else before.marked_s)


@contextmanager
def _ignoring_lost_store() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the process that holds the store has ended; its silence will show that
        _log.debug("the store does not answer: %s", error)


def _first_line(text: str) -> str:
    return (text.splitlines() or ["no message"])[0]
