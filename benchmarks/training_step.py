"""Where the time of a training step goes: phases and operators of real steps of `segkit train`.

    python benchmarks/training_step.py DATA [--steps 30] [--preset cpu] [--config FILE] [--set training.precision=fp32]
    python benchmarks/training_step.py DATA --other ../before       # steps a minute of another checkout beside this one

Trains for a few steps in a temporary folder. The first third is not counted: memory is taken and patches are ahead
then. With `--other` both checkouts train in turn, each in a process of its own, with `--preset` alone. Operators are
those of the main thread: with OMP_NUM_THREADS=1 it computes all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

import segkit
from segkit.runtime import available_cores

HERE = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--other", type=Path, help="another checkout")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.other is not None:
            print_two(arguments, Path(folder))
            return
        settings = dict(setting.split("=", 1) for setting in arguments.settings)
        print_phases(arguments, _short(arguments.steps, Path(folder)) | settings, Path(folder) / "run")


def _short(steps: int, folder: Path) -> dict[str, str]:
    return {
        **{"training.steps": str(steps), "training.steps_per_epoch": str(steps), "training.validation_cases": "1"},
        **{"training.live_page": "false", "postprocessing": "none", "data.cache": str(folder / "cache")},
    }


def print_two(arguments: argparse.Namespace, folder: Path, rounds: int = 3) -> None:
    """Steps a minute of both checkouts, by the times in their metrics.jsonl."""
    rates: dict[str, list[float]] = {"this": [], "other": []}
    for number in range(rounds):
        for name, root in (("this", HERE), ("other", arguments.other.resolve())):
            run = folder / f"{name}-{number}"
            command = [sys.executable, "-m", "segkit", "train", str(arguments.data), "-o", str(run)]
            command += ["--preset", arguments.preset]
            for key, value in _short(arguments.steps, folder / name).items():
                command += ["--set", f"{key}={value}"]
            environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
            output = subprocess.run(
                command, env={**environment, "PYTHONPATH": str(root)}, capture_output=True, text=True
            )
            if output.returncode:
                raise SystemExit(output.stderr)
            rates[name].append(_steps_a_minute(run / "metrics.jsonl"))
    for name, found in rates.items():
        print(f"{name:6} steps a minute: {', '.join(f'{rate:.1f}' for rate in found)}")


def _steps_a_minute(path: Path) -> float:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:-1]
    rows = rows[len(rows) // 3 :]
    return 60 * (rows[-1]["step"] - rows[0]["step"]) / (rows[-1]["seconds"] - rows[0]["seconds"])


class Phases:
    """Seconds of each phase of the steps that are counted."""

    def __init__(self, first: int) -> None:
        self.first, self.count = first, 0
        self.seconds: Counter[str] = Counter()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts as the phase `name`."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            if self.count > self.first and threading.current_thread() is threading.main_thread():
                self.seconds[name] += time.perf_counter() - started
            return result

        return wrapped

    def step_of(self, step: Callable[..., float]) -> Callable[..., float]:
        """The step of a trainer, with its parts timed."""
        timed_step = self.timed("step", step)

        def wrapped(trainer: Any, batches: Iterator[Any], lr: float) -> float:
            self.count += 1
            if self.count == 1:
                trainer.loss = self.timed("forward and loss", trainer.loss)
                trainer.optimiser.step = self.timed("optimiser", trainer.optimiser.step)
            fetch = self.timed("waiting for patches", lambda: next(batches))
            return float(timed_step(trainer, iter(fetch, None), lr))

        return wrapped


def print_phases(arguments: argparse.Namespace, settings: dict[str, str], run: Path) -> None:
    """Milliseconds and shares of the phases of a step, and the operators that take the most time of three steps."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from segkit.training import loop
    from segkit.training.optim import MovingAverage

    phases = Phases(arguments.steps // 3)
    profiler = profile(activities=[ProfilerActivity.CPU])
    counted_step = phases.step_of(loop.Trainer.step)

    def step(trainer: Any, batches: Iterator[Any], lr: float) -> float:
        if phases.count == arguments.steps - 3:
            phases.first = sys.maxsize  # the profiler slows the last steps
            profiler.start()
        loss = counted_step(trainer, batches, lr)
        if phases.count == arguments.steps:
            profiler.stop()
        return loss

    patches = (
        mock.patch.object(loop.Trainer, "step", step),
        mock.patch.object(torch.autograd, "backward", phases.timed("backward", torch.autograd.backward)),
        mock.patch.object(torch.nn.utils, "clip_grad_norm_", phases.timed("clipping", torch.nn.utils.clip_grad_norm_)),
        mock.patch.object(MovingAverage, "update", phases.timed("moving average", MovingAverage.update)),
    )
    for patch in patches:
        patch.start()
    values = {name: yaml.safe_load(value) for name, value in settings.items()}
    segkit.train(arguments.data, run, preset=arguments.preset, config=arguments.config, **values)
    count = arguments.steps - 3 - arguments.steps // 3
    total = phases.seconds.pop("step")
    print(f"{60 * count / total:.1f} steps a minute, {1000 * total / count:.0f} ms a step, {available_cores()} cores\n")
    _print_shares({name: 1000 * seconds / count for name, seconds in phases.seconds.items()}, 1000 * total / count)
    averages = profiler.key_averages()
    shares = {event.key: event.self_cpu_time_total / 3000 for event in averages}
    largest = sorted(shares.items(), key=lambda item: -item[1])[:14]
    print()
    _print_shares(dict(largest), sum(shares.values()))


def _print_shares(ms: dict[str, float], total_ms: float) -> None:
    print("| part | ms a step | share |\n|---|---:|---:|")
    for name, value in ms.items():
        print(f"| {name} | {value:.0f} | {value / total_ms:.0%} |")


if __name__ == "__main__":
    main()
