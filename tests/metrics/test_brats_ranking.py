"""The BraTS ranking by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from segkit.metrics.statistics import cumulative_ranks, exchange_p_values, rank_scores


def test_ranks_of_two_models_on_three_cases_by_hand():
    # Columns: Dice, where more is better, and HD95 in mm, where less is.
    first = [[0.9, 2.0], [0.8, 3.0], [0.7, 4.0]]
    second = [[0.8, 3.0], [0.8, 2.0], [0.6, 9.0]]
    ranks = cumulative_ranks([first, second], [True, False])
    # Case 1: ranks 1, 1 against 2, 2. Case 2: Dice ties at 1.5 each, HD95 2 against 1. Case 3: 1, 1 against 2, 2.
    np.testing.assert_array_equal(ranks, [[1.0, 1.75, 1.0], [2.0, 1.25, 2.0]])
    np.testing.assert_allclose(rank_scores(ranks), [3.75 / 3, 5.25 / 3])


def test_failed_cases_and_infinite_distances_are_worst_and_share_it():
    scores = [[[0.1, 900.0]], [[0.0, math.inf]], [[math.nan, math.nan]]]
    ranks = cumulative_ranks(scores, [True, False], failed=[[False], [False], [True]])
    # Dice: 1, 2, 3. HD95: 1, and the other two share 2 and 3.
    np.testing.assert_array_equal(ranks[:, 0], [1.0, 2.25, 2.75])


def test_models_tie_where_a_score_is_undefined():
    # Nothing is there: two models find nothing, whose Dice is undefined; one makes something up; one has no prediction.
    scores = [[[math.nan, 5.0]], [[math.nan, 4.0]], [[0.0, 3.0]], [[math.nan, math.nan]]]
    ranks = cumulative_ranks(scores, [True, False], failed=[[False], [False], [False], [True]])
    # Dice: three share 1 to 3, and 4. HD95: 3, 2, 1, 4.
    np.testing.assert_array_equal(ranks[:, 0], [2.5, 2.0, 1.5, 4.0])


def p_of(first, second, *options, **others):
    return exchange_p_values(np.array([first, second], float), *options, **others)[0, 1]


def test_exchanges_by_hand():
    # Differences 1, 1, 1: of 8 patterns of signs one has a sum of 3.
    assert p_of([2, 2, 2], [1, 1, 1]) == 1 / 8
    # Differences 1, 1, -1 have the sum 1, which 4 of 8 patterns reach: 3, and three times 1.
    assert p_of([2, 2, 1], [1, 1, 2]) == 4 / 8
    assert p_of([1, 1, 2], [2, 2, 1]) == 4 / 8
    assert p_of([1.5, 1.5], [1.5, 1.5]) == 1.0


def test_all_pairs_of_three_models_at_once():
    ranks = np.array([[1.0, 1, 1], [2, 2, 3], [3, 3, 2]])
    # Differences of the second pair -2, -2, -1 and of the third -1, -1, 1, whose sum of 1 is reached by 4 of 8.
    expected = [[1, 1 / 8, 1 / 8], [1 / 8, 1, 4 / 8], [1 / 8, 4 / 8, 1]]
    np.testing.assert_array_equal(exchange_p_values(ranks), expected)


def test_cases_of_one_patient_are_exchanged_together():
    assert p_of([2, 2, 2], [1, 1, 1], ["a", "a", "b"]) == 1 / 4
    assert p_of([2, 2, 2], [1, 1, 1], ["a", "a", "a"]) == 1 / 2


def test_drawn_exchanges_come_close_to_all_of_them(monkeypatch):
    generator = np.random.default_rng(2)
    first, second, third = generator.uniform(1, 2, (3, 12))
    exact = p_of(first, second)
    drawn = p_of(first, second, exchanges=4000)
    assert drawn == pytest.approx(exact, abs=0.03)
    assert drawn != exact
    # Neither the size of blocks nor a third model changes what is drawn for a pair.
    monkeypatch.setattr("segkit.metrics.statistics._BLOCK", 12 * 700)
    assert exchange_p_values(np.array([first, second, third]), exchanges=4000)[0, 1] == drawn
    # p is never 0, however far apart two models are.
    assert p_of(np.full(40, 2.0), np.ones(40), exchanges=99) == 1 / 100
