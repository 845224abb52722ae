"""How much memory and how many minutes a training run will take, from a plan and the time of a step and a window."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from segkit.inference.sliding_window import plan_windows
from segkit.labels import LabelScheme
from segkit.preparing.fingerprint import Fingerprint, take_fingerprint
from segkit.preparing.plan import CandidateNetwork, Plan, plan_training, prepared_shapes
from segkit.reading.case import Cohort
from segkit.training.config import TrainConfig
from segkit.training.segmentation_plan import planning_request


@dataclass(frozen=True)
class Estimate:
    """Expected peak memory of a run in GiB, its minutes, and the plan behind them."""

    memory_gb: float
    minutes: float
    plan: Plan


def estimate_training(
    cohort: Cohort, scheme: LabelScheme, config: TrainConfig, memory_gb: float, device: torch.device | None = None
) -> Estimate:
    """Plan a run on a cohort, time one training step and one inference window, and estimate how long the run takes.

    Raises:
        DataError: no case can be read.
        RequestError: see `plan_training`.
    """
    fingerprint, request = take_fingerprint(cohort), planning_request(config)
    plan = plan_training(fingerprint, scheme, request, memory_gb, device)
    network = replace(request, arguments=plan.arguments).network(fingerprint, scheme)
    device = device or torch.device("cpu")
    step_s = seconds_of(_trial_step(network, plan.patch_size, plan.batch_size, device))
    window_s = seconds_of(_trial_window(network, plan.patch_size, device))
    return Estimate(plan.memory_gb, estimate_minutes(fingerprint, plan, config, step_s, window_s), plan)


def estimate_minutes(
    fingerprint: Fingerprint,
    plan: Plan,
    config: TrainConfig,
    seconds_per_step: float,
    seconds_per_window: float,
) -> float:
    """Minutes of a run: preparing all cases, the steps and the validations; with a budget, the budget."""
    training = config.training
    if training.budget_minutes is not None:
        return training.budget_minutes
    sizes = prepared_shapes(fingerprint, plan.preprocessing)
    windows = float(np.mean([plan_windows(size, plan.patch_size, config.overlap).count for size in sizes]))
    epochs = -(-training.steps // training.steps_per_epoch)
    validations = -(-epochs // training.validate_every)
    fold = -(-fingerprint.cases // config.data.folds)
    seconds = (
        fingerprint.cases * fingerprint.seconds_per_case
        + training.steps * training.accumulate * seconds_per_step
        + validations * min(fold, training.validation_cases or fold) * windows * seconds_per_window
    )
    return seconds / 60


def _trial_step(
    network: CandidateNetwork, patch: tuple[int, ...], batch_size: int, device: torch.device
) -> Callable[[], None]:
    """One training step on noise, ready to be timed: forward, loss, backward, Adam."""
    model, loss = network.build().to(device).train(), network.loss_function().to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)
    image = torch.randn(batch_size, network.channels, *patch, device=device)
    labels = torch.zeros(batch_size, *patch, dtype=torch.uint8, device=device)

    def step() -> None:
        torch.autograd.backward(loss(model(image), labels))
        optimiser.step()
        optimiser.zero_grad()
        _wait_for(device)

    return step


def _trial_window(network: CandidateNetwork, patch: tuple[int, ...], device: torch.device) -> Callable[[], None]:
    """One inference window of noise, ready to be timed."""
    model = network.build().to(device).eval()
    image = torch.randn(1, network.channels, *patch, device=device)

    def window() -> None:
        with torch.inference_mode():
            model(image)
        _wait_for(device)

    return window


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], repeats: int = 2) -> float:
    """Seconds that `work` takes, the best of `repeats` after one call that warms up."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
