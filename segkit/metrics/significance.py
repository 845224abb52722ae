"""Comparison of models on the same cases: signed-rank test, correction for many tests, the ranking scheme of BraTS.

The Wilcoxon signed-rank test does not need normal differences, which scores close to 1 do not have (Wilcoxon,
Biometrics Bulletin 1, 1945). Many tests are corrected by Holm's method (Scandinavian Journal of Statistics 6, 1979).
The effect size is the matched-pairs rank-biserial correlation (Kerby, Comprehensive Psychology 3, 2014; King, Rosopa &
Minium, Statistical Reasoning in the Behavioral Sciences, 2011).

BraTS ranks the models for each case, region and metric, 1 is best; the mean of a case's ranks over regions and metrics
is its cumulative rank, and the mean over cases the final rank score (Bakas et al., arXiv 1811.02629, the section on
ranking; used by the challenges since 2017). A permutation test on cumulative ranks compares two models: ranks are
exchanged between the two at random, case by case, and p is the share of exchanges with scores at least as far apart.
The paper leaves open, and we chose:

- p is one-sided, in favour of the better of the two: double it for a two-sided test. 100,000 exchanges are drawn.
- Ties share their mean rank.
- A case without a prediction has the worst rank, and so has an infinite distance; several of them share it.
- Where a score is undefined for any model, as Dice of two empty masks in some protocols, all models with a prediction
  tie.
- The observed ranks count as one of the permutations, so that p is never 0 (Phipson & Smyth, Statistical Applications
  in Genetics and Molecular Biology 9, 2010). Where all exchanges are fewer than those to be drawn, each is made once.
- All cases of a patient are exchanged together.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from segkit.metrics.bootstrap import number_patients

EXCHANGES = 100_000

_BLOCK = 1 << 21
_ROUNDING = 1e-9
"""Sums of the same ranks in another order are the same sum."""

_DECIMALS = 12
"""0.9 - 0.8 and 0.8 - 0.7 are one difference, and floating point makes them two."""

_EXACT_UP_TO = 50
"""2^50 patterns of signs are counted without rounding in float64."""


@dataclass(frozen=True)
class SignedRank:
    """Result of the signed-rank test of differences."""

    p: float
    """Two-sided; NaN where there are no differences and 1 where all are zero."""
    effect: float
    """Rank-biserial correlation in [-1, 1]: the share of positive ranks less that of negative ones; 0 if all are 0."""
    method: str
    """How p was computed: "exact", "asymptotic" (normal, corrected for ties) or "none"."""
    zeros: int
    """Differences that were left out."""
    has_ties: bool


def signed_rank(differences: ArrayLike) -> SignedRank:
    """Wilcoxon's signed-rank test of finite differences (n,), two-sided.

    Zeros are left out, as Wilcoxon did and as R and SciPy do by default; equal sizes share their mean rank. Of up to 50
    differences p is exact, also with ties, for which SciPy uses the normal approximation.
    """
    from scipy import stats

    rounded = np.round(np.asarray(differences, np.float64), _DECIMALS)
    nonzero = rounded[rounded != 0]
    zeros = len(rounded) - len(nonzero)
    if not len(nonzero):
        return SignedRank(1.0 if zeros else math.nan, 0.0, "none", zeros, has_ties=False)
    ranks = stats.rankdata(np.abs(nonzero))
    has_ties = len(np.unique(ranks)) < len(ranks)
    effect = float(np.sum(np.sign(nonzero) * ranks) / np.sum(ranks))
    if len(nonzero) <= _EXACT_UP_TO:
        p = _exact_p(ranks, float(ranks[nonzero > 0].sum()))
        return SignedRank(p, effect, "exact", zeros, has_ties)
    p = float(stats.wilcoxon(nonzero, method="approx").pvalue)
    return SignedRank(p, effect, "asymptotic", zeros, has_ties)


def _exact_p(ranks: NDArray[np.float64], positive: float) -> float:
    """How often random signs give a sum of positive ranks as far from its mean as `positive`, or farther."""
    doubled = np.rint(2 * ranks).astype(int)  # mean ranks of ties are halves
    patterns = np.ones(1)  # patterns[s]: in how many patterns of signs the doubled positive ranks sum to s
    for rank in doubled:
        patterns = np.pad(patterns, (0, rank)) + np.pad(patterns, (rank, 0))
    distance = np.abs(2 * np.arange(len(patterns)) - doubled.sum())
    is_far = distance >= abs(round(4 * positive) - doubled.sum())
    return float(patterns[is_far].sum() / patterns.sum())


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values after Holm's step-down adjustment, in the order given.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none becomes smaller than one before it, nor
    larger than 1. NaN is not a test: it stays and does not count.
    """
    adjusted = list(p_values)
    tested = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    largest = 0.0
    for position, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - position) * p))
        adjusted[index] = largest
    return adjusted


def cumulative_ranks(
    scores: ArrayLike, higher_is_better: Sequence[bool], failed: ArrayLike = False
) -> NDArray[np.float64]:
    """The mean rank of each model in each case, (models, cases); 1 is best.

    `scores` (models, cases, columns) has one column for each region and metric; NaN is undefined, infinity worst.
    `failed` (models, cases) is True where a model has no prediction; its scores are ignored there.
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

    `ranks` are cumulative ranks, (models, cases); without `patients` each case is a patient of its own. All pairs share
    the same exchanges. The matrix is symmetric, since p is in favour of the better of a pair, and 1 on its diagonal.
    """
    patient, count = number_patients(patients, ranks.shape[1])
    sums = np.array([np.bincount(patient, own, minlength=count) for own in ranks])  # (models, patients)
    first, second = np.triu_indices(len(ranks), k=1)
    differences = sums[first] - sums[second]  # (pairs, patients)
    observed = np.abs(differences.sum(axis=1)) - _ROUNDING
    is_complete = 2**count <= exchanges
    if is_complete:
        patterns = iter([np.arange(2**count)[:, None] >> np.arange(count) & 1])
    else:
        patterns = _random_patterns(count, exchanges, seed, wide=max(count, len(first)))
    reached = np.zeros(len(first), np.int64)
    for block in patterns:
        signs = 1.0 - 2.0 * block.astype(np.float64)
        reached += np.count_nonzero(signs @ differences.T >= observed, axis=0)
    p_values = np.ones((len(ranks), len(ranks)))
    p_values[first, second] = reached / 2**count if is_complete else (reached + 1) / (exchanges + 1)
    p_values[second, first] = p_values[first, second]
    return p_values


def _random_patterns(count: int, rows: int, seed: int, wide: int) -> Iterator[NDArray[np.signedinteger[Any]]]:
    """Random patterns of 0 and 1, in blocks (rows, count); results have `wide` entries per row."""
    generator = np.random.default_rng(seed)
    size = max(1, _BLOCK // wide)
    for start in range(0, rows, size):
        yield generator.integers(2, size=(min(size, rows - start), count))
