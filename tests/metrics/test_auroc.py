"""The area under the ROC curve: pairs counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from segkit.metrics.calibration import area_under_roc


@pytest.mark.parametrize(
    ("inside", "outside", "expected"),
    [
        ([0.9, 0.8], [0.1, 0.2, 0.3], 1.0),
        ([0.1], [0.9, 0.8], 0.0),
        ([0.5], [0.5, 0.5], 0.5),
        ([0.9, 0.4], [0.6, 0.1], 3 / 4),  # only 0.4 against 0.6 is the wrong way round
        ([0.9, 0.6], [0.6, 0.1], 3.5 / 4),  # 0.6 against 0.6 counts half
        ([2.0, -1.0], [-3.0, -2.0, -1.0], 5.5 / 6),  # logits will do
    ],
)
def test_pairs_counted_by_hand(inside: list[float], outside: list[float], expected: float) -> None:
    values = np.array([*outside, *inside], np.float32)
    reference = np.array([False] * len(outside) + [True] * len(inside))
    assert area_under_roc(values, reference) == expected


def test_order_and_shape_do_not_matter() -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(0, 5, (4, 6)).astype(np.float32)
    reference = generator.random((4, 6)) < 0.4
    pairs = [(a, b) for a in values[reference] for b in values[~reference]]
    by_hand = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    assert area_under_roc(values, reference) == pytest.approx(by_hand, rel=1e-12)
    assert area_under_roc(values.T, reference.T) == area_under_roc(values, reference)


def test_probabilities_and_logits_rank_alike() -> None:
    logits = np.random.default_rng(1).normal(size=500)
    reference = np.arange(500) % 3 == 0
    assert area_under_roc(1 / (1 + np.exp(-logits)), reference) == area_under_roc(logits, reference)


@pytest.mark.parametrize("value", [True, False])
def test_one_kind_alone_has_no_curve(value: bool) -> None:
    assert math.isnan(area_under_roc(np.arange(3.0), np.full(3, value)))


def test_counts_beyond_32_bits() -> None:
    values = np.concatenate([np.zeros(70_000, np.float32), np.ones(70_000, np.float32)])
    assert area_under_roc(values, values > 0) == 1.0  # 4.9e9 pairs
