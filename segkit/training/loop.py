"""The training loop, for every task: read it from top to bottom.

A run is measured by its progress from 0 to 1: steps done, or under a budget the part of the time that is spent. The
learning rate follows progress, so a budgeted run ends with a finished schedule on any machine.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segkit.checkpoint import load_state, save_state
from segkit.errors import CheckpointError, RequestError, TrainingError
from segkit.runtime import pick_precision, random_states, set_random_states
from segkit.training.batches import drawn_from, tells_of_a_lost_worker
from segkit.training.config import LoopConfig, OptimiserConfig
from segkit.training.interruption import Interruption, listening
from segkit.training.journal import Journal, ProgressLines
from segkit.training.live import LiveView
from segkit.training.optim import MovingAverage, build_optimiser, rate_at, restore_optimiser, set_rate
from segkit.training.task import Batch, Task

_log = logging.getLogger(__name__)

_VALIDATION_SHARE = 0.1
"""Part of a budget that validations may take."""
_LARGEST_RESERVE = 0.3
"""Largest part of a budget kept for what comes after the last step."""
_FINISHING_S = 5.0
"""Time kept for the last checkpoint and the pictures."""
_ALMOST_DONE = 0.999
_FORMAT = 2
"""Of the state; 1 had epochs instead of steps in its journal."""


@dataclass
class State:
    """What a resumed run needs besides the tensors of model, average and optimiser, and the random numbers.

    `row` is the journal's row of the last step, where the validation that belongs to it is still to come.
    """

    step: int = 0
    best: float = -math.inf
    elapsed_s: float = 0.0
    validation_s: float = 0.0
    row: dict[str, Any] = field(default_factory=dict)


@dataclass
class Clock:
    """Progress of a run, 0 to 1: by steps, or by time where there is a deadline (`time.monotonic` seconds).

    `final_validations` is how long the scoring after the last step takes, in validations of the loop.
    """

    steps: int
    deadline_s: float | None = None
    started_s: float = field(default_factory=lambda: time.monotonic())
    final_validations: float = 1.0
    validation_s: float = 0.0
    validated_s: float = field(default_factory=lambda: time.monotonic())

    def progress(self, step: int) -> float:
        """Part of the training that is done; the time for the last validations is not training.

        A budget that is spent before the first step still gets that one, so that there is a model.
        """
        if self.deadline_s is None:
            return step / self.steps
        span = self.deadline_s - self.started_s
        kept = min((1.5 + self.final_validations) * self.validation_s, _LARGEST_RESERVE * span) + _FINISHING_S
        end = max(self.deadline_s - kept, self.started_s + 1e-6)
        spent = (time.monotonic() - self.started_s) / (end - self.started_s)
        return min(spent, _ALMOST_DONE) if step == 0 else spent

    def may_validate(self) -> bool:
        """Whether another validation keeps within its part of a budget."""
        pause = time.monotonic() - self.validated_s
        return self.deadline_s is None or pause >= self.validation_s / _VALIDATION_SHARE

    def note_validation(self, began_s: float) -> None:
        """Remember how long a validation took that began at `began_s`."""
        self.validated_s = time.monotonic()
        self.validation_s = self.validated_s - began_s


def fit(
    task: Task,
    run: Path,
    training: LoopConfig,
    optimisation: OptimiserConfig,
    *,
    device: torch.device,
    deadline_s: float | None = None,
    final_validations: float = 1.0,
    resume: bool = False,
    tell: Callable[[float, str], None] | None = None,
) -> State:
    """Train a task until its steps or its deadline (`time.monotonic` seconds) are spent.

    A resumed run has spent the time of its earlier sessions. `final_validations`: see `Clock`. `tell` is called after
    each step with the progress (0 to 1) and what there is to say; without it, log lines do.
    Writes metrics.jsonl, figures/curves.png, the best weights through `task.save`, and the state: at the end of each
    epoch, every `checkpoint_minutes`, and when a signal asks for it (see `interruption`). A resumed run equals one
    that was never cut off, bit for bit on a CPU and without a deadline.

    Raises:
        InterruptedTrainingError: a signal asked the training to end; its state is kept.
        TrainingError: the loss is not finite any more, or a process that prepared batches was killed.
        CheckpointError: `resume` found no state that can be used.
        RequestError: the state does not fit the network or the optimiser of the settings.
    """
    trainer, state = _Trainer.build(task, training, optimisation, device), State()
    if resume:
        state = trainer.restore(load_state(run))
        _log.info("resumed at step %d", state.step)
    began = time.monotonic() - state.elapsed_s
    deadline_s = None if deadline_s is None else deadline_s - state.elapsed_s
    clock = Clock(training.steps, deadline_s, began, final_validations, state.validation_s)
    tell = tell or ProgressLines().tell

    with (
        listening() as asked,
        _Writer.open(run, state, training) as writer,
        drawn_from(task.batches(state.step * training.accumulate)) as batches,
    ):
        done = clock.progress(state.step)
        while done < 1 or state.row:
            if not state.row:
                rate = rate_at(done, optimisation)
                loss = trainer.step(batches, rate)
                state.step += 1
                state.row = {"step": state.step, "lr": rate, "loss": loss}
                done = clock.progress(state.step)
                tell(min(done, 1.0), f"step {state.step}  loss {loss:.3f}")
            epoch, steps_of_next = divmod(state.step, training.steps_per_epoch)
            ends_epoch = steps_of_next == 0 or done >= 1
            is_due = done >= 1 or (ends_epoch and epoch % training.validate_every == 0 and clock.may_validate())
            if ends_epoch:
                state.row["epoch"] = epoch + (steps_of_next > 0)
            if is_due and writer.is_late(ahead_s=clock.validation_s):
                writer.keep(trainer.snapshot(state))
            if is_due and _validate(trainer, run, state, clock, asked):
                is_due, done = False, clock.progress(state.step)
            state.elapsed_s = time.monotonic() - began
            if not is_due:
                writer.enter(state)
            if ends_epoch or asked.is_wanted or writer.is_late():
                writer.keep(trainer.snapshot(state))
                asked.state_is_kept(run, state.step)
                writer.draw()
        writer.draw(is_last=True)
        asked.state_is_kept(run, state.step)
    return state


def _validate(trainer: _Trainer, run: Path, state: State, clock: Clock, asked: Interruption) -> bool:
    """Score the weights, keep the best, and enter the score in the row; False where a stop was asked for before."""
    began = time.monotonic()
    weights, randoms = trainer.weights(), random_states(trainer.device)
    score = asked.unless_stopped(lambda: trainer.task.validate(weights))
    if score is None:
        set_random_states(randoms, trainer.device)
        return False
    if score.value >= state.best:  # of equals the later one, which has seen more
        state.best = score.value
        trainer.task.save(run, weights, {"step": state.step, "score": score.value})
    clock.note_validation(began)
    state.validation_s = clock.validation_s
    state.row |= {"score": score.value, **score.details}
    _log.info("step %d  validation %.4f  best %.4f", state.step, score.value, state.best)
    return True


@dataclass
class _Writer:
    """What goes to the run folder as a run goes on: its rows, its state, its pictures."""

    run: Path
    journal: Journal
    view: LiveView
    interval_s: float
    kept_s: float = field(default_factory=lambda: time.monotonic())

    @classmethod
    @contextmanager
    def open(cls, run: Path, state: State, training: LoopConfig) -> Iterator[_Writer]:
        """Go on below the row of the last step of `state`; that row is still to come where its validation is."""
        with Journal(run, state.step - bool(state.row), training.trackers) as journal:
            yield cls(run, journal, LiveView(run, with_page=training.live_page), 60 * training.checkpoint_minutes)

    def enter(self, state: State) -> None:
        """Write the row of the last step, to which nothing more will be added."""
        self.journal.write({**state.row, "seconds": round(state.elapsed_s, 2)})
        state.row = {}

    def is_late(self, ahead_s: float = 0.0) -> bool:
        """Whether the state on disk is as old as it may become, or will be after what takes `ahead_s`."""
        return time.monotonic() + ahead_s - self.kept_s >= self.interval_s

    def keep(self, snapshot: Mapping[str, Any]) -> None:
        """Bring rows and state to the disk, in this order: no row is ever missing below a state."""
        try:
            self._keep(snapshot)
        except Exception as error:
            if tells_of_a_lost_worker(error):  # the training ends, but its state is whole
                self._keep(snapshot)
            raise
        self.kept_s = time.monotonic()

    def _keep(self, snapshot: Mapping[str, Any]) -> None:
        self.journal.keep()
        save_state(self.run, snapshot)

    def draw(self, *, is_last: bool = False) -> None:
        """Show how far the run is, if there is time for it."""
        self.view.refresh(self.journal.curves, is_last=is_last)


@dataclass
class _Trainer:
    """Model, optimiser and average, and the one step that they take together."""

    task: Task
    training: LoopConfig
    optimisation: OptimiserConfig
    device: torch.device
    optimiser: torch.optim.Optimizer
    average: MovingAverage | None
    precision: torch.dtype
    scaler: torch.amp.GradScaler

    @classmethod
    def build(cls, task: Task, training: LoopConfig, optimisation: OptimiserConfig, device: torch.device) -> _Trainer:
        task.model.to(device)
        precision = pick_precision(training.precision, device)
        return cls(
            task,
            training,
            optimisation,
            device,
            optimiser=build_optimiser(task.model, optimisation),
            average=MovingAverage(task.model, training.ema_decay) if training.ema_decay else None,
            precision=precision,
            scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        )

    def step(self, batches: Iterator[Batch], rate: float) -> float:
        """One optimisation step over `accumulate` batches; the mean loss."""
        set_rate(self.optimiser, rate)
        self.task.model.train()
        total = 0.0
        for _ in range(self.training.accumulate):
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in next(batches).items()}
            is_full = self.precision == torch.float32
            with nullcontext() if is_full else torch.autocast(self.device.type, self.precision):
                loss = self.task.loss(batch) / self.training.accumulate
            torch.autograd.backward(self.scaler.scale(loss))
            total += float(loss.detach())
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss became {total}",
                remedy="Lower optimiser.lr or set training.precision=fp32, then --resume from the last checkpoint",
            )
        if self.optimisation.gradient_clip is not None:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.task.model.parameters(), self.optimisation.gradient_clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.task.model)
        return total

    def weights(self) -> Mapping[str, torch.Tensor]:
        """The weights to validate and keep: the moving average where there is one."""
        return self.average.average if self.average else self.task.model.state_dict()

    def snapshot(self, state: State) -> dict[str, Any]:
        """Everything that an exact resume needs."""
        return {
            "format": _FORMAT,
            "progress": vars(state).copy(),
            "model": self.task.model.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_states(self.device),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> State:
        """Take over a snapshot.

        Raises:
            CheckpointError: another version of segkit wrote it.
            RequestError: it is of another network, or of an optimiser that moved other weights.
        """
        if snapshot.get("format") != _FORMAT:
            raise CheckpointError(
                "the state of the run was written by another version of segkit",
                remedy="Go on with that version, or begin a new run with --weights and this run folder",
            )
        try:
            self.task.model.load_state_dict(snapshot["model"])
        except RuntimeError as error:
            raise RequestError(
                f"the state of the run is of another network ({str(error).splitlines()[-1].strip()})",
                remedy="Resume with the network that the run began with",
            ) from error
        if self.average and snapshot["average"] is not None:
            self.average.load_state_dict(snapshot["average"])
        restore_optimiser(self.optimiser, snapshot["optimiser"])
        self.scaler.load_state_dict(snapshot["scaler"])
        set_random_states(snapshot["random"], self.device)
        return State(**snapshot["progress"])
