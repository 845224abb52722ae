"""The training loop on a task small enough to compute by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from segkit.checkpoint.tensors import load_state
from segkit.errors import TrainingError
from segkit.training.config import OptimiserConfig, TrainingConfig
from segkit.training.distributed import Ranks
from segkit.training.loop import State, Trainer, fit
from segkit.training.optim import Clock
from segkit.training.task import Score


class LineTask:
    """Fit y = 3 x with one weight; batch n is the same in every run."""

    def __init__(self, poison_at: int | None = None) -> None:
        torch.manual_seed(1)
        self.model: nn.Module = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1))
        self.poison_at = poison_at
        self.saved: list[dict[str, Any]] = []

    def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        while True:
            x = torch.randn(4, 1, generator=torch.Generator().manual_seed(start))
            yield {"x": x * (float("nan") if start == self.poison_at else 1.0), "y": 3 * x}
            start += 1

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return (self.model(batch["x"]) - batch["y"]).square().mean()

    def validate(self, weights: Mapping[str, Tensor]) -> Score:
        return Score(-abs(float(weights["0.weight"]) - 3), {"weight": float(weights["0.weight"])})

    def save(self, run: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.saved.append({**facts, "weight": float(weights["0.weight"])})


def _fit(task: LineTask, run: Path, steps: int, **arguments: Any) -> None:
    (run / "figures").mkdir(parents=True, exist_ok=True)
    asked = arguments.pop("training", {})
    training = TrainingConfig(**{"steps": steps, "steps_per_epoch": 5, "ema_decay": 0.5, **asked})
    fit(task, run, training, OptimiserConfig(lr=0.1), device=torch.device("cpu"), **arguments)


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_learns_and_keeps_the_best(tmp_path: Path) -> None:
    task = LineTask()
    _fit(task, tmp_path, 60)
    assert abs(task.saved[-1]["weight"] - 3) < 0.4
    scores = [saved["score"] for saved in task.saved]
    assert scores == sorted(scores)
    rows = _rows(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert [row["step"] for row in rows if "score" in row] == list(range(5, 61, 5))
    assert [row["epoch"] for row in rows if "epoch" in row] == list(range(1, 13))
    assert rows[0]["loss"] > rows[-1]["loss"]
    assert rows[-1]["lr"] < 0.001 < rows[19]["lr"] <= 0.1
    assert (tmp_path / "figures" / "curves.png").stat().st_size > 1000


class CutError(Exception):
    """Stands for a power cut."""


def test_resumed_run_equals_one_that_was_never_cut(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    torch.manual_seed(7)
    _fit(LineTask(), whole, 30)
    expected = _weights(whole)

    class CutTask(LineTask):
        def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
            for number, batch in enumerate(super().batches(start)):
                if number == 18:
                    raise CutError
                yield batch

    torch.manual_seed(7)
    with pytest.raises(CutError):
        _fit(CutTask(), cut, 30)
    torch.manual_seed(99)  # another process has other random numbers
    _fit(LineTask(), cut, 30, resume=True)
    assert all(torch.equal(expected[name], value) for name, value in _weights(cut).items())
    assert _timeless(cut) == _timeless(whole)


def test_a_run_that_scaled_no_losses_can_be_resumed_with_scaled_ones(tmp_path: Path) -> None:
    _fit(LineTask(), tmp_path, 4)
    trainer = Trainer(LineTask(), TrainingConfig(), OptimiserConfig(), torch.device("cpu"), Ranks())
    trainer.set_precision("fp16")
    snapshot = load_state(tmp_path)
    assert not snapshot["scaler"]
    assert trainer.restore(snapshot, allow_changes=False)[0].step == 4


def _timeless(run: Path) -> list[dict[str, Any]]:
    """The journal without what differs from run to run."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in _rows(run)]


def _weights(run: Path) -> dict[str, Tensor]:
    from segkit.checkpoint.tensors import load_state

    state = load_state(run)
    return {**state["model"], **{f"average.{name}": value for name, value in state["average"]["average"].items()}}


def test_accumulation_equals_a_larger_batch(tmp_path: Path) -> None:
    class Plain(LineTask):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(1, 1))

    class Doubled(Plain):
        def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
            single = super().batches(2 * start)
            while True:
                one, two = next(single), next(single)
                yield {name: torch.cat((one[name], two[name])) for name in one}

    accumulated, doubled = Plain(), Doubled()
    _fit(accumulated, tmp_path / "a", 10, training={"accumulate": 2})
    _fit(doubled, tmp_path / "b", 10)
    for one, two in zip(accumulated.model.parameters(), doubled.model.parameters(), strict=True):
        torch.testing.assert_close(one, two)


