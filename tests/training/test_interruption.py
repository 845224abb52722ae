"""Signals while a training runs: its state is kept, it ends or goes on, and what it was is exact."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from segkit.checkpoint.tensors import load_state, save_state
from segkit.errors import DataError, TrainingError
from segkit.training.config import LoopConfig, OptimiserConfig
from segkit.training.interruption import InterruptedTrainingError, Interruption, listening
from segkit.training.loop import fit
from segkit.training.task import Score, borrowed

pytestmark = pytest.mark.usefixtures("signals_of_a_new_process")

STEPS = 20
LOOP = LoopConfig(steps=STEPS, steps_per_epoch=5, ema_decay=0.5, accumulate=2)
"""An epoch of five steps, each validated."""


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segkit.training.journal.curves_figure", lambda path, rows: None)


class Line:
    """Fit y = 3 x; every stream of random numbers that a network may draw from decides something."""

    def __init__(self, during_batch: Mapping[int, Callable[[], object]] | None = None) -> None:
        torch.manual_seed(1)
        self.model: nn.Module = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
        self.during_batch = during_batch or {}
        self.during_validation: dict[int, Callable[[], object]] = {}
        self.validations = 0

    def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        while True:
            self.during_batch.get(start, lambda: None)()
            x = torch.randn(4, 1, generator=torch.Generator().manual_seed(start))
            yield {"x": x, "y": 3 * x}
            start += 1

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = (self.model(batch["x"]) - batch["y"]).square().mean()
        return loss

    def validate(self, weights: Mapping[str, Tensor]) -> Score:
        with borrowed(self.model, weights):
            self.validations += 1
            noise = float(torch.rand(()))  # a validation draws too
            self.during_validation.get(self.validations, lambda: None)()
            return Score(-float(weights["3.bias"].abs()), {"measures": {"noise": noise}})

    def save(self, run: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        torch.save({"weights": dict(weights), **facts}, run / "best.pt")


def train(task: Line, run: Path, *, resume: bool = False, loop: LoopConfig = LOOP) -> None:
    run.mkdir(exist_ok=True)
    torch.manual_seed(99 if resume else 7)  # another process has other random numbers
    fit(task, run, loop, OptimiserConfig(lr=0.1), device=torch.device("cpu"), resume=resume)


def rows(run: Path) -> list[dict[str, Any]]:
    """The journal without times."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def assert_same(run: Path, whole: Path) -> None:
    """The two runs ended with the same states, best weights and journals, bit for bit."""
    states = [flat({**load_state(folder), "best": torch.load(folder / "best.pt")}) for folder in (run, whole)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        if not name.endswith(("elapsed_s", "validation_s")):
            other = states[1][name]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name
    assert rows(run) == rows(whole)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every tensor and plain value of a state by its path."""
    if isinstance(value, Mapping):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}/{key}").items()}
    if isinstance(value, list | tuple) and any(isinstance(inner, Tensor | dict) for inner in value):
        return {k: v for place, inner in enumerate(value) for k, v in flat(inner, f"{name}/{place}").items()}
    return {name: value}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing befell."""
    run = tmp_path_factory.mktemp("whole")
    train(Line(), run)
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    return run


def send(number: int) -> Callable[[], None]:
    """What sends a signal to this very process."""
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_finishes_the_step_keeps_the_state_and_resumes_exactly(number: int, whole: Path, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    with pytest.raises(InterruptedTrainingError, match=rf"{signal.Signals(number).name} after step 8.*--resume") as end:
        train(Line({15: send(number)}), tmp_path)  # in the second half of step 8
    assert end.value.exit_code == 130
    assert signal.getsignal(number) is before
    assert load_state(tmp_path)["progress"]["step"] == 8
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 9))
    train(Line(), tmp_path, resume=True)
    assert_same(tmp_path, whole)


def test_a_stop_cuts_a_validation_short_and_it_is_done_again(whole: Path, tmp_path: Path) -> None:
    task = Line()
    task.during_validation = {2: send(signal.SIGTERM)}
    with pytest.raises(InterruptedTrainingError, match="SIGTERM after step 10"):
        train(task, tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 10))  # the tenth has no score yet
    train(Line(), tmp_path, resume=True)
    assert_same(tmp_path, whole)


