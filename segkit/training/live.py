"""The pictures of a run while it is under way: they take a small part of its time, and never end it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from segkit.report.figures import curves_figure
from segkit.training.journal import Curves

_log = logging.getLogger(__name__)

_SHARE = 0.05
"""Part of the time that drawing may take."""


class LiveView:
    """Draws `figures/curves.png` again as a run goes on."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._took_s = 0.0
        self._drawn_s = -float("inf")
        self._has_failed = False

    def refresh(self, curves: Curves, *, is_last: bool = False) -> None:
        """Draw what there is, unless the last drawing is too recent for its cost; the last one is always drawn."""
        began = time.monotonic()
        if began - self._drawn_s < self._took_s / _SHARE and not is_last:
            return
        self._attempt(lambda: curves_figure(self.run / "figures" / "curves.png", curves.rows()))
        self._drawn_s = time.monotonic()
        self._took_s = self._drawn_s - began

    def _attempt(self, draw: Callable[[], object]) -> None:
        try:
            draw()
        except Exception as error:  # pictures are no reason to lose a training, whatever befalls them
            if not self._has_failed:
                _log.warning("%s: what shows the run cannot be drawn (%s); the training goes on", self.run, error)
            self._has_failed = True
