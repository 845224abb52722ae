"""Processes that are really killed: the run that is left behind goes on as if nothing had happened, bit for bit.

As a script this file is such a process: `python test_killed.py DATA RUN TASK` trains a run of a task in sessions that
all come to a bad end.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from segkit.checkpoint.tensors import load_state
from segkit.config import build_config
from segkit.errors import SegkitError
from segkit.inpainting.config import InpaintingConfig
from segkit.inpainting.run import InpaintingKind
from segkit.pretraining.methods import PretrainConfig
from segkit.pretraining.run import PretrainingKind
from segkit.training import journal as live
from segkit.training.config import TrainConfig
from segkit.training.folder import read_config
from segkit.training.run import train
from segkit.training.segmentation import SegmentationKind
from segkit.training.task import TrainingRequest

Tell = Callable[[float, str], None]
TASKS = ("segmentation", "pretraining", "inpainting")
STEPS = 30
LOOP = {"precision": "fp32", "steps": STEPS, "steps_per_epoch": 5, "validate_every": 2, "ema_decay": 0.9}
NETWORK = {"family": "revmbunet", "size": "tiny", "arguments": {"widths": [4, 8]}}
SETTINGS: dict[str, dict[str, Any]] = {
    "segmentation": {
        "planning": {"patch_limit": 16, "batch_limit": 1},
        "training": {"foreground_fraction": 0.5},
        "augmentation": {"modality_dropout": 0.3},
        "postprocessing": "none",
    },
    "pretraining": {
        "method": "graph-matching",
        "dims": 2,
        "views": {"size": 8},
        "images": {"neighbours": 2},
        "graph_matching": {"nodes": 4, "edges": 2},
        "batch_size": 4,
        "validation_groups": 2,
    },
    "inpainting": {
        "modalities": ["t1n"],
        "dims": 2,
        "patches": {"size": 24},
        "holes": {"diameter_range": [4, 8], "margin_voxels": 1, "min_voxels": 4},
        "batch_size": 1,
        "validation_holes": 2,
        "adversarial": {"weight": 0.1, "width": 2},
    },
}


def go(task: str, data: Path, run: Path, *, on_progress: Tell, workers: int = 0) -> None:
    """Begin a run, or go on with it."""
    loop = {**LOOP, "workers": workers}
    layers = [("test", {"network": NETWORK, "training": loop, "data": {"folds": 2}}), ("task", SETTINGS[task])]
    common: dict[str, Any] = {"device": torch.device("cpu"), "resume": run.exists(), "on_progress": on_progress}
    if task == "segmentation":
        config = read_config(run) if run.exists() else build_config(TrainConfig, layers)
        config = config.model_copy(update={"training": config.training.model_copy(update={"workers": workers})})
        train(TrainingRequest((data,), run, config, **common), SegmentationKind())
    elif task == "pretraining":
        train(TrainingRequest((data,), run, build_config(PretrainConfig, layers), **common), PretrainingKind())
    else:
        train(TrainingRequest((data,), run, build_config(InpaintingConfig, layers), **common), InpaintingKind())


def at(step: int, act: Callable[[], object]) -> Tell:
    """Do something once that step is done, before anything of it is written."""

    def tell(done: float, message: str) -> None:
        if round(done * STEPS) == step:
            act()

    return tell


def send(number: int) -> Callable[[], None]:
    """What sends a signal to the process that calls it."""
    return lambda: os.kill(os.getpid(), number)


def kill_a_worker() -> None:
    process = multiprocessing.active_children()[0].pid
    assert process is not None
    os.kill(process, signal.SIGKILL)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip_bits(path: Path) -> None:
    """Turn over a byte amid the tensors."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def warned_then_killed(done: float, message: str) -> None:
    at(23, send(signal.SIGUSR1))(done, message)
    at(24, send(signal.SIGKILL))(done, message)


class Session(NamedTuple):
    """What befalls a run: damage to its state beforehand, then a signal; how it ends, and where it goes on from."""

    tell: Tell
    code: int
    """The exit code, or minus the signal that killed the process."""
    kept: int
    """The step of the state that is left."""
    damage: Callable[[Path], None] | None = None
    workers: int = 0


SESSIONS = {
    "kill -9 at step 12": Session(at(12, send(signal.SIGKILL)), -signal.SIGKILL, 10),
    "a worker killed at step 16": Session(at(16, kill_a_worker), 1, 15, workers=1),
    "truncated, SIGTERM at step 14": Session(at(14, send(signal.SIGTERM)), 130, 14, truncate),
    "flipped, SIGUSR1 at step 23, kill -9 at step 24": Session(warned_then_killed, -signal.SIGKILL, 23, flip_bits),
}


def endure(task: str, data: Path, run: Path) -> dict[str, Any]:
    """One run through all sessions, each in a process of its own: how each ended, what it told, and what was kept."""
    ends: dict[str, Any] = {}
    for name, session in SESSIONS.items():
        if session.damage is not None:
            session.damage(run / "last.ckpt")
        child = os.fork()
        if child == 0:
            try:
                go(task, data, run, on_progress=session.tell, workers=session.workers)
            except SegkitError as error:
                (run / "told.txt").write_text(str(error))
                os._exit(error.exit_code)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told = run / "told.txt"
        ends[name] = {
            "code": code,
            "kept": load_state(run)["progress"]["step"],
            "told": told.read_text() if told.exists() else "",
        }
        told.unlink(missing_ok=True)
    return ends


@pytest.fixture(scope="module")
def data(phantom_data: Callable[[int], Path]) -> Path:
    return phantom_data(2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.parametrize("task", TASKS)
def test_a_battered_run_of_each_task_equals_one_that_nothing_befell(
    task: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "curves_figure", lambda path, rows: None)
    battered, whole = tmp_path / "battered", tmp_path / "whole"
    command = [sys.executable, __file__, str(data), str(battered), task]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        go(task, data, whole, on_progress=lambda done, message: None)
        output, log = process.communicate(timeout=200)
    assert process.returncode == 0, log
    ends = json.loads(output)
    for name, session in SESSIONS.items():
        assert (ends[name]["code"], ends[name]["kept"]) == (session.code, session.kept), name
    assert "a process that prepared batches was killed" in ends["a worker killed at step 16"]["told"]
    assert "interrupted by SIGTERM after step 14" in ends["truncated, SIGTERM at step 14"]["told"]
    go(task, data, battered, on_progress=lambda done, message: None)
    assert_same(battered, whole)


def assert_same(run: Path, whole: Path) -> None:
    """Same weights, same state but for times, same journal but for times."""
    states = [dict(flat(load_state(folder))) for folder in (run, whole)]
    weights = [load_file(folder / "model.safetensors") for folder in (run, whole)]
    for one, other in (states, weights):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if not name.endswith(("elapsed_s", "validation_s")):
                is_same = torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
                assert is_same, f"{name} of {run}"
    journals = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (run, whole)]
    rows = [[json.loads(line) for line in lines] for lines in journals]
    for row in (*rows[0], *rows[1]):
        del row["seconds"]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows[0] if "score" in row] == [10, 20, 30]


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value of a state by its path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from flat(inner, f"{name}/{place}")
    else:
        yield name, value


if __name__ == "__main__":
    pytest.MonkeyPatch().setattr(live, "curves_figure", lambda path, rows: None)
    sys.stdout.write(json.dumps(endure(sys.argv[3], Path(sys.argv[1]), Path(sys.argv[2]))))
