"""Starts workers, watches the clock, and counts what became of every input."""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fuzzing.worker import SECONDS_AN_INPUT

_SECONDS_TO_PREPARE = 120.0
_SECONDS_ASLEEP = 60.0
"""For an input, by the clock on the wall: a process that waits for something uses no time of the processor."""


@dataclass
class _Clock:
    limit_s: float


@dataclass
class Tally:
    """What became of the inputs of one parser; `defects` are (number, words), `refusals` sentences with their count."""

    accepted: int = 0
    refused: int = 0
    defects: list[tuple[int, str]] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    outcomes: dict[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def inputs(self) -> int:
        """All of them."""
        return self.accepted + self.refused + len(self.defects)

    def share_beyond(self, first_check: str) -> float:
        """Of the inputs: those that were not refused with a sentence that matches this regular expression."""
        return 1 - sum(bool(re.search(first_check, sentence)) for sentence in self.sentences) / self.inputs

    def note(self, number: int, outcome: str, words: str) -> None:
        """Count one input."""
        self.outcomes[number] = (outcome, words)
        if outcome == "accepted":
            self.accepted += 1
        elif outcome == "refused":
            self.refused += 1
            self.sentences.append(words)
        else:
            self.defects.append((number, words))


def run_jobs(jobs: Sequence[Sequence[Any]]) -> dict[str, Tally]:
    """Tallies by the names of jobs: [parser, seed, first, last] or ["corpus parser", None, paths]."""
    left = [list(job) for job in jobs]
    tallies: dict[str, Tally] = {str(job[0]): Tally() for job in jobs}
    with TemporaryDirectory() as cache:  # not that of the user, and gone afterwards
        while left:
            left = _run_worker(left, tallies, cache)
    return tallies


def _run_worker(jobs: list[list[Any]], tallies: dict[str, Tally], cache: str) -> list[list[Any]]:
    """Jobs that are left when the worker ended, well or not."""
    here = Path(__file__).resolve()
    paths = [str(here.parents[1]), str(here.parents[3]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    environment["SEGKIT_CACHE"] = cache
    worker = subprocess.Popen(
        [sys.executable, "-m", "fuzzing.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps(jobs).encode())
    worker.stdin.close()
    name, number = jobs[0][0], None
    clock = _Clock(_SECONDS_TO_PREPARE)
    for line in _lines(worker, clock):
        if line is None:
            worker.kill()
            break
        kind, _, rest = line.partition(" ")
        if kind == "prepare":
            name, clock.limit_s = rest, _SECONDS_TO_PREPARE
        elif kind == "begin":
            name, text = rest.rsplit(" ", 1)
            number = int(text)
            clock.limit_s = _SECONDS_ASLEEP
        else:
            outcome, _, words = rest.partition(" ")
            tallies[name].note(int(number or 0), outcome, json.loads(words))
            number, clock.limit_s = None, _SECONDS_TO_PREPARE
    status = worker.wait()
    worker.stdout.close()
    if number is None and status == 0:
        return []
    if number is None:
        raise RuntimeError(f"the worker ended with {status} before it read an input of {name}")
    limits_s = {-signal.SIGPROF: SECONDS_AN_INPUT, -signal.SIGKILL: clock.limit_s}
    words = f"took more than {limits_s[status]:.0f} s" if status in limits_s else f"the process died (status {status})"
    tallies[name].note(number, "defect", words)
    return _after(jobs, name, number)


def _after(jobs: list[list[Any]], name: str, number: int) -> list[list[Any]]:
    """The jobs without those that are done, and without the input that ended the worker."""
    position = next(index for index, job in enumerate(jobs) if job[0] == name)
    job, rest = jobs[position], jobs[position + 1 :]
    if job[1] is None:
        raise RuntimeError(f"{job[2][number]} ended the process or took too long")
    return [[name, job[1], number + 1, job[3]], *rest] if number + 1 < job[3] else rest


def _lines(worker: subprocess.Popen[bytes], clock: _Clock) -> Iterable[str | None]:
    """Lines as they come; None, and no more, where none came in the time that the clock gives."""
    assert worker.stdout is not None
    descriptor = worker.stdout.fileno()
    selector = selectors.DefaultSelector()
    selector.register(descriptor, selectors.EVENT_READ)
    buffer = b""
    since = time.monotonic()
    while True:
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            since = time.monotonic()
            yield line.decode()
        if not selector.select(max(0.0, since + clock.limit_s - time.monotonic())):
            yield None
            return
        chunk = os.read(descriptor, 1 << 16)
        if not chunk:
            return
        buffer += chunk
