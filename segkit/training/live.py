"""What shows a run while it is under way: it takes a small part of its time, and never ends it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

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
            self._attempt(PAGE_NAME, lambda: _write_page(self.run))
        self._drawn_s = time.monotonic()
        self._took_s = self._drawn_s - began

    def finish(self) -> None:
        """Show how the run ended, once its scores are written."""
        if self.with_page:
            self._attempt(PAGE_NAME, lambda: _write_page(self.run))

    def _attempt(self, name: str, show: Callable[[], object]) -> None:
        try:
            show()
        except Exception as error:  # pictures are no reason to lose a training, whatever befalls them
            if name not in self._failed:
                _log.warning("%s cannot be written (%s); the training goes on", self.run / name, error)
            self._failed.add(name)


def _write_page(run: Path) -> None:
    from segkit.report.page.page import write_page

    write_page([run], run / PAGE_NAME, with_viewer=False)
