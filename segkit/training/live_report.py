"""What shows a run while it is under way: it takes a small part of its time, and never ends it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from segkit.errors import RequestError, SegkitError
from segkit.report.figures import curves_figure
from segkit.training.journal import Curves

_log = logging.getLogger(__name__)

PAGE_NAME = "report.html"
_SHARE = 0.05
"""Part of the time that drawing may take."""
_EXPECTED_S = 1.0
"""What drawing takes, as long as nobody has measured it."""


class LiveView:
    """Draws `figures/curves.png` and writes `report.html` again as a run goes on."""

    def __init__(self, run: Path, *, with_page: bool) -> None:
        self.run = run
        self.with_page = with_page
        self._took_s = _EXPECTED_S
        self._drawn_s = time.monotonic()
        self._failed: set[str] = set()

    def refresh(self, curves: Curves, *, is_last: bool = False) -> None:
        """Show what there is, unless the last time is too recent for what it took; the end is always shown."""
        began = time.monotonic()
        if began - self._drawn_s < self._took_s / _SHARE and not is_last:
            return
        self._attempt("curves.png", lambda: curves_figure(self.run / "figures" / "curves.png", curves.rows()))
        if self.with_page:
            self._attempt(PAGE_NAME, lambda: _write_page(self.run, is_live=True))
        self._drawn_s = time.monotonic()
        self._took_s = self._drawn_s - began

    def finish(self) -> None:
        """Show how the run ended, once its scores are written."""
        if self.with_page:
            self._attempt(PAGE_NAME, lambda: _write_page(self.run, is_live=False))

    @contextmanager
    def until_finished(self) -> Iterator[None]:
        """Show that the run stopped, and why, if what is done within ends by an error or a signal.

        A request that turns out to be wrong is no reason: the run has stopped as before.
        """
        from segkit.report.sources import INTERRUPTED_NAME

        note = self.run / INTERRUPTED_NAME
        before = note.read_bytes() if note.exists() else None
        note.unlink(missing_ok=True)
        if self.with_page and (self.run / PAGE_NAME).exists():  # it may say that the run has stopped
            self._attempt(PAGE_NAME, lambda: _write_page(self.run, is_live=True))
        try:
            yield
        except BaseException as error:
            reason = (json.dumps({"reason": _reason(error)}) + "\n").encode()
            if told := before if isinstance(error, RequestError) else reason:
                self._attempt(INTERRUPTED_NAME, lambda: note.write_bytes(told))
                self.finish()
            raise

    def _attempt(self, name: str, show: Callable[[], object]) -> None:
        try:
            show()
        except Exception as error:  # pictures are no reason to lose a training, whatever befalls them
            if name not in self._failed:
                _log.warning("%s cannot be written (%s); the training goes on", self.run / name, error)
            self._failed.add(name)


def _write_page(run: Path, *, is_live: bool) -> None:
    from segkit.report.page import write_page

    write_page([run], run / PAGE_NAME, with_viewer=False, is_live=is_live)


def _reason(error: BaseException) -> str:
    if isinstance(error, SegkitError):
        return error.found
    return "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}".rstrip(": ")
