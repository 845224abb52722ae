"""What a run writes as it goes: `metrics.jsonl`, curves, and progress on a terminal or in a log."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

_log = logging.getLogger("segkit.training")


class Journal:
    """Rows of `metrics.jsonl`, one JSON object a line, each epoch once even after a resume."""

    def __init__(self, run: Path) -> None:
        self.path = run / "metrics.jsonl"
        self.rows: list[dict[str, Any]] = []

    def restart_at(self, step: int) -> None:
        """Keep the rows up to `step`; what a cut-off run wrote beyond its last checkpoint is done again."""
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            rows = (_row(line) for line in lines)
            self.rows = [row for row in rows if row is not None and row["step"] <= step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it holds `step` and numbers."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None  # a line cut off by a kill
    return row if isinstance(row, dict) and "step" in row else None


class ProgressLines:
    """Plain lines with the remaining time, at most one every `interval_s` seconds."""

    def __init__(self, interval_s: float = 10.0) -> None:
        self.interval_s = interval_s
        self.started = time.monotonic()
        self.first: float | None = None
        self.last = 0.0

    def tell(self, done: float, message: str) -> None:
        """Say where the run is: `done` in 0 to 1."""
        now = time.monotonic()
        if self.first is None:
            self.first, self.started = done, now  # a resumed run begins in the middle
        if now - self.last < self.interval_s:
            return
        self.last = now
        gained = done - self.first
        left = (now - self.started) / gained * (1 - done) if gained > 0.005 else float("nan")
        _log.info("%3.0f%%  %s  %s left", 100 * done, message, _minutes(left))


def _minutes(seconds: float) -> str:
    if seconds != seconds:
        return "?"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
