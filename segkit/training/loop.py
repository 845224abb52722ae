"""The training loop, for every task: read it from top to bottom.

A run is measured by its progress from 0 to 1: steps done, or under a budget the part of the time that is spent. The
learning rate follows progress, so a budgeted run ends with a finished schedule on any machine.

Several processes run this side by side (`segkit.training.distributed`): after each step they agree how to go on, and
the first one writes.
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

from segkit.checkpoint.state import load_state, save_state
from segkit.errors import CheckpointError, RequestError, TrainingError
from segkit.runtime import pick_precision, random_states, seed_everything, set_random_states
from segkit.training.batches import drawn_from, tells_of_a_lost_worker
from segkit.training.config import LoopConfig, OptimiserConfig
from segkit.training.distributed import (
    cut_short_when,
    data_parallel,
    exchanged,
    first_before_others,
    is_first,
    mark,
    rank,
    size,
    summed,
    without_exchange,
)
from segkit.training.interruption import Interruption, listening
from segkit.training.journal import Journal, ProgressLines
from segkit.training.live_report import LiveView
from segkit.training.lr_schedule import Clock
from segkit.training.optim import MovingAverage, build_optimiser, rate_at, restore_optimiser, set_rate
from segkit.training.sharding import Shards, parts_like, require_units, take_parts, whole, whole_for_first
from segkit.training.task import Batch, Score, Task

_log = logging.getLogger(__name__)

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
    may_change: bool = False,
    tell: Callable[[float, str], None] | None = None,
) -> State:
    """Train a task until its steps or its deadline (`time.monotonic` seconds) are spent.

    A resumed run has spent the time of its earlier sessions; with `may_change` it may have other processes.
    `final_validations`: see `Clock`. `tell` is called after each step with the progress (0 to 1) and what there is to
    say; without it, log lines do.
    Writes metrics.jsonl, figures/curves.png, the best weights through `task.save`, and the state: at the end of each
    epoch, every `checkpoint_minutes`, and when a signal asks for it (see `interruption`). A resumed run equals one
    that was never cut off, bit for bit on a CPU and without a deadline.

    Raises:
        InterruptedTrainingError: a signal asked the training to end; its state is kept.
        TrainingError: the loss is not finite any more, or a process that prepared batches was killed.
        CheckpointError: `resume` found no state that can be used.
        RequestError: the state does not fit the network, the optimiser or the processes of the settings.
    """
    trainer, state = _Trainer.build(task, training, optimisation, device), State()
    if resume:
        state = trainer.restore(first_before_others(lambda: load_state(run)), may_change=may_change)
        _log.info("resumed at step %d", state.step)
    began = time.monotonic() - state.elapsed_s
    deadline_s = None if deadline_s is None else deadline_s - state.elapsed_s
    clock = Clock(training.steps, deadline_s, began, final_validations, state.validation_s)
    tell = tell or ProgressLines().tell

    with (
        listening(is_shared=size() > 1) as asked,
        cut_short_when(lambda: asked.stops_here),
        _Writer.open(run, state, training) as writer,
        drawn_from(task.batches(state.step * training.accumulate)) as batches,
    ):
        way = _agree(clock, state, writer, asked)
        while way.done < 1 or state.row:
            if not state.row:
                rate = rate_at(way.done, optimisation)
                mark("loading a batch", state.step)
                loss = trainer.step(batches, rate)
                state.step += 1
                state.row = {"step": state.step, "lr": rate, "loss": loss}
                way = _agree(clock, state, writer, asked)
                tell(min(way.done, 1.0), f"step {state.step}  loss {loss:.3f}")
            epoch, steps_of_next = divmod(state.step, training.steps_per_epoch)
            ends_epoch = steps_of_next == 0 or way.done >= 1
            is_due = way.done >= 1 or (ends_epoch and epoch % training.validate_every == 0 and way.may_validate)
            if ends_epoch:
                state.row["epoch"] = epoch + (steps_of_next > 0)
            if is_due and way.is_late_ahead:
                writer.keep(trainer.snapshot(state))
            if is_due and _validate(trainer, run, state, clock, asked):
                is_due, way = False, _agree(clock, state, writer, asked)
            state.elapsed_s = time.monotonic() - began
            if not is_due:
                writer.enter(state)
            if ends_epoch or asked.is_wanted or way.is_late:
                mark("writing", state.step)
                writer.keep(trainer.snapshot(state))
                asked.state_is_kept(run, state.step)
                writer.draw()
        writer.draw(is_last=True)
        asked.state_is_kept(run, state.step)
    return state


@dataclass(frozen=True)
class _Way:
    """How to go on, the same for all processes: the progress, and what there is time for."""

    done: float
    may_validate: bool
    is_late: bool
    is_late_ahead: bool
    """Whether the state will be late after a validation."""


def _agree(clock: Clock, state: State, writer: _Writer, asked: Interruption) -> _Way:
    """The first process's clock holds for all, and a signal to any of them counts for all."""
    is_late, is_late_ahead = writer.is_late(), writer.is_late(ahead_s=clock.validation_s)
    own = (clock.progress(state.step), clock.may_validate(), is_late, is_late_ahead)
    of_first = own if is_first() else (0.0,) * len(own)
    done, *others, stops, keeps = summed(*of_first, asked.stops_here, asked.keeps_here)
    asked.agree(stop=stops > 0, keep=keeps > 0)
    return _Way(done, *map(bool, others))


