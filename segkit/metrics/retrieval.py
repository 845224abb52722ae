"""Whether two descriptions of the same thing find each other among many."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def retrieval_accuracy(first: NDArray[np.floating[Any]], second: NDArray[np.floating[Any]]) -> float:
    """Share of rows whose nearest row on the other side is their own, by cosine; mean of both directions, 0 to 1.

    Where several rows of the other side are equally near, the own one among them counts as one over their number, so
    that features which say nothing score chance, 1 / B. A row of zeros is equally far from all.

    Args:
        first: (B, F), finite, B >= 1; row i describes the i-th thing.
        second: (B, F), finite; row i describes the i-th thing once more.

    Raises:
        ValueError: the shapes differ, are not of two axes, or there is no row.
    """
    if first.shape != second.shape or first.ndim != 2 or not len(first):
        raise ValueError(f"two arrays (B, F) of one shape are compared, not {first.shape} and {second.shape}")
    cosines = _unit_rows(first) @ _unit_rows(second).T  # (B, B), row i of `first` against all of `second`
    return (_share_of_own(cosines) + _share_of_own(cosines.T)) / 2


def _unit_rows(rows: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    unit: NDArray[np.float64] = rows / np.where(lengths > 0, lengths, 1.0)
    return unit


def _share_of_own(cosines: NDArray[np.float64]) -> float:
    """Mean over rows of 1 where the diagonal holds the largest cosine, divided by how many are as large."""
    # Equal rows may differ in the last digit, because sums are formed in another order.
    are_nearest = cosines >= cosines.max(axis=1, keepdims=True) - 1e-12
    return float(np.mean(np.diagonal(are_nearest) / are_nearest.sum(axis=1)))
