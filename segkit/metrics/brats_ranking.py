"""The ranking scheme of BraTS: models are ranked case by case, and differences of mean ranks are tested.

For each case, region and metric the models are ranked, 1 is best; the mean of a case's ranks over regions and metrics
is its cumulative rank, and the mean over cases the final rank score (Bakas et al., arXiv 1811.02629, the section on
ranking; used by the challenges since 2017). A permutation test on cumulative ranks compares two models: ranks are
exchanged between the two at random, case by case, and p is the share of exchanges with scores at least as far apart.

Our choices, which the paper leaves open:

- p is one-sided, in favour of the better of the two: double it for a two-sided test. 100,000 exchanges are drawn.
- Ties share their mean rank.
- A case without a prediction has the worst rank, and so has an infinite distance; several of them share it.
- Where a score is undefined for any model, as Dice of two empty masks in some protocols, all models with a prediction
  tie.
- The observed ranks count as one of the permutations, so that p is never 0 (Phipson & Smyth, Statistical Applications
  in Genetics and Molecular Biology 9, 2010). Where all exchanges are fewer than those to be drawn, each is made once.
- All cases of a patient are exchanged together.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from segkit.metrics.bootstrap import number_patients

EXCHANGES = 100_000

_BLOCK = 1 << 21
_ROUNDING = 1e-9
"""Sums of the same ranks in another order are the same sum."""


def cumulative_ranks(
    scores: ArrayLike, higher_is_better: Sequence[bool], failed: ArrayLike = False
) -> NDArray[np.float64]:
    """The mean rank of each model in each case, (models, cases); 1 is best.

    Args:
        scores: (models, cases, columns), one column for each region and metric; NaN is undefined, infinity worst.
        higher_is_better: The direction of each column.
        failed: Boolean (models, cases): where a model has no prediction; its scores are ignored there.
    """
    from scipy.stats import rankdata

    values = np.asarray(scores, np.float64)
    is_failed = np.broadcast_to(failed, values.shape[:2])[..., None]
    badness = np.where(np.asarray(higher_is_better), -values, values)
    badness = np.where(np.isinf(values), np.inf, badness)
    is_undefined = (np.isnan(values) & ~is_failed).any(axis=0)
    badness = np.where(is_failed, np.inf, np.where(is_undefined, 0.0, badness))
    ranks: NDArray[np.float64] = rankdata(badness, axis=0).mean(axis=2)
    return ranks


def rank_scores(ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    """The final rank score of each model, (models,), of cumulative ranks (models, cases); the lowest wins."""
    scores: NDArray[np.float64] = ranks.mean(axis=1)
    return scores


def exchange_p_values(
    ranks: NDArray[np.float64], patients: Sequence[Hashable] | None = None, *, exchanges: int = EXCHANGES, seed: int = 0
) -> NDArray[np.float64]:
    """p-values of the difference of each two models' rank scores, (models, models) in (0, 1].

    All pairs share the same exchanges. The matrix is symmetric, since p is in favour of the better of a pair, and 1 on
    its diagonal.

    Args:
        ranks: Cumulative ranks, (models, cases).
        patients: The patient of each case; None: each case is a patient of its own.
        exchanges: Exchanges that are drawn; if there are fewer in all, each is made once.
        seed: Seed of the exchanges.
    """
    patient, count = number_patients(patients, ranks.shape[1])
    sums = np.array([np.bincount(patient, own, minlength=count) for own in ranks])  # (models, patients)
    first, second = np.triu_indices(len(ranks), k=1)
    differences = sums[first] - sums[second]  # (pairs, patients)
    observed = np.abs(differences.sum(axis=1)) - _ROUNDING
    is_complete = 2**count <= exchanges
    signs = _all_signs(count) if is_complete else _random_signs(count, exchanges, seed, wide=max(count, len(first)))
    reached = np.zeros(len(first), np.int64)
    for block in signs:
        reached += np.count_nonzero(block @ differences.T >= observed, axis=0)
    p_values = np.ones((len(ranks), len(ranks)))
    p_values[first, second] = reached / 2**count if is_complete else (reached + 1) / (exchanges + 1)
    p_values[second, first] = p_values[first, second]
    return p_values


def _all_signs(count: int) -> Iterator[NDArray[np.float64]]:
    """Every pattern of +1 and -1, (2^count, count)."""
    patterns = np.arange(2**count)[:, None] >> np.arange(count) & 1
    yield _signs(patterns)


def _random_signs(count: int, rows: int, seed: int, wide: int) -> Iterator[NDArray[np.float64]]:
    """Random patterns of +1 and -1, in blocks (rows, count); results have `wide` entries per row."""
    generator = np.random.default_rng(seed)
    size = max(1, _BLOCK // wide)
    for start in range(0, rows, size):
        yield _signs(generator.integers(2, size=(min(size, rows - start), count)))


def _signs(bits: NDArray[np.signedinteger[Any]]) -> NDArray[np.float64]:
    return 1.0 - 2.0 * bits.astype(np.float64)
