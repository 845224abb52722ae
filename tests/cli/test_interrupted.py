"""`segkit train` and `segkit pretrain` that are told to stop: exit code 130, and the command that goes on."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from segkit.checkpoint.tensors import load_state
from segkit.training import loop
from tests.helpers import run_segkit

pytestmark = pytest.mark.usefixtures("signals_of_a_new_process")

SMALL = ("--preset", "tiny", "-d", "cpu", "-q", "--set", "training.steps=4", "--set", "data.folds=2")
TASKS = {
    "train": ("--set", "planning.patch_size=[16, 16, 16]", "--set", "planning.batch_size=1", "-f", "1"),
    "pretrain": ("--method", "inpainting", "--set", "patches.size=16", "--set", "validation_holes=1"),
}


@pytest.fixture(scope="module")
def phantoms(phantom_data: Callable[[int], Path]) -> Path:
    return phantom_data(2)


def terminate_in_step_2(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the second step of the training send SIGTERM; the list gets the number of each step."""
    get_lr = loop.get_lr
    steps: list[int] = []

    def terminating(*arguments: object) -> float:
        steps.append(len(steps) + 1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return get_lr(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "get_lr", terminating)
    return steps


@pytest.mark.parametrize("verb", TASKS)
def test_sigterm_ends_with_130_and_the_command_that_goes_on(
    verb: str, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = terminate_in_step_2(monkeypatch)
    before = signal.getsignal(signal.SIGTERM)
    assert run_segkit(verb, phantoms, "-o", tmp_path / "run", *SMALL, *TASKS[verb]) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert load_state(tmp_path / "run")["progress"]["step"] == 2
    told = capsys.readouterr().err
    assert "interrupted by SIGTERM after step 2; the state is kept. Resume with: " in told
    assert "Error" not in told
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "run stopped after step 2: interrupted by SIGTERM after step 2; the state is kept." in page
    assert f"segkit {verb} data -o run --resume" in page
    command = shlex.split(told.strip().splitlines()[-1].partition("Resume with: ")[2])
    assert command[0] == "segkit"
    assert run_segkit(*command[1:], "-q") == 0
    assert load_state(tmp_path / "run")["progress"]["step"] == 4
    assert "stopped after step" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("verb", TASKS)
def test_changes_are_about_a_run_that_resume(verb: str, phantoms: Path, tmp_path: Path) -> None:
    assert run_segkit(verb, phantoms, "-o", tmp_path / "run", "--allow-changes", *SMALL, *TASKS[verb]) == 2
    assert not (tmp_path / "run").exists()


COMMANDS = {
    "train": ("--set", "planning.patch_size=null", "--set", "planning.patch_limit=16", "-f", "1"),
    "pretrain": ("--method", "masked", "--encoder", "vit", "--set", "views.size=32", "--set", "network.size=tiny"),
}
"""The first leaves the patch to planning."""


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_same_command_resumes_and_a_changed_one_names_the_change(
    verb: str, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (verb, phantoms, "-o", tmp_path / "run", *SMALL, *COMMANDS[verb])
    terminate_in_step_2(monkeypatch)
    assert run_segkit(*command) == 130
    kept = (tmp_path / "run" / "settings.json").read_bytes()
    changes = {
        ("--set", "training.steps=3"): "run: the settings differ from those of the run: training.steps 4 -> 3. ",
        ("--preset", "cpu"): {"train": "network.size tiny -> small", "pretrain": "batch_size 32 -> 64"}[verb],
        ("--weights", tmp_path / "x"): "x differs from the run, which began with random weights",
        ("--weights", tmp_path / "x", "--allow-changes"): "a resumed run continues with its own weights",
    }
    for changed, named in changes.items():
        capsys.readouterr()
        assert run_segkit(*command, "--resume", *changed) == 2
        assert named in " ".join(capsys.readouterr().err.split())
    assert run_segkit(*command, "--resume") == 0
    assert load_state(tmp_path / "run")["progress"]["step"] == 4
    assert (tmp_path / "run" / "settings.json").read_bytes() == kept
    assert not (tmp_path / "run" / "changes.jsonl").exists()
