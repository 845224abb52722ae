"""`segkit train` and `segkit pretrain` that are told to stop: exit code 130, and the command that goes on."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from segkit.checkpoint.state import load_state
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


@pytest.mark.parametrize("verb", TASKS)
def test_sigterm_ends_with_130_and_the_command_that_goes_on(
    verb: str, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    get_lr = loop.get_lr
    steps: list[int] = []

    def terminating(*arguments: object) -> float:
        steps.append(len(steps) + 1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return get_lr(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "get_lr", terminating)
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
