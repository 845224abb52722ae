"""The order of the units of `benchmarks/transfer.py`, where it stops, and its intervals."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def transfer(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import transfer

    yield transfer
    for name in ("transfer", "tables"):
        sys.modules.pop(name)


def test_every_unit_comes_once_and_after_its_pre_training(transfer: ModuleType) -> None:
    units = transfer.units()
    assert len(set(units)) == len(units)
    for place, unit in enumerate(units):
        assert unit.source is None or unit.source in units[:place]
    seeds = [u.seed for u in units if (u.task, u.arm, u.labels) == ("hippocampus 3D", "masked", 5)]
    assert set(seeds) == set(range(12))
    assert {u.arm for u in units if u.task == "BraTS 3D"} == {"random", "graph matching", "masked", "lesion bank"}


class FakeBench:
    lr, encoder_lr = 1e-3, 0.1

    def __init__(self, out: Path) -> None:
        self.out = out

    def run(self, unit: Any) -> dict[str, Any]:
        return {**asdict(unit), "lr": self.lr, "encoder_lr": self.encoder_lr, "minutes": 2.0}


def test_a_run_stops_before_a_unit_that_does_not_fit_and_continues_there(
    transfer: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Expected are 1.5 minutes, then the 2 that a unit took: two of them fit into 3 minutes, one of three times not."""
    results = tmp_path / "results.jsonl"
    wanted = [transfer.Unit("hippocampus 3D", "random", 5, seed) for seed in range(2)]
    wanted.append(transfer.Unit("hippocampus 3D", "random", 5, 0, variant=transfer.LONGER))
    for _ in range(2):
        transfer.train_missing(FakeBench(tmp_path), wanted, results, time.monotonic() + 180)
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        assert [(line["seed"], line["variant"]) for line in lines] == [(0, "fine-tuned"), (1, "fine-tuned")]
        assert "would take about 6.0 minutes; stopped" in capsys.readouterr().err
    transfer.train_missing(FakeBench(tmp_path), wanted, results, time.monotonic() + 400)
    assert len(results.read_text().splitlines()) == 3


def test_the_interval_of_two_differences(transfer: ModuleType) -> None:
    """0.01 and 0.03: mean 0.02, standard error 0.01, and Student's t with one degree of freedom is 12.706."""
    assert transfer.interval([0.01, 0.03]) == "+0.020 (-0.107 to +0.147)"
    assert transfer.interval([0.01]) == "+0.010"
    assert transfer.interval([]) == ""
