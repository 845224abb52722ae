"""How many cases a budget leaves for validation and for the scores at the end."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from segkit.checkpoint.model import load_model
from segkit.checkpoint.run_folder import load_card
from segkit.training import segmentation
from segkit.training.config import TrainingConfig
from segkit.training.segmentation import SegmentationTask
from tests.helpers import write_segmentation_run


@pytest.mark.parametrize(
    ("budget_s", "validated", "scored"),
    [
        (1000.0, 2, 1),  # 25 s hold two of 8 windows without overlap, 60 s hold one of 27 windows
        (10000.0, 3, 3),
        (1.0, 1, 1),
    ],
)
def test_cases_are_left_out_by_the_time_of_one_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget_s: float, validated: int, scored: int
) -> None:
    run = write_segmentation_run(tmp_path / "run")
    card = load_card(run)
    cases = [SimpleNamespace(image=np.zeros((1, *(2 * size for size in card.patch_size)))) for _ in range(3)]
    task = SegmentationTask(load_model(run), card, None, None, cases, 1, cases, budget_s=budget_s)  # type: ignore[arg-type]
    seconds = iter(range(100))
    monkeypatch.setattr(segmentation.time, "monotonic", lambda: next(seconds))  # a window takes 1 s
    task._fit_budget(task.predictor(overlap=0.0), budget_s)
    assert len(task.validation) == validated
    assert len(task.scored) == scored
    assert task.final_s == pytest.approx(1.3 * 27 * scored)


@pytest.mark.parametrize(
    ("settings", "validated", "every"),
    [
        # 9 cases of 8 windows; one takes as long as 1.3 * 8 / (3 * 1) = 3.47 steps, all as long as 31.2.
        ({"steps": 5000, "steps_per_epoch": 312}, 9, 1),
        ({"steps": 5000, "steps_per_epoch": 311}, 9, 2),
        ({"steps": 5000, "steps_per_epoch": 100}, 9, 4),
        ({"steps": 5000, "steps_per_epoch": 100, "validate_every": 6}, 9, 6),
        ({"steps": 5000, "steps_per_epoch": 50, "accumulate": 2}, 9, 4),
        ({"steps": 1000, "steps_per_epoch": 100}, 7, 3),  # 25 steps for one validation hold 7 cases, as long as 24.3
        ({"steps": 10, "steps_per_epoch": 5}, 1, 7),
        ({"steps": 10, "steps_per_epoch": 5, "budget_minutes": 1.0}, 9, 1),
    ],
)
def test_validations_take_a_tenth_of_a_run_without_a_budget(
    tmp_path: Path, settings: dict[str, Any], validated: int, every: int
) -> None:
    run = write_segmentation_run(tmp_path / "run")
    card = load_card(run)
    cases = [SimpleNamespace(image=np.zeros((1, *(2 * size for size in card.patch_size)))) for _ in range(9)]
    task = SegmentationTask(load_model(run), card, None, None, cases, 1, cases)  # type: ignore[arg-type]
    assert task.paced(TrainingConfig(**settings)).validate_every == every
    assert len(task.validation) == validated
    assert len(task.scored) == 9


def test_short_validations_are_never_limited(tmp_path: Path) -> None:
    run = write_segmentation_run(tmp_path / "run")
    card = load_card(run)
    cases = [SimpleNamespace(image=np.zeros((1, *(2 * size for size in card.patch_size)))) for _ in range(8)]
    task = SegmentationTask(load_model(run), card, None, None, cases, 1, cases)  # type: ignore[arg-type]
    assert task.paced(TrainingConfig(steps=4, steps_per_epoch=1)).validate_every == 1
    assert len(task.validation) == 8
