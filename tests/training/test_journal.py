"""The journal on the disk and the points of its curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from segkit.training import journal
from segkit.training.journal import Curves, Journal


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "lr": 0.1 * step, "loss": float(step), **more}


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_rows_beyond_the_state_and_a_line_that_was_cut_off_are_dropped(tmp_path: Path) -> None:
    with Journal(tmp_path, 0) as first:
        for step in (1, 2, 3, 4):
            first.write(row(step))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')
    with Journal(tmp_path, 2) as second:
        assert steps(tmp_path) == [1, 2]
        second.write(row(3))
    assert steps(tmp_path) == [1, 2, 3]
    assert [point["step"] for point in second.curves.rows()] == [1, 2, 3]


def test_rows_wait_a_little_and_are_on_the_disk_when_they_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal(tmp_path, 0) as open_journal:
        open_journal.write(row(1))
        assert steps(tmp_path) == []
        open_journal.keep()
        assert steps(tmp_path) == [1]
        monkeypatch.setattr(journal, "_FLUSH_S", -1.0)
        open_journal.write(row(2))
        assert steps(tmp_path) == [1, 2]


def test_curves_of_a_long_run_stay_short_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_MOST_POINTS", 4)
    curves = Curves()
    for step in range(1, 42):
        curves.add(row(step, **({"score": 0.5, "dice": {"WT": 0.4}} if step == 20 else {})))
    points = curves.rows()
    assert [(point["step"], point["loss"]) for point in points if "loss" in point] == [
        *((8, 4.5), (16, 12.5), (24, 20.5), (32, 28.5), (40, 36.5)),
        (41, 41.0),
    ]
    assert [point for point in points if "score" in point] == [{"step": 20, "score": 0.5, "dice": {"WT": 0.4}}]
