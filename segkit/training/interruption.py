"""Signals: SIGTERM and Ctrl-C end a training after its state is written, SIGUSR1 writes the state.

Batch systems send SIGUSR1 some time before they end a job (SLURM: `--signal=USR1@120`). The handler only records the
signal; the training loop checks for it between two steps.
"""

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
    """A signal ended the training; its state is on disk."""

    exit_code = 130


@dataclass
class Interruption:
    """Requests by signals: `stop` ends the training, `keep` writes the state.

    If several ranks train (`is_shared`), only `agree` sets them, so that all ranks end after the same step.
    """

    stop: bool = False
    keep: bool = False
    is_shared: bool = False
    before: Mapping[int, Handler] = field(default_factory=dict)
    """Handlers installed earlier, by signal; they are called after the state is written."""
    _received: list[int] = field(default_factory=list)
    _may_cut: bool = False

    @property
    def is_wanted(self) -> bool:
        """Whether the state has to be written now."""
        return self.stop or self.keep

    @property
    def stops_here(self) -> bool:
        """Whether this process got a signal to end, even before the ranks agreed on it."""
        return self.stop or not set(_STOPS).isdisjoint(self._received)

    @property
    def keeps_here(self) -> bool:
        """The same for a signal to write the state."""
        return self.keep or not set(_KEEPS).isdisjoint(self._received)

    def agree(self, *, stop: bool, keep: bool) -> None:
        """Set the requests to any of the ranks."""
        self.stop, self.keep = self.stop or stop, self.keep or keep

    def unless_stopped(self, work: Callable[[], Result]) -> Result | None:
        """The result of `work`, or None if a signal to end came before or during it.

        A validation may take longer than a batch system waits, so it is interrupted at any place.
        """
        try:
            self._may_cut = True
            return None if self.stop else work()
        except KeyboardInterrupt:
            if self.is_shared:
                self.stop = True  # all ranks are interrupted together
            if not self.stop:
                raise
            return None
        finally:
            self._may_cut = False

    def state_is_kept(self, run: Path, step: int) -> None:
        """Act on the signals after everything up to `step` is on disk.

        Raises:
            InterruptedTrainingError: a signal ends the training.
        """
        if self.is_shared and not self.is_wanted:
            return
        received, self._received = self._received, []
        if self.is_shared and not self.stop:
            self._received = [number for number in received if number in _STOPS]  # not agreed on yet
        self.keep = False
        for number in received:
            if number in self.before:
                self.before[number](number, None)
        if self.stop:
            names = " and ".join(dict.fromkeys(signal.Signals(number).name for number in received if number in _STOPS))
            found = f"interrupted by {names or 'another process'} after step {step}; the state is kept"
            raise InterruptedTrainingError(found, where=run, remedy="Continue with --resume")

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """The handler; a second Ctrl-C does not wait until the state is written."""
        is_impatient = number == signal.SIGINT and number in self._received
        self._received.append(number)
        if self.is_shared and not is_impatient:
            return
        if number in _KEEPS:
            self.keep = True
            return
        self.stop = True
        if self._may_cut or is_impatient:
            self._may_cut = False  # once: cleaning up must not be interrupted
            raise KeyboardInterrupt


@contextmanager
def listening(*, is_shared: bool = False) -> Iterator[Interruption]:
    """Handle signals inside the block, in the main thread only.

    Signals that the process ignores, as under `nohup`, stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Interruption(is_shared=is_shared)
        return
    found = {number: signal.getsignal(number) for number in (*_STOPS, *_KEEPS)}
    handled = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}
    default = (signal.SIG_DFL, signal.default_int_handler)
    before = {n: handler for n, handler in handled.items() if callable(handler) and handler not in default}
    signals = Interruption(is_shared=is_shared, before=before)
    for number in handled:
        signal.signal(number, signals.note)
    try:
        yield signals
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM act as Ctrl-C before and after the training loop."""
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
    """Ignore signals in a data-loading worker, which get those to the process group; the training process ends it."""
    for number in (*_STOPS, *_KEEPS):
        signal.signal(number, signal.SIG_IGN)
