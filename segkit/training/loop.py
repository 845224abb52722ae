"""The training loop of every task: `fit`, then its phases in the order in which they run.

The progress of a run, 0 to 1, is the share of its steps or, with a budget, of its time. The learning rate follows the
progress (`optim.get_lr`), so the schedule is complete at the end of a budget on any machine. If several ranks train,
they agree on a `Status` after each step, and rank 0 writes.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segkit.checkpoint.tensors import load_state, save_state
from segkit.errors import CheckpointError, RequestError, TrainingError
from segkit.models.kernels.convolutions import SmallMapsInFloat32
from segkit.runtime import Precision, autocast, pick_precision, random_states, seed_everything, set_random_states
from segkit.training import compiling, sharding
from segkit.training.batches import drawn_from, is_lost_worker, to_device
from segkit.training.config import LoopConfig, OptimiserConfig
from segkit.training.distributed import Ranks
from segkit.training.interruption import Interruption, listening
from segkit.training.journal import Journal, LiveView, ProgressLines
from segkit.training.optim import Clock, MovingAverage, build_optimiser, get_lr, restore_optimiser, set_lr
from segkit.training.task import Batch, Score, Task

_log = logging.getLogger(__name__)

_FORMAT = 3
"""Of the checkpoint; 1 had epochs instead of steps in its journal, 2 is that of version 0.1 with its own patches."""
_OTHER_PATCHES = (
    "the run was started by segkit 0.1, whose random patches and views differ: it continues with those of this "
    "version, so its weights will not be those of an uninterrupted run"
)

Row = dict[str, Any]
"""A line of metrics.jsonl: step, lr, loss; at the end of an epoch also its number, and scores after a validation."""


@dataclass
class State:
    """State of a run besides tensors and random numbers."""

    step: int = 0
    best: float = -math.inf
    elapsed_s: float = 0.0
    validation_s: float = 0.0


@dataclass(frozen=True)
class Status:
    """Progress and what is due, the same in all ranks; `is_checkpoint_due_first`: before a validation."""

    progress: float
    may_validate: bool
    is_checkpoint_due: bool
    is_checkpoint_due_first: bool


def fit(
    task: Task,
    run: Path,
    training: LoopConfig,
    optimisation: OptimiserConfig,
    *,
    device: torch.device,
    ranks: Ranks | None = None,
    deadline_s: float | None = None,
    resume: bool = False,
    allow_changes: bool = False,
    on_progress: Callable[[float, str], None] | None = None,
) -> State:
    """Train a task for its number of steps or until its deadline (`time.monotonic` seconds).

    The time of earlier sessions counts for a resumed run; with `allow_changes` the number of ranks may differ.
    `on_progress` gets the progress (0 to 1) and a message after each step; without it
    log lines are written.
    Writes metrics.jsonl, figures/curves.png, the best weights by `task.save`, and a checkpoint: at the end of each
    epoch, every `checkpoint_minutes`, and on signals (see `interruption`). On a CPU and without a deadline a resumed
    run is bit for bit equal to an uninterrupted one.

    Raises:
        InterruptedTrainingError: a signal ended the training; its state is written.
        TrainingError: the loss is not finite, or a process that prepared batches was killed.
        CheckpointError: there is no usable checkpoint to resume from.
        RequestError: the checkpoint does not fit the network, the optimiser or the ranks of the settings.
    """
    ranks = ranks or Ranks()
    trainer = Trainer(task, training, optimisation, device, ranks)
    state, row = State(), None
    if resume:
        state, row = trainer.restore(ranks.first_before_others(lambda: load_state(run)), allow_changes=allow_changes)
        _log.info("resumed at step %d", state.step)
    began_s = time.monotonic() - state.elapsed_s
    deadline_s = None if deadline_s is None else deadline_s - state.elapsed_s
    clock = Clock(training.steps, deadline_s, began_s, state.validation_s)
    rows_kept = state.step if row is None else state.step - 1
    with (
        listening(is_shared=ranks.size > 1) as signals,
        ranks.stopping_when(lambda: signals.stops_here),
        Journal(run, rows_kept, training.trackers) if ranks.is_first else nullcontext() as journal,
        drawn_from(task.batches(state.step * training.accumulate)) as batches,
    ):
        loop = Loop(run, trainer, state, clock, signals, journal, on_progress or ProgressLines().show)
        if row is not None:  # the last session ended before the validation of its last step
            loop.finish_step(row)
        while loop.status.progress < 1:
            row = loop.train_step(batches)
            loop.finish_step(row)
        loop.draw(is_last=True)
        signals.state_is_kept(run, state.step)
    return state


@dataclass
class Loop:
    """A run in progress; only rank 0 has a journal."""

    run: Path
    trainer: Trainer
    state: State
    clock: Clock
    signals: Interruption
    journal: Journal | None
    on_progress: Callable[[float, str], None]

    def __post_init__(self) -> None:
        self.training, self.ranks = self.trainer.training, self.trainer.ranks
        self.view = LiveView(self.run, with_page=self.training.live_page)
        self.checkpoint_s = time.monotonic()
        self.status = self.agree()

    def agree(self) -> Status:
        """The status by the clock of rank 0; a signal to any rank applies to all."""
        interval_s, age_s = 60 * self.training.checkpoint_minutes, time.monotonic() - self.checkpoint_s
        own = (
            self.clock.progress(self.state.step),
            self.clock.may_validate(),
            age_s >= interval_s,
            age_s + self.clock.validation_s >= interval_s,
        )
        of_first = own if self.ranks.is_first else (0.0,) * len(own)
        progress, *others, stop, keep = self.ranks.sum(*of_first, self.signals.stops_here, self.signals.keeps_here)
        self.signals.agree(stop=stop > 0, keep=keep > 0)
        return Status(progress, *map(bool, others))

    def train_step(self, batches: Iterator[Batch]) -> Row:
        """One optimisation step and its row."""
        lr = get_lr(self.status.progress, self.trainer.optimisation)
        self.ranks.mark("loading a batch", self.state.step)
        loss = self.trainer.step(batches, lr)
        self.state.step += 1
        self.status = self.agree()
        self.on_progress(min(self.status.progress, 1.0), f"step {self.state.step}  loss {loss:.3f}")
        row = {"step": self.state.step, "lr": lr, "loss": loss}
        if self.ends_epoch:
            row["epoch"] = math.ceil(self.state.step / self.training.steps_per_epoch)
        return row

    @property
    def ends_epoch(self) -> bool:
        """Whether the last step ended an epoch; the last step of a run always does."""
        return self.status.progress >= 1 or self.state.step % self.training.steps_per_epoch == 0

    def finish_step(self, row: Row) -> None:
        """Validate, write the row and the checkpoint; a session may resume with this after its last step."""
        self.validate_if_due(row)
        if self.journal is not None:
            self.journal.write({**row, "seconds": round(time.monotonic() - self.clock.started_s, 2)})
        self.checkpoint_if_due()

    def validate_if_due(self, row: Row) -> None:
        """Score the weights, keep the best, and add the score to the row.

        Raises:
            InterruptedTrainingError: a signal interrupted the validation; a resumed run starts with it.
        """
        epoch = self.state.step // self.training.steps_per_epoch
        is_due = self.ends_epoch and epoch % self.training.validate_every == 0 and self.status.may_validate
        if not is_due and self.status.progress < 1:
            return
        if self.status.is_checkpoint_due_first:
            self.checkpoint(row)
        began_s, device = time.monotonic(), self.trainer.device
        self.ranks.mark("in validation", self.state.step)
        weights, randoms = self.trainer.weights(), random_states(device)
        score = self.signals.unless_stopped(lambda: self.trainer.validate(weights))
        if score is None:
            set_random_states(randoms, device)
            self.checkpoint(row)
            self.signals.state_is_kept(self.run, self.state.step)
            return
        if score.value >= self.state.best:  # the later of equal ones, which had more training
            self.state.best = score.value
            if self.ranks.is_first:
                facts = {"step": self.state.step, "score": score.value, "precision": self.trainer.precision}
                self.trainer.task.save(self.run, weights, facts)
        self.clock.note_validation(began_s, score.final_s)
        self.state.validation_s = self.clock.validation_s
        row.update({"score": score.value, **score.details})
        _log.info("step %d  validation %.4f  best %.4f", self.state.step, score.value, self.state.best)
        self.status = self.agree()

    def checkpoint_if_due(self) -> None:
        """Write a checkpoint at the end of an epoch, after `checkpoint_minutes`, or on a signal.

        Raises:
            InterruptedTrainingError: a signal ends the training.
        """
        if self.ends_epoch or self.signals.is_wanted or self.status.is_checkpoint_due:
            self.checkpoint()
            self.signals.state_is_kept(self.run, self.state.step)
            self.draw()

    def checkpoint(self, unfinished: Row | None = None) -> None:
        """Write the journal, then the checkpoint, so that all rows up to a checkpoint exist.

        `unfinished` is the row of the last step if its validation is still due.
        """
        self.ranks.mark("writing", self.state.step)
        self.state.elapsed_s = time.monotonic() - self.clock.started_s
        snapshot = self.trainer.snapshot(self.state, unfinished)

        def write(journal: Journal) -> None:
            journal.keep()
            save_state(self.run, snapshot)

        if self.journal is not None:
            try:
                write(self.journal)
            except Exception as error:
                if is_lost_worker(error):  # the training ends, but its state is complete
                    write(self.journal)
                raise
        self.checkpoint_s = time.monotonic()

    def draw(self, *, is_last: bool = False) -> None:
        """Update curves and page, if there is time."""
        if self.journal is not None:
            self.view.refresh(self.journal.curves, is_last=is_last)


class Trainer:
    """Model, optimiser and moving average, and their common step."""

    def __init__(
        self, task: Task, training: LoopConfig, optimisation: OptimiserConfig, device: torch.device, ranks: Ranks
    ) -> None:
        self.task, self.training, self.optimisation = task, training, optimisation
        self.device, self.ranks = device, ranks
        chosen: Precision = ranks.from_first(lambda: pick_precision(training.precision, device))
        if chosen == "fp16" and training.precision == "auto" and training.sharding == "full":
            chosen = "fp32"  # scaled losses are not supported there
        self.set_precision(chosen)
        self.shards: sharding.Shards | None = None
        if training.sharding == "full":
            sharding.require_units(task.model, self.precision, ranks)
            self.shards = sharding.Shards(task, device, ranks, chosen)
        else:
            task.model.to(device)
        self.loss = sharding.data_parallel(task, ranks) if self.shards is None else self.shards.loss
        if self.shards is None:
            compiling.compile_network(task.model, training, device)
        self.late: list[Tensor] = []  # of the last step on a GPU, read at the next one: the host does not wait for it
        if not ranks.is_first:
            seed_everything(training.seed + ranks.rank)  # ranks differ in dropout
        self.optimiser = build_optimiser(task.model, optimisation)
        self.average = MovingAverage(task.model, training.ema_decay) if training.ema_decay else None

    def set_precision(self, name: Precision) -> None:
        """Compute the forward pass in this precision; fp16 needs scaled losses."""
        self.precision = name
        self.autocast = partial(autocast, self.device, name)
        self.guarding = SmallMapsInFloat32() if name == "bf16" and self.device.type == "cpu" else nullcontext()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=name == "fp16")

    def step(self, batches: Iterator[Batch], lr: float) -> float:
        """One optimisation step on `accumulate` batches; returns the mean loss over batches and ranks.

        On a GPU, after the first step, it is the loss of the step before.

        Raises:
            TrainingError: the loss is not finite.
        """
        torch.backends.cudnn.benchmark = True  # patches have one size, for which cuDNN times its kernels once
        set_lr(self.optimiser, lr)
        self.task.model.train()
        count = self.training.accumulate
        losses: list[Tensor] = []
        while len(losses) < count:
            batch = to_device(next(batches), self.device)
            self.ranks.mark("computing")
            with self.guarding, sharding.accumulating(self.loss, is_last=len(losses) == count - 1):
                losses.append(compiling.or_uncompiled(self.task.model, partial(self._backward, batch, count)))
        if self.device.type == "cuda":
            losses, self.late = self.late or losses, losses
        total = self._mean_loss(losses)
        self.ranks.mark("updating the weights")
        if self.optimisation.gradient_clip is not None:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.task.model.parameters(), self.optimisation.gradient_clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.task.model)
        return total

    def _backward(self, batch: Batch, count: int) -> Tensor:
        """Add the gradients of one of `count` batches; returns its part of the loss."""
        with self.autocast():
            loss: Tensor = self.loss(batch) / count
        torch.autograd.backward(self.scaler.scale(loss))
        return loss.detach()

    def _mean_loss(self, losses: Iterable[Tensor]) -> float:
        (total,) = self.ranks.sum(sum(float(loss) / self.ranks.size for loss in losses))
        if not math.isfinite(total):
            remedy = "Lower optimiser.lr or set training.precision=fp32, then --resume from the last checkpoint"
            raise TrainingError(f"the loss became {total}", remedy=remedy)
        return total

    def weights(self) -> Any:
        """The whole weights to validate and save, tensors by name: the moving average if there is one."""
        self._mean_loss(self.late)  # raises if it is not finite
        return sharding.whole(self.average.average if self.average else self.task.model.state_dict())

    def validate(self, weights: Mapping[str, Tensor]) -> Score:
        """The task's score of whole weights."""
        lending = nullcontext() if self.shards is None else self.shards.lending(self.task, weights)
        with self.autocast(), compiling.uncompiled(self.task.model), lending:
            return self.task.validate(weights)

    def snapshot(self, state: State, unfinished: Row | None) -> dict[str, Any]:
        """Everything that an exact resume needs; `unfinished` is the row of a step whose validation is still due."""
        self._mean_loss(self.late)  # raises if it is not finite
        tensors = {
            "model": self.task.model.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimiser": self.optimiser.state_dict(),
        }
        return {
            "format": _FORMAT,
            "progress": {**vars(state), "row": unfinished or {}},
            **sharding.whole_for_first(tensors, self.ranks),
            "precision": self.precision,
            "scaler": self.scaler.state_dict(),
            "random": self.ranks.exchange(random_states(self.device)),
        }

    def restore(self, snapshot: Mapping[str, Any], *, allow_changes: bool) -> tuple[State, Row | None]:
        """Load a snapshot: state and unfinished row; with `allow_changes` the number of ranks may differ.

        Raises:
            CheckpointError: another version of segkit wrote it.
            RequestError: network, groups of the optimiser, or number of ranks differ.
        """
        if snapshot.get("format") == _FORMAT - 1:
            _log.warning("%s", _OTHER_PATCHES)
        elif snapshot.get("format") != _FORMAT:
            remedy = "Continue with that version, or start a new run with --weights and this run folder"
            raise CheckpointError("the state of the run was written by another version of segkit", remedy=remedy)
        streams = snapshot["random"]
        if len(streams) != self.ranks.size and not allow_changes:
            found = f"the run was trained by {len(streams)} processes, now there are {self.ranks.size}"
            raise RequestError(found, remedy="Start as many, or add --allow-changes to train with another batch")
        try:
            sharding.take_parts(self.task.model.state_dict(), snapshot["model"])
        except RuntimeError as error:
            found = f"the checkpoint does not match the network ({error})"
            raise RequestError(found, remedy="Resume with the network that the run began with") from error
        if self.average and snapshot["average"] is not None:
            self.average.load_state_dict(snapshot["average"])
        moments = snapshot["optimiser"]
        listed = (parameter for group in self.optimiser.param_groups for parameter in group["params"])
        state = sharding.parts_like(moments["state"], dict(enumerate(listed)))
        restore_optimiser(self.optimiser, {**moments, "state": state})
        if self.training.precision == "auto":  # version 0.1, which does not name it, chose fp32 on every CPU
            before = "fp32" if self.device.type == "cpu" else self.precision
            self.set_precision(snapshot.get("precision", before))
        if snapshot["scaler"]:  # empty if the losses were not scaled
            self.scaler.load_state_dict(snapshot["scaler"])
        if self.ranks.rank < len(streams):
            set_random_states(streams[self.ranks.rank], self.device)
        progress = dict(snapshot["progress"])
        row = progress.pop("row", None) or None
        return State(**progress), row
