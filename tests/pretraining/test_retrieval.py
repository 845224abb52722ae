"""Retrieval by cosine, on rows whose neighbours can be seen."""

from __future__ import annotations

import numpy as np
import pytest

from segkit.pretraining.encoder import retrieval_accuracy

AXES = np.eye(3)


def test_own_rows_are_found_whatever_their_length() -> None:
    assert retrieval_accuracy(AXES, AXES * [[2.0], [0.5], [9.0]]) == 1.0


def test_swapped_rows_are_not() -> None:
    """Rows 0 and 1 have changed places; row 2 finds itself."""
    assert retrieval_accuracy(AXES, AXES[[1, 0, 2]]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # Cosines, rows of `first` by rows of `second`: [[1, 0.8], [0.6, 0]]. Row 1 prefers row 0, and so does column 1.
        ([[1.0, 0.0], [0.6, -0.8]], [[1.0, 0.0], [0.8, 0.6]], 0.5),
        # [[1, 0.96], [0.8, 0.936]]: both rows find their own, but column 1 is nearer to row 0.
        ([[1.0, 0.0], [0.8, 0.6]], [[1.0, 0.0], [0.96, 0.28]], 0.75),
        # [[0.6, 0], [0.96, 0.6]]: row 1 is nearer to row 0, and column 0 to row 1.
        ([[1.0, 0.0], [0.8, 0.6]], [[0.6, 0.8], [0.0, 1.0]], 0.5),
    ],
)
def test_both_directions_count(first: list[list[float]], second: list[list[float]], expected: float) -> None:
    assert retrieval_accuracy(np.array(first), np.array(second)) == expected


def test_features_that_say_nothing_score_chance() -> None:
    same = np.full((4, 5), 0.1, dtype=np.float32)
    assert retrieval_accuracy(same, same) == pytest.approx(1 / 4)
    assert retrieval_accuracy(np.zeros((4, 5)), same) == pytest.approx(1 / 4)


def test_one_row_finds_itself() -> None:
    assert retrieval_accuracy(np.array([[1.0]]), np.array([[2.0]])) == 1.0


@pytest.mark.parametrize(("first", "second"), [((2, 3), (3, 3)), ((2,), (2,)), ((0, 3), (0, 3))])
def test_shapes_that_cannot_be_compared(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"two arrays \(B, F\) of one shape"):
        retrieval_accuracy(np.zeros(first), np.zeros(second))