def test_a_stop_before_a_validation_begins_does_not_wait_for_it(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedTrainingError, match="SIGTERM after step 10"):
        train(Line({19: send(signal.SIGTERM)}), tmp_path)
    resumed = Line()
    train(resumed, tmp_path, resume=True)
    assert resumed.validations == 3
    assert_same(tmp_path, whole)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="the system has no SIGUSR1")
def test_a_warning_keeps_the_state_and_the_training_goes_on(whole: Path, tmp_path: Path) -> None:
    kept: list[int] = []
    look = {14: send(signal.SIGUSR1), 16: lambda: kept.append(load_state(tmp_path)["progress"]["step"])}
    train(Line(look), tmp_path)
    assert kept == [8]
    assert_same(tmp_path, whole)


def test_the_state_is_kept_within_a_long_epoch(tmp_path: Path) -> None:
    long = LOOP.model_copy(update={"steps_per_epoch": STEPS, "checkpoint_minutes": 1e-9})
    seen: list[int] = []
    train(Line({14: lambda: seen.append(load_state(tmp_path)["progress"]["step"])}), tmp_path, loop=long)
    assert seen == [7]


def test_the_state_is_kept_before_a_validation_that_would_make_it_too_old(whole: Path, tmp_path: Path) -> None:
    """What is cut off during that validation, as by a power cut, goes on with the validation."""

    class CutError(Exception):
        pass

    def cut() -> None:
        raise CutError

    task = Line()
    task.during_validation = {2: cut}
    often = LOOP.model_copy(update={"checkpoint_minutes": 1e-9})
    with pytest.raises(CutError):
        train(task, tmp_path, loop=often)
    state = load_state(tmp_path)["progress"]
    assert (state["step"], state["row"]["epoch"]) == (10, 2)
    train(Line(), tmp_path, resume=True)
    assert_same(tmp_path, whole)


def test_a_worker_that_dies_while_the_state_is_written_costs_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises its error wherever the training just is."""
    calls: list[int] = []

    def save(run: Path, state: Mapping[str, Any]) -> None:
        calls.append(state["progress"]["step"])
        if len(calls) == 2:
            raise DataError("the file cannot be written: DataLoader worker (pid 1) is killed") from RuntimeError(
                "DataLoader worker (pid 1) is killed"
            )
        save_state(run, state)

    monkeypatch.setattr("segkit.training.loop.save_state", save)
    told = r"probably because memory ran out \(RuntimeError: DataLoader worker \(pid 1\) is killed\)\. .*--resume"
    with pytest.raises(TrainingError, match=told):
        train(Line(), tmp_path)
    assert calls == [5, 10, 10]
    assert load_state(tmp_path)["progress"]["step"] == 10


def test_a_handler_that_was_there_hears_of_it_once_the_state_is_kept(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    before = signal.signal(
        signal.SIGTERM, lambda number, frame: heard.append((number, load_state(tmp_path)["progress"]["step"]))
    )
    try:
        with pytest.raises(InterruptedTrainingError):
            train(Line({4: send(signal.SIGTERM)}), tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [(signal.SIGTERM, 3)]


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listening() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert not asked.stop
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_does_not_wait() -> None:
    asked = Interruption()
    asked.note(signal.SIGINT)
    assert asked.stop
    with pytest.raises(KeyboardInterrupt):
        asked.note(signal.SIGINT)


def test_another_thread_trains_without_touching_the_handlers(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    task = Line({4: lambda: during.append(signal.getsignal(signal.SIGTERM))})
    during: list[Any] = []
    thread = threading.Thread(target=train, args=(task, tmp_path))
    thread.start()
    thread.join()
    assert during == [before]
    assert len(rows(tmp_path)) == STEPS


def test_work_that_was_not_stopped_gives_its_result_and_its_errors() -> None:
    assert Interruption().unless_stopped(lambda: 3) == 3
    assert Interruption(stop=True).unless_stopped(lambda: 3) is None


def test_an_interrupt_of_somebody_else_is_passed_on() -> None:
    def leave() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Interruption().unless_stopped(leave)