def _validate(trainer: _Trainer, run: Path, state: State, clock: Clock, asked: Interruption) -> bool:
    """Score the weights, keep the best, and enter the score in the row; False where a stop was asked for before."""
    began = time.monotonic()
    mark("in validation", state.step)
    weights, randoms = trainer.weights(), random_states(trainer.device)
    score = asked.unless_stopped(lambda: trainer.validate(weights))
    if score is None:
        set_random_states(randoms, trainer.device)
        return False
    if score.value >= state.best:  # of equals the later one, which has seen more
        state.best = score.value
        if is_first():
            trainer.task.save(run, weights, {"step": state.step, "score": score.value})
    clock.note_validation(began)
    state.validation_s = clock.validation_s
    state.row |= {"score": score.value, **score.details}
    _log.info("step %d  validation %.4f  best %.4f", state.step, score.value, state.best)
    return True


@dataclass
class _Writer:
    """What goes to the run folder as a run goes on: rows, state, pictures. Only the first process has a journal."""

    run: Path
    journal: Journal | None
    view: LiveView
    interval_s: float
    kept_s: float = field(default_factory=lambda: time.monotonic())

    @classmethod
    @contextmanager
    def open(cls, run: Path, state: State, training: LoopConfig) -> Iterator[_Writer]:
        """Go on below the row of the last step of `state`; that row is still to come where its validation is."""
        with Journal(run, state.step - bool(state.row), training.trackers) if is_first() else nullcontext() as journal:
            yield cls(run, journal, LiveView(run, with_page=training.live_page), 60 * training.checkpoint_minutes)

    def enter(self, state: State) -> None:
        """Write the row of the last step, to which nothing more will be added."""
        if self.journal is not None:
            self.journal.write({**state.row, "seconds": round(state.elapsed_s, 2)})
        state.row = {}

    def is_late(self, ahead_s: float = 0.0) -> bool:
        """Whether the state on disk is as old as it may become, or will be after what takes `ahead_s`."""
        return time.monotonic() + ahead_s - self.kept_s >= self.interval_s

    def keep(self, snapshot: Mapping[str, Any]) -> None:
        """Bring rows and state to the disk, in this order: no row is ever missing below a state."""
        if self.journal is not None:
            try:
                self._keep(self.journal, snapshot)
            except Exception as error:
                if tells_of_a_lost_worker(error):  # the training ends, but its state is whole
                    self._keep(self.journal, snapshot)
                raise
        self.kept_s = time.monotonic()

    def _keep(self, journal: Journal, snapshot: Mapping[str, Any]) -> None:
        journal.keep()
        save_state(self.run, snapshot)

    def draw(self, *, is_last: bool = False) -> None:
        """Show how far the run is, if there is time for it."""
        if self.journal is not None:
            self.view.refresh(self.journal.curves, is_last=is_last)


