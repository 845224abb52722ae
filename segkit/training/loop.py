"""The training loop, for every task: read it from top to bottom.

A run is measured by its progress from 0 to 1: steps done, or under a budget the part of the time that is spent. The
learning rate follows progress, so a budgeted run ends with a finished schedule on any machine.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segkit.checkpoint import load_state, save_state
from segkit.errors import TrainingError
from segkit.report.figures import curves_figure
from segkit.runtime import pick_precision
from segkit.training.config import LoopConfig, OptimiserConfig
from segkit.training.journal import Journal, ProgressLines
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


@dataclass
class State:
    """What a resumed run needs besides the tensors of model, average and optimiser."""

    step: int = 0
    epoch: int = 0
    best: float = -math.inf
    elapsed_s: float = 0.0


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
    Writes metrics.jsonl, figures/curves.png, last.ckpt each epoch, and the best weights through `task.save`.

    Raises:
        TrainingError: the loss is not finite any more.
        CheckpointError: `resume` found no usable state.
        RequestError: `optimisation` gives the encoder a rate that the task, or the resumed run, has no place for.
    """
    trainer = _Trainer.build(task, training, optimisation, device)
    journal, state = Journal(run), State()
    if resume:
        state = trainer.restore(load_state(run))
        _log.info("resumed at step %d", state.step)
    journal.restart_at(state.step)
    batches = task.batches(state.step * training.accumulate)
    began = time.monotonic() - state.elapsed_s
    deadline_s = None if deadline_s is None else deadline_s - state.elapsed_s
    clock, tell = Clock(training.steps, deadline_s, began, final_validations), tell or ProgressLines().tell

    is_validated = True
    while (done := clock.progress(state.step)) < 1 or not is_validated:
        losses: list[float] = []
        row: dict[str, Any] = {}
        while done < 1 and len(losses) < training.steps_per_epoch:
            row["lr"] = rate_at(done, optimisation)
            losses.append(trainer.step(batches, row["lr"]))
            state.step += 1
            done = clock.progress(state.step)
            tell(min(done, 1.0), f"step {state.step}  loss {losses[-1]:.3f}")
        state.epoch += 1
        row |= {"step": state.step, "epoch": state.epoch} | ({"loss": sum(losses) / len(losses)} if losses else {})
        is_validated = done >= 1 or (state.epoch % training.validate_every == 0 and clock.may_validate())
        if is_validated:
            row |= _validate(trainer, run, state, clock)
        state.elapsed_s = time.monotonic() - began
        journal.write({**row, "seconds": round(state.elapsed_s, 1)})
        save_state(run, trainer.snapshot(state))
        curves_figure(run / "figures" / "curves.png", journal.rows)
    return state


def _validate(trainer: _Trainer, run: Path, state: State, clock: Clock) -> dict[str, Any]:
    began = time.monotonic()
    weights = trainer.weights()
    score = trainer.task.validate(weights)
    if score.value >= state.best:  # of equals the later one, which has seen more
        state.best = score.value
        trainer.task.save(run, weights, {"step": state.step, "score": score.value})
    clock.note_validation(began)
    _log.info("step %d  validation %.4f  best %.4f", state.step, score.value, state.best)
    return {"score": score.value, **score.details}


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
            "progress": vars(state).copy(),
            "model": self.task.model.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

    def restore(self, snapshot: Mapping[str, Any]) -> State:
        """Take over a snapshot."""
        self.task.model.load_state_dict(snapshot["model"])
        if self.average and snapshot["average"] is not None:
            self.average.load_state_dict(snapshot["average"])
        restore_optimiser(self.optimiser, snapshot["optimiser"])
        self.scaler.load_state_dict(snapshot["scaler"])
        torch.set_rng_state(snapshot["random"].cpu())
        if self.device.type == "cuda" and snapshot["random_cuda"]:
            torch.cuda.set_rng_state_all([state.cpu() for state in snapshot["random_cuda"]])
        return State(**snapshot["progress"])
