"""What others may ask of a training while it runs: that it keeps its state, and that it ends.

SIGTERM and Ctrl-C end it once its state is on disk. SIGUSR1 keeps the state and goes on: batch systems send it some
time before they end a job (SLURM: `--signal=USR1@120`). A signal only leaves a note here; the loop looks at it between
two steps.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TypeVar

from segkit.errors import SegkitError

_STOPS = (signal.SIGTERM, signal.SIGINT)
_KEEPS = tuple(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name))  # Windows has none

Result = TypeVar("Result")
Handler = Callable[[int, FrameType | None], object]


class InterruptedTrainingError(SegkitError):
    """A training was asked to end; its state is on disk."""

    exit_code = 130


@dataclass
class Interruption:
    """What was asked for since the training began.

    `stop` says that it is to end, `keep` that its state is to be written. Where the training is shared between
    processes, they stay as they are until `agree` tells what any of them was asked for: all have to end after the same
    step.
    """

    stop: bool = False
    keep: bool = False
    is_shared: bool = False
    before: Mapping[int, Handler] = field(default_factory=dict)
    """Handlers that others had installed, by signal; they are called once the state is kept."""
    _received: list[int] = field(default_factory=list)
    _may_cut: bool = False

    @property
    def is_wanted(self) -> bool:
        """Whether the state is to be written now."""
        return self.stop or self.keep

    @property
    def stops_here(self) -> bool:
        """Whether this process was asked to end, agreed upon or not."""
        return self.stop or any(number in _STOPS for number in self._received)

    @property
    def keeps_here(self) -> bool:
        """Whether this process was asked to write the state, agreed upon or not."""
        return self.keep or any(number in _KEEPS for number in self._received)

    def agree(self, *, stop: bool, keep: bool) -> None:
        """Take what any of the processes was asked for."""
        self.stop, self.keep = self.stop or stop, self.keep or keep

    def unless_stopped(self, work: Callable[[], Result]) -> Result | None:
        """What `work` gives; None where the training was asked to end before it was done, which cuts it short.

        For what leaves nothing half done that matters: a validation may take longer than a batch system waits.
        """
        try:
            self._may_cut = True
            return None if self.stop else work()
        except KeyboardInterrupt:
            if self.is_shared:
                self.stop = True  # all processes cut their part short together
            if not self.stop:
                raise
            return None
        finally:
            self._may_cut = False

    def state_is_kept(self, run: Path, step: int) -> None:
        """Tell that everything up to `step` is on disk.

        Raises:
            InterruptedTrainingError: the training was asked to end.
        """
        if self.is_shared and not self.is_wanted:
            return
        received, self._received = self._received, []
        if self.is_shared and not self.stop:
            self._received = [number for number in received if number in _STOPS]  # not agreed upon yet
        self.keep = False
        for number in received:
            if number in self.before:
                self.before[number](number, None)
        if self.stop:
            names = " and ".join(dict.fromkeys(signal.Signals(number).name for number in received if number in _STOPS))
            found = f"interrupted by {names or 'another process'} after step {step}; the state is kept"
            raise InterruptedTrainingError(found, where=run, remedy="Go on with --resume")

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Take note of a signal; a second Ctrl-C does not wait for the state to be written."""
        is_impatient = number == signal.SIGINT and number in self._received
        self._received.append(number)
        if self.is_shared and not is_impatient:
            return
        if number in _KEEPS:
            self.keep = True
            return
        self.stop = True
        if self._may_cut or is_impatient:
            self._may_cut = False  # once: what was begun must be able to clean up
            raise KeyboardInterrupt


@contextmanager
def listening(*, is_shared: bool = False) -> Iterator[Interruption]:
    """Note signals instead of dying of them, in the main thread of a process; elsewhere nothing is ever asked for.

    `is_shared` says that other processes take part, see `Interruption`.

    A signal that the process was told to ignore, as `nohup` does, stays ignored. The handlers that there were are put
    back in the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Interruption(is_shared=is_shared)
        return
    found = {number: signal.getsignal(number) for number in (*_STOPS, *_KEEPS)}
    heard = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}
    own = (signal.SIG_DFL, signal.default_int_handler)
    asked = Interruption(
        is_shared=is_shared,
        before={n: handler for n, handler in heard.items() if callable(handler) and handler not in own},
    )
    for number in heard:
        signal.signal(number, asked.note)
    try:
        yield asked
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does before and after the training itself, where nothing needs to be kept."""
    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ignore_signals(_worker: int = 0) -> None:
    """Let a process that prepares batches leave signals to the one that trains, which a whole group is often sent.

    It ends when the one that trains is done, or gone.
    """
    for number in (*_STOPS, *_KEEPS):
        signal.signal(number, signal.SIG_IGN)
