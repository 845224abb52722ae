"""Which process of a training holds up the others, and where it was last seen.

Processes that learn together wait for each other in every step, so one that is stuck or dead makes all of them hang
without a word. Each has a thread here that tells the others, through the store by which they found each other, how far
its process is, and looks how far they are. What it finds ends the process with a sentence.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Protocol

from segkit.errors import printable

_log = logging.getLogger(__name__)

_STAGES = ("preparing", "loading a batch", "computing", "updating the weights", "in validation", "writing", "waiting")
"""What a process does in a step, in this order."""

_UNLIMITED = ("preparing", "waiting")
"""Stages that may take as long as they like: data are large, and who waits holds up nobody."""

_MOST_BETWEEN_BEATS_S = 5.0
_MOST_SILENCE_S = 60.0


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def set(self, key: str, value: str | bytes) -> None:
        """Keep a value."""

    def get(self, key: str) -> bytes:
        """The value of a key that is there."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""

    def delete_key(self, key: str) -> bool:
        """Forget a value; whether it was there."""


@dataclass(frozen=True)
class Sign:
    """What a process tells of itself; `beats` grows as long as it lives, `marks` as long as it gets on."""

    step: int = 0
    stage: str = "preparing"
    beats: int = 0
    marks: int = 0
    host: str = ""
    process: int = 0
    failure: str = ""
    verdict: str = ""
    """The sentence with which it gave up on another process, or on itself."""

    @property
    def place(self) -> tuple[int, int]:
        """How far the process is: of two the smaller one is behind."""
        return self.step, _STAGES.index(self.stage)


@dataclass
class Seen:
    """The last sign of a process, and when its beats and its marks last changed, by the clock of this one."""

    sign: Sign
    beaten_s: float
    marked_s: float


def find_fault(seen: Mapping[int, Seen], now_s: float, timeout_s: float, silence_s: float) -> str | None:
    """A sentence that names the rank to blame, None as long as all get on."""
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
        return None  # whoever is behind still gets on
    sign = still[ranks[0]].sign
    names = " and ".join(f"rank {rank}" for rank in ranks)
    have = "has" if len(ranks) == 1 else "have"
    return f"{names} {have} not got beyond step {sign.step} for {timeout_s:g} s, last seen {sign.stage}"


def _is_dead(sign: Sign) -> bool:
    """Whether a process that this one could see is no more; of others nothing is known."""
    if not sign.host or sign.host != _host():
        return False
    status = Path("/proc", str(sign.process), "stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] == "Z"  # ended, and not buried yet
    except OSError:
        return True


@cache
def _host() -> str:
    """The machine and, within it, the container in which a number of a process means something; "" where unknown."""
    try:
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


class Watch:
    """Tells the others how far this process is, and gives up when one of them holds up all.

    `give_up` is called in the thread of the watch with the sentence, by default to end the process at once: the main
    thread waits inside a library and hears of nothing.
    """

    def __init__(
        self, store: Store, rank: int, size: int, timeout_s: float, give_up: Callable[[str], None] | None = None
    ) -> None:
        self.store = store
        self.rank = rank
        self.size = size
        self.timeout_s = timeout_s
        self.interval_s = min(_MOST_BETWEEN_BEATS_S, timeout_s / 6)
        self.silence_s = min(_MOST_SILENCE_S, timeout_s / 2)  # who is dead is not taken for stuck
        self.give_up = give_up or self._end_process
        self._mark = (0, "preparing", 0)
        self._beats = 0
        self._failure = ""
        self._verdict = ""
        self._seen: dict[int, Seen] = {}
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to tell and to look."""
        self._tell()
        self._thread.start()

    def stop(self) -> None:
        """Leave in peace: all processes have come to their end."""
        self._is_over.set()
        self._thread.join(timeout=2 * self.interval_s)

    def mark(self, stage: str, step: int | None = None) -> None:
        """Say what the process does now; costs nothing, the thread sends it."""
        before, _, marks = self._mark
        self._mark = (before if step is None else step, stage, marks + 1)

    @property
    def stage(self) -> str:
        """What was marked last."""
        return self._mark[1]

    def fail(self, sentence: str) -> None:
        """Tell the others why this process ends."""
        self._is_over.set()
        self._failure = _first_line(sentence)
        self._tell()

    def fault_of_another(self, within_s: float) -> str | None:
        """What is wrong with another process, as soon as it shows; None if nothing does in that time."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            self._look()
            others = {rank: seen for rank, seen in self._seen.items() if rank != self.rank}
            if (fault := find_fault(others, time.monotonic(), self.timeout_s, self.silence_s)) is not None:
                return fault
            time.sleep(min(0.1, self.interval_s))
        return None

    def has_failed_alike(self, sentence: str, within_s: float) -> bool:
        """Whether the first process ended with the same sentence, or does so in that time."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            self._look()
            if 0 in self._seen and self._seen[0].sign.failure == _first_line(sentence):
                return True
            time.sleep(min(0.1, self.interval_s))
        return False

    def _run(self) -> None:
        while not self._is_over.wait(self.interval_s):
            self._tell()
            self._look()
            fault = find_fault(self._seen, time.monotonic(), self.timeout_s, self.silence_s)
            if fault is not None:
                # The main thread may just hear of it, too, and knows more.
                if not self._is_over.wait(self.interval_s):
                    self._verdict = fault
                    self._tell()
                    self.give_up(fault)
                return

    @property
    def _sign(self) -> Sign:
        step, stage, marks = self._mark
        return Sign(step, stage, self._beats, marks, _host(), os.getpid(), self._failure, self._verdict)

    def _tell(self) -> None:
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
        """A store that does not answer is the end of the process that held it, which silence shows soon enough."""
        try:
            ask()
        except RuntimeError as error:
            _log.debug("the store does not answer: %s", error)

    def _end_process(self, sentence: str) -> None:
        sys.stderr.write(f"Error: {printable(sentence)} (told by rank {self.rank})\n")
        sys.stderr.flush()
        os._exit(1)


def _first_line(text: str) -> str:
    return (text.splitlines() or ["without a word"])[0]


def _key(rank: int) -> str:
    return f"watch/{rank}"
