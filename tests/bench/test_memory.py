"""The memory tables, on networks and patches small enough for a test."""

from __future__ import annotations

import pytest

from segkit.bench import memory
from segkit.bench.memory import Step, measure, take
from segkit.errors import SegkitError

_TINY = {"widths": (8, 16), "blocks": 1, "decoder_blocks": 1}


def test_a_step_is_measured_in_a_process_of_its_own() -> None:
    measured = measure(Step(arguments={**_TINY, "widths": (32, 32)}, patch=(48, 48, 48)))
    kept_mb = 48**3 * 32 * 4 / 2**20  # one full-resolution map of 32 channels, in float32
    assert measured.step_mb > 5 * kept_mb
    assert measured.process_mb > measured.step_mb
    assert measured.seconds > 0


def test_parameters_are_counted() -> None:
    shallow, deep = (take(Step(arguments={**_TINY, "blocks": blocks}, patch=(8, 8, 8))) for blocks in (1, 3))
    assert deep.parameters > shallow.parameters > 0


def test_a_step_that_fails_says_what_was_tried() -> None:
    with pytest.raises(SegkitError, match=r"the step on 7 x 8 x 8 voxels did not finish"):
        measure(Step(arguments=_TINY, patch=(7, 8, 8)))


def _cube(size: int) -> tuple[Step, float]:
    return Step(patch=(32 + 16 * size,) * 3), 1.0 + size


def test_the_budget_goes_to_the_largest_step_that_was_measured_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def pretend(step: Step) -> memory.Measured:
        side = step.patch[0]
        tried.append(side)
        return memory.Measured(side**3 / 1000, 0.0, 1.0, 1)

    monkeypatch.setattr(memory, "measure", pretend)
    found = memory._largest(_cube, 1000.0, 6)
    assert found is not None
    assert found[0].patch == (96, 96, 96)
    assert found[2] == 5.0
    assert tried == [128, 112, 96]  # 2097, 1405 and 885 MB


@pytest.mark.parametrize(("share", "size"), [(0.8, 4), (0.7, 5), (5.0, 1), (50.0, 0)])
def test_an_estimate_tells_where_to_begin(monkeypatch: pytest.MonkeyPatch, share: float, size: int) -> None:
    monkeypatch.setattr(memory, "_estimate_mb", lambda step: share * step.patch[0] ** 3 / 1000)
    assert memory._estimated(_cube, 1000.0) == size


def test_a_budget_that_buys_nothing_is_left_out() -> None:
    assert memory._largest(_cube, 1000.0, 0) is None