LONG_EPOCHS = {"steps_per_epoch": 40}
"""Every epoch draws its curves, which takes longer than the steps of these tests."""


class FakeTime:
    """A clock that moves on by a tenth of a second whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 0.1
        return self.now


def test_budget_ends_in_time_with_a_finished_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeTime()
    for module in ("optim", "loop"):
        monkeypatch.setattr(f"segkit.training.{module}.time", clock)
    _fit(LineTask(), tmp_path, 10**9, deadline_s=60.0, training=LONG_EPOCHS)
    assert 50 < clock.now < 60
    rows = _rows(tmp_path)
    assert rows[-1]["score"] is not None
    rates = [row["lr"] for row in rows if "lr" in row]
    assert rates[-1] < 0.01 * max(rates)


def test_a_resumed_budget_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut at about half of 60 s, the rest of the time is left, and the rate never rises again."""
    clock = FakeTime()
    for module in ("optim", "loop"):
        monkeypatch.setattr(f"segkit.training.{module}.time", clock)

    class CutTask(LineTask):
        def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
            for batch in super().batches(start):
                if clock.now > 30:
                    raise CutError
                yield batch

    with pytest.raises(CutError):
        _fit(CutTask(), tmp_path, 10**9, deadline_s=60.0, training=LONG_EPOCHS)
    clock.now = 1000.0
    _fit(LineTask(), tmp_path, 10**9, deadline_s=1060.0, resume=True, training=LONG_EPOCHS)
    assert 1020 < clock.now < 1045
    rates = [row["lr"] for row in _rows(tmp_path)]
    falling = rates[rates.index(max(rates)) :]
    assert len(falling) > 0.9 * len(rates)
    assert falling == sorted(falling, reverse=True)


def test_the_last_weights_are_validated_whatever_the_interval(tmp_path: Path) -> None:
    task = LineTask()
    _fit(task, tmp_path, 12, training={"validate_every": 4})
    assert "score" in _rows(tmp_path)[-1]
    assert len(task.saved) >= 1


def test_a_budget_that_is_already_spent_still_gives_a_model(tmp_path: Path) -> None:
    task = LineTask()
    _fit(task, tmp_path, 10**9, deadline_s=time.monotonic() - 60)
    assert [row["step"] for row in _rows(tmp_path)] == [1]
    assert len(task.saved) == 1


def test_progress_by_steps_and_by_time() -> None:
    assert Clock(steps=40).progress(10) == 0.25
    now = time.monotonic()
    timed = Clock(steps=1, deadline_s=now + 105, started_s=now - 100, validation_s=0)  # 7 s are kept for the end
    assert timed.progress(1) == pytest.approx(100 / 198, abs=0.005)
    kept_back = Clock(1, deadline_s=now + 105, started_s=now - 100, final_s=25, validation_s=10)
    assert kept_back.progress(1) == pytest.approx(100 / 158, abs=0.005)  # and 1.5 validations of 10 s, and 25 s
    slow = Clock(1, deadline_s=now + 105, started_s=now - 100, validation_s=1000)  # but at most 0.3 of the budget
    assert slow.progress(1) == pytest.approx(100 / (205 * 0.7 - 7), abs=0.005)


def test_a_loss_that_is_not_finite_stops_the_run_with_advice(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss became nan\. Lower optimiser\.lr"):
        _fit(LineTask(poison_at=7), tmp_path, 20)
    assert [row["step"] for row in _rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segkit.training.loop.to_device", lambda batch, _: batch)


def _trainer(task: LineTask, device: str) -> Trainer:
    trainer = Trainer(task, TrainingConfig(accumulate=2), OptimiserConfig(lr=0.1), torch.device("cpu"), Ranks())
    trainer.device = torch.device(device)
    return trainer


def test_on_a_gpu_the_loss_is_read_a_step_late(as_on_gpu: None) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        task = LineTask()
        trainer, batches = _trainer(task, device), task.batches(0)
        losses[device] = [trainer.step(batches, 0.1) for _ in range(4)]
    first, second, third, _ = losses["cpu"]
    assert losses["cuda"] == [first, first, second, third]


def test_weights_of_a_late_loss_that_is_not_finite_are_never_saved(as_on_gpu: None) -> None:
    task = LineTask(poison_at=3)
    trainer, batches = _trainer(task, "cuda"), task.batches(0)
    trainer.step(batches, 0.1)
    trainer.weights()
    trainer.step(batches, 0.1)
    with pytest.raises(TrainingError, match="loss became nan"):
        trainer.weights()
    with pytest.raises(TrainingError, match="loss became nan"):
        trainer.snapshot(State(), None)
    with pytest.raises(TrainingError, match="loss became nan"):
        trainer.step(batches, 0.1)
