"""What shows a run on the way takes a small part of its time and never ends it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from segkit.errors import RequestError, TrainingError
from segkit.training import journal as live
from segkit.training.journal import Curves, LiveView


class FakeTime:
    """A clock that moves only where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    found = FakeTime()
    monkeypatch.setattr(live, "time", found)
    return found


def test_showing_takes_a_twentieth_of_the_time(
    clock: FakeTime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []

    def draw(*_: object) -> None:
        drawn.append(clock.now)
        clock.now += 3.0

    monkeypatch.setattr(live, "curves_figure", draw)
    monkeypatch.setattr(live, "_write_page", lambda run, is_live: None)
    view = LiveView(tmp_path, with_page=True)
    while clock.now < 200:
        view.refresh(Curves())
        clock.now += 1.0
    assert drawn == [20, 83, 146]  # at first as if it took a second, then 60 s after what took 3 s
    view.refresh(Curves(), is_last=True)
    assert len(drawn) == 4


def test_the_page_is_written_on_the_way_and_in_the_end_unless_it_is_not_wanted(
    clock: FakeTime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[Path, bool]] = []
    monkeypatch.setattr(live, "curves_figure", lambda path, rows: None)
    monkeypatch.setattr(live, "_write_page", lambda run, is_live: written.append((run, is_live)))
    for with_page in (True, False):
        view = LiveView(tmp_path, with_page=with_page)
        view.refresh(Curves(), is_last=True)
        view.finish()
    assert written == [(tmp_path, True), (tmp_path, False)]


def test_what_cannot_be_shown_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(live, "curves_figure", fail)
    monkeypatch.setattr(live, "_write_page", fail)
    view = LiveView(tmp_path, with_page=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            view.refresh(Curves(), is_last=True)
    told = "cannot be written (no space); the training continues"
    assert caplog.messages == [f"{tmp_path / name} {told}" for name in ("curves.png", "report.html")]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TrainingError("the loss became nan", where="/home/jane/run"), "the loss became nan"),
        (KeyboardInterrupt(), "interrupted"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_why_a_run_stopped_stands_in_its_folder_until_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, reason: str
) -> None:
    written: list[bool] = []
    monkeypatch.setattr(live, "_write_page", lambda run, is_live: written.append(is_live))
    note = tmp_path / "interrupted.json"

    def stop() -> None:
        with LiveView(tmp_path, with_page=True).until_finished():
            raise error

    with pytest.raises(type(error), match=f"^{error}"):
        stop()
    assert json.loads(note.read_text()) == {"reason": reason}
    (tmp_path / "report.html").write_text("stopped")
    with LiveView(tmp_path, with_page=True).until_finished():
        assert not note.exists()
    assert not note.exists()
    assert written == [False, True]  # it has stopped, and it goes on


def test_a_wrong_request_is_no_reason_why_a_run_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bool] = []
    monkeypatch.setattr(live, "_write_page", lambda run, is_live: written.append(is_live))
    note = tmp_path / "interrupted.json"

    def refuse() -> None:
        with LiveView(tmp_path, with_page=True).until_finished():
            raise RequestError("of another network")

    with pytest.raises(RequestError, match="of another network"):
        refuse()
    assert not note.exists()
    note.write_text('{"reason": "interrupted by SIGTERM"}')
    with pytest.raises(RequestError, match="of another network"):
        refuse()
    assert note.read_text() == '{"reason": "interrupted by SIGTERM"}'
    assert written == [False]  # that it has stopped; of a run that never began there is no page
