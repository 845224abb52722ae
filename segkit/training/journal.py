"""Files written during a run: rows of `metrics.jsonl`, curves and page; and progress in the log."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from segkit.errors import RequestError, SegkitError
from segkit.reading.files import written_atomically
from segkit.report.figures import curves_figure
from segkit.training.trackers import Trackers

_log = logging.getLogger("segkit.training")

METRICS_NAME, PAGE_NAME = "metrics.jsonl", "report.html"
_FLUSH_S = 3.0
"""Longest time until a row is in the file."""
_MOST_POINTS = 1000
"""Points of a curve that a figure can show."""
_DRAWING_SHARE = 0.05
"""Share of the time that drawing may take."""
_EXPECTED_DRAWING_S = 1.0
"""Assumed until drawing was measured."""


class Journal:
    """Rows of `metrics.jsonl`, one JSON object a line, each step once even after a resume; `curves` has its points."""

    def __init__(self, run: Path, step: int, trackers: Sequence[str] = ()) -> None:
        """Keep the rows up to `step`, the last one of the checkpoint (0 for a new run); later ones are removed.

        `trackers` are names from `TRACKERS`, which get the rows as well.

        Raises:
            DataError: the file cannot be written.
        """
        self.path = run / METRICS_NAME
        self.curves = Curves()
        rows = [row for row in _read_rows(self.path) if row["step"] <= step]
        with written_atomically(self.path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for row in rows:
            self.curves.add(row)
        self._file = self.path.open("a", encoding="utf-8")
        self._flushed_s = time.monotonic()
        self._trackers = Trackers(trackers, run, step)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._trackers.each(lambda tracker: tracker.end(is_finished=kind is None))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append the row of a step: `step` and numbers."""
        self.curves.add(row)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._trackers.each(lambda tracker: tracker.add(row))
        if time.monotonic() - self._flushed_s > _FLUSH_S:
            self._file.flush()
            self._flushed_s = time.monotonic()

    def keep(self) -> None:
        """Write every row to the disk; call it before a checkpoint is written."""
        self._trackers.each(lambda tracker: tracker.keep())
        self._file.flush()
        os.fsync(self._file.fileno())


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):  # of an incomplete line
            row = json.loads(line)
            if isinstance(row, dict) and "step" in row:
                yield row


class Curves:
    """At most 2000 points of the loss, each the mean of equally many steps, and all scores."""

    def __init__(self) -> None:
        self._width = 1
        self._means: list[dict[str, Any]] = []
        self._open: list[Mapping[str, Any]] = []
        self._scores: list[Mapping[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the row of one step."""
        if "score" in row:
            self._scores.append({name: value for name, value in row.items() if name not in ("loss", "lr")})
        if "loss" not in row:
            return
        self._open.append(row)
        if len(self._open) == self._width:
            self._means.append(_mean(self._open))
            self._open = []
        if len(self._means) == 2 * _MOST_POINTS:
            self._means = [_mean(self._means[place : place + 2]) for place in range(0, len(self._means), 2)]
            self._width *= 2

    def rows(self) -> list[Mapping[str, Any]]:
        """Rows for `curves_figure`, by step."""
        points = [*self._means, *([_mean(self._open)] if self._open else []), *self._scores]
        return sorted(points, key=lambda row: row["step"])


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    last = {name: rows[-1][name] for name in ("step", "lr") if name in rows[-1]}
    return {**last, "loss": sum(row["loss"] for row in rows) / len(rows)}


class ProgressLines:
    """Log lines with the remaining time, at most one every `interval_s` seconds."""

    def __init__(self, interval_s: float = 10.0) -> None:
        self.interval_s = interval_s
        self.started = time.monotonic()
        self.first: float | None = None  # progress of the first call: a resumed run begins in the middle
        self.last = 0.0

    def show(self, done: float, message: str) -> None:
        """Log the progress, 0 to 1, and a message."""
        now = time.monotonic()
        if self.first is None:
            self.first, self.started = done, now
        if now - self.last < self.interval_s:
            return
        self.last = now
        gained = done - self.first
        left_s = int((now - self.started) / gained * (1 - done)) if gained > 0.005 else None
        left = "?" if left_s is None else f"{left_s // 60}:{left_s % 60:02d}"
        _log.info("%3.0f%%  %s  %s left", 100 * done, message, left)


class LiveView:
    """Updates `figures/curves.png` and `report.html` during a run; errors are logged and do not end the training."""

    def __init__(self, run: Path, *, with_page: bool) -> None:
        self.run, self.with_page = run, with_page
        self._took_s = _EXPECTED_DRAWING_S
        self._drawn_s = time.monotonic()
        self._failed: set[str] = set()

    def refresh(self, curves: Curves, *, is_last: bool = False) -> None:
        """Update figure and page, always at the end, before that only as often as `_DRAWING_SHARE` allows."""
        began = time.monotonic()
        if began - self._drawn_s < self._took_s / _DRAWING_SHARE and not is_last:
            return
        self._attempt("curves.png", lambda: curves_figure(self.run / "figures" / "curves.png", curves.rows()))
        self._show_page(is_live=True)
        self._drawn_s = time.monotonic()
        self._took_s = self._drawn_s - began

    def finish(self) -> None:
        """Update the page for the last time, after the scores are written."""
        self._show_page(is_live=False)

    @contextmanager
    def until_finished(self) -> Iterator[None]:
        """Write and show why the run stopped if the block raises anything but a RequestError."""
        from segkit.report.sources import INTERRUPTED_NAME

        note = self.run / INTERRUPTED_NAME
        before = note.read_bytes() if note.exists() else None
        note.unlink(missing_ok=True)
        if (self.run / PAGE_NAME).exists():  # it may show that the run had stopped
            self._show_page(is_live=True)
        try:
            yield
        except BaseException as error:
            reason = (json.dumps({"reason": _reason(error)}) + "\n").encode()
            if note_text := before if isinstance(error, RequestError) else reason:
                self._attempt(INTERRUPTED_NAME, lambda: note.write_bytes(note_text))
                self.finish()
            raise

    def _show_page(self, *, is_live: bool) -> None:
        if self.with_page:
            self._attempt(PAGE_NAME, lambda: _write_page(self.run, is_live=is_live))

    def _attempt(self, name: str, show: Callable[[], object]) -> None:
        try:
            show()
        except Exception as error:
            if name not in self._failed:
                _log.warning("%s cannot be written (%s); the training continues", self.run / name, error)
            self._failed.add(name)


def _write_page(run: Path, *, is_live: bool) -> None:
    from segkit.report.page import write_page

    write_page([run], run / PAGE_NAME, with_viewer=False, is_live=is_live)


def _reason(error: BaseException) -> str:
    if isinstance(error, SegkitError):
        return error.found
    return "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}".rstrip(": ")
