"""TensorBoard and MLflow see each step once, also of a run that was cut off, and never end a training."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest

from segkit.errors import RequestError
from segkit.training import trackers
from segkit.training.config import LoopConfig, TrainConfig
from segkit.training.folder import require_usable, settle_settings
from segkit.training.journal import Journal
from segkit.training.trackers import TRACKERS, numbers_in

ROWS: list[dict[str, Any]] = [
    {"step": 1, "lr": 0.1, "loss": 3.0, "seconds": 0.5},
    {"step": 2, "lr": 0.2, "loss": 2.0, "epoch": 1, "score": 0.5, "dice": {"WT": 0.5}, "seconds": 0.9},
    {"step": 3, "lr": 0.1, "loss": 1.5, "seconds": 1.1},
    {"step": 4, "lr": 0.0, "loss": 1.0, "epoch": 2, "score": 0.7, "dice": {"WT": 0.7}, "seconds": 1.6},
]
SEEN = {"loss": [(1, 3), (2, 2), (3, 1.5), (4, 1)], "score": [(2, 0.5), (4, 0.7)], "dice/WT": [(2, 0.5), (4, 0.7)]}


class CutError(Exception):
    """Stands for a power cut."""


def write(run: Path, step: int, rows: list[dict[str, Any]], name: str, *, is_cut: bool = False) -> None:
    """A session from `step` on; cut, it has brought its rows to the tracker but no state to the disk."""
    with suppress(CutError), Journal(run, step, [name]) as journal:
        for row in rows:
            journal.write(row)
        journal.keep()
        if is_cut:
            cut()


def cut() -> None:
    raise CutError


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 0, ROWS[:3], "tensorboard", is_cut=True)
    write(tmp_path, 2, ROWS[2:], "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"lr", *SEEN}
    for name, points in SEEN.items():
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        assert seen == [(step, pytest.approx(value)) for step, value in points]


def test_mlflow_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settle_settings(tmp_path, TrainConfig(), resume=False, allow_changes=False)
    write(tmp_path, 0, ROWS[:3], "mlflow", is_cut=True)
    begun = json.loads((tmp_path / "mlflow.json").read_text())
    assert begun["tracking_uri"].startswith(("file:", "sqlite:"))
    assert str(tmp_path.resolve()) in begun["tracking_uri"]
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=begun["tracking_uri"])
    assert client.get_run(begun["run_id"]).info.status == "KILLED"
    write(tmp_path, 2, ROWS[2:], "mlflow")
    assert json.loads((tmp_path / "mlflow.json").read_text()) == begun
    kept = client.get_run(begun["run_id"])
    assert kept.info.status == "FINISHED"
    assert kept.info.run_name == tmp_path.name
    assert kept.data.params["training.steps"] == "50000"
    assert set(kept.data.metrics) == {"lr", *SEEN}
    for name, points in SEEN.items():
        assert [(m.step, m.value) for m in client.get_metric_history(begun["run_id"], name)] == points


def test_a_new_run_in_the_folder_is_another_run_for_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runs = []
    for _ in range(2):
        write(tmp_path, 0, ROWS[:1], "mlflow")
        runs.append(json.loads((tmp_path / "mlflow.json").read_text())["run_id"])
    assert runs[0] != runs[1]


def test_a_server_that_the_user_names_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = (tmp_path / "server").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    run = tmp_path / "run"
    run.mkdir()
    write(run, 0, ROWS, "mlflow")
    assert json.loads((run / "mlflow.json").read_text())["tracking_uri"] == server
    assert not (run / "mlflow").exists()


def test_a_tracker_that_fails_is_left_out_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing:
        def __init__(self, run: Path, step: int) -> None:
            self.rows = 0

        def add(self, row: Mapping[str, Any]) -> None:
            self.rows += 1
            if self.rows == 2:
                raise OSError("the disk\nis full")

        def keep(self) -> None:
            raise AssertionError("was dropped")

        end = keep

    monkeypatch.setitem(trackers.TRACKERS, "mlflow", ("mlflow", Failing))
    with caplog.at_level(logging.WARNING):
        write(tmp_path, 0, ROWS, "mlflow")
    assert caplog.messages == ["mlflow is left out from here on: the disk is full"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(ROWS)


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r'not installed: tensorboard, mlflow.*pip install "segkit\[trackers\]"'):
        require_usable(tmp_path / "run", ["tensorboard", "mlflow"], resume=False, overwrite=False)
    assert not list(tmp_path.iterdir())


def test_the_setting_knows_every_tracker() -> None:
    annotation = LoopConfig.model_fields["trackers"].annotation
    assert set(get_args(get_args(annotation)[0])) == set(TRACKERS)


def test_numbers_of_a_row_have_flat_names() -> None:
    row = {"step": 3, "loss": 1, "dice": {"WT": 0.5, "ET": float("nan")}, "note": "x", "measures": {"a": {"b": 2.0}}}
    assert dict(numbers_in(row)) == {"loss": 1.0, "dice/WT": 0.5, "measures/a/b": 2.0}