@dataclass
class _Trainer:
    """Model, optimiser and average, and the one step that they take together."""

    task: Task
    training: LoopConfig
    optimisation: OptimiserConfig
    device: torch.device
    loss: nn.Module
    optimiser: torch.optim.Optimizer
    average: MovingAverage | None
    precision: torch.dtype
    scaler: torch.amp.GradScaler
    shards: Shards | None = None

    @classmethod
    def build(cls, task: Task, training: LoopConfig, optimisation: OptimiserConfig, device: torch.device) -> _Trainer:
        precision = pick_precision(training.precision, device)
        shards = None
        if training.sharding == "full":
            require_units(task.model, precision)
            shards = Shards(task, device)
        else:
            task.model.to(device)
        loss = data_parallel(task) if shards is None else shards.loss
        if rank() > 0:
            seed_everything(training.seed + rank())  # its dropout is another than that of the first
        return cls(
            task,
            training,
            optimisation,
            device,
            loss,
            optimiser=build_optimiser(task.model, optimisation),
            average=MovingAverage(task.model, training.ema_decay) if training.ema_decay else None,
            precision=precision,
            scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
            shards=shards,
        )

    def step(self, batches: Iterator[Batch], rate: float) -> float:
        """One optimisation step over `accumulate` batches; the mean loss."""
        set_rate(self.optimiser, rate)
        self.task.model.train()
        total = 0.0
        for number in range(1, self.training.accumulate + 1):
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in next(batches).items()}
            mark("computing")
            is_full = self.precision == torch.float32
            with without_exchange(self.loss, is_wanted=number < self.training.accumulate):
                with nullcontext() if is_full else torch.autocast(self.device.type, self.precision):
                    loss = self.loss(batch) / self.training.accumulate
                torch.autograd.backward(self.scaler.scale(loss))
            total += float(loss.detach()) / size()
        (total,) = summed(total)
        mark("updating the weights")
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
        weights = self.average.average if self.average else self.task.model.state_dict()
        whole_weights: Mapping[str, torch.Tensor] = weights if self.shards is None else whole(weights)
        return whole_weights

    def validate(self, weights: Mapping[str, torch.Tensor]) -> Score:
        """The task's score of whole weights."""
        with nullcontext() if self.shards is None else self.shards.lending(self.task, weights):
            return self.task.validate(weights)

    def snapshot(self, state: State) -> dict[str, Any]:
        """Everything that an exact resume needs."""
        tensors = {
            "model": self.task.model.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimiser": self.optimiser.state_dict(),
        }
        return {
            "format": _FORMAT,
            "progress": vars(state).copy(),
            **(tensors if self.shards is None else whole_for_first(tensors)),
            "scaler": self.scaler.state_dict(),
            "random": exchanged(random_states(self.device)),
        }

    def restore(self, snapshot: Mapping[str, Any], *, may_change: bool) -> State:
        """Take over a snapshot; with `may_change` also that of more or fewer processes.

        Raises:
            CheckpointError: another version of segkit wrote it.
            RequestError: it is of another network, of an optimiser that moved other weights, or of more or fewer
                processes.
        """
        if snapshot.get("format") != _FORMAT:
            raise CheckpointError(
                "the state of the run was written by another version of segkit",
                remedy="Go on with that version, or begin a new run with --weights and this run folder",
            )
        streams = snapshot["random"]
        if len(streams) != size() and not may_change:
            raise RequestError(
                f"the run was trained by {len(streams)} processes, now there are {size()}",
                remedy="Start as many, or go on with another batch by --allow-changes",
            )
        try:
            if self.shards is None:
                self.task.model.load_state_dict(snapshot["model"])
            else:
                take_parts(self.task.model.state_dict(), snapshot["model"])
        except RuntimeError as error:
            raise RequestError(
                f"the state of the run is of another network ({str(error).splitlines()[-1].strip()})",
                remedy="Resume with the network that the run began with",
            ) from error
        if self.average and snapshot["average"] is not None:
            self.average.load_state_dict(snapshot["average"], take=None if self.shards is None else take_parts)
        moments = snapshot["optimiser"]
        if self.shards is not None:
            listed = (parameter for group in self.optimiser.param_groups for parameter in group["params"])
            moments = {**moments, "state": parts_like(moments["state"], dict(enumerate(listed)))}
        restore_optimiser(self.optimiser, moments)
        self.scaler.load_state_dict(snapshot["scaler"])
        if rank() < len(streams):
            set_random_states(streams[rank()], self.device)
        return State(**snapshot["progress"])
