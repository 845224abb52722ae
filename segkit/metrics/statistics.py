"""Statistics of scores over cases: confidence intervals, paired tests of models, the ranking scheme of BraTS.

All cases of a patient are drawn, exchanged and averaged together, because they are not independent (the cluster
bootstrap: Davison & Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).

Intervals are percentile bootstraps (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13): the middle
95 % of the means, or medians, of as many patients drawn with replacement. With few cases this is too narrow for a mean,
by as much as a normal interval is narrower than Student's, which is corrected (the expanded percentile interval:
Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69, 2015); not for a median. BCa is
not used: its acceleration comes from the jackknife, which is inconsistent for a median (Efron & Tibshirani, section
11.6), and for medians of segmentation scores bootstrap methods other than the percentile can fail altogether (André et
al., Some Hidden Traps of Confidence Intervals in Medical Image Segmentation, 2025). `benchmarks/interval_coverage.py`
measures the coverage.

The Wilcoxon signed-rank test does not need normal differences, which scores close to 1 do not have (Wilcoxon,
Biometrics Bulletin 1, 1945). Many tests are corrected by Holm's method (Scandinavian Journal of Statistics 6, 1979).
The effect size is the matched-pairs rank-biserial correlation (Kerby, Comprehensive Psychology 3, 2014; King, Rosopa &
Minium, Statistical Reasoning in the Behavioral Sciences, 2011).

BraTS ranks the models for each case, region and metric, 1 is best; the mean of a case's ranks over regions and metrics
is its cumulative rank, and the mean over cases the final rank score (Bakas et al., arXiv 1811.02629, the section on
ranking). A permutation test on cumulative ranks compares two models: ranks are exchanged at random, case by case, and p
is the share of exchanges with scores at least as far apart. The paper leaves open, and we chose:

- p is one-sided, in favour of the better of the two: double it for a two-sided test. 100,000 exchanges are drawn.
- Ties share their mean rank.
- A case without a prediction has the worst rank, and so has an infinite distance; several of them share it.
- Where a score is undefined for any model, as Dice of two empty masks in some protocols, all models with a prediction
  tie.
- The observed ranks count as one of the permutations, so that p is never 0 (Phipson & Smyth, Statistical Applications
  in Genetics and Molecular Biology 9, 2010). Where all exchanges are fewer than those to be drawn, each is made once.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 5000
"""Efron & Tibshirani ask for 1000 or more where the ends of an interval are wanted."""

_BLOCK = 1 << 21
"""Numbers that are held at a time: 16 MB, for any number of cases."""

Interval = tuple[float, float]
"""Lower and upper end."""


def mean_interval(
    values: ArrayLike,
    patients: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """Confidence interval of the mean over cases; None for fewer than two patients.

    `values` has one finite number per case, (n,), `patients` the patient of each; None: each case is a patient of its
    own. The same values, patients and seed give the same interval; `level` is in (0, 1).
    """
    from scipy.special import ndtr, stdtrit

    patient, count = number_patients(patients, len(np.asarray(values)))
    if count < 2:
        return None
    # Resampled means spread by sqrt((n - 1) / n) less than means of samples do, and their quantiles are normal ones:
    # this share of them is as wide as Student's interval (Hesterberg 2015).
    deviations = np.sqrt(count / (count - 1)) * stdtrit(count - 1, (1 + level) / 2)
    return _middle(_resampled(_means, values, patient, count, resamples, seed), float(2 * ndtr(deviations) - 1))


def median_interval(
    values: ArrayLike,
    patients: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """Confidence interval of the median over cases; arguments as for `mean_interval`."""
    patient, count = number_patients(patients, len(np.asarray(values)))
    return None if count < 2 else _middle(_resampled(_medians, values, patient, count, resamples, seed), level)


def _middle(resampled: NDArray[np.float64], share: float) -> Interval:
    low, high = np.quantile(resampled, ((1 - share) / 2, (1 + share) / 2))
    return float(low), float(high)


def number_patients(patients: Sequence[Hashable] | None, cases: int) -> tuple[NDArray[np.intp], int]:
    """The number of each case's patient, (cases,) from 0 in order of appearance, and how many patients there are.

    Raises:
        ValueError: there is not one patient for each case.
    """
    if patients is None:
        return np.arange(cases), cases
    if len(patients) != cases:
        raise ValueError(f"{len(patients)} patients for {cases} cases")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(patient, len(numbers)) for patient in patients], np.intp), len(numbers)


def _resampled(
    statistic: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
    values: ArrayLike,
    patient: NDArray[np.intp],
    patients: int,
    resamples: int,
    seed: int,
) -> NDArray[np.float64]:
    """The statistic, of sorted values (n,) and how often each resample holds them (rows, n), for each resample."""
    scores = np.asarray(values, np.float64)
    order = np.argsort(scores, kind="stable")
    generator = np.random.default_rng(seed)
    size = max(1, _BLOCK // len(scores))
    found = []
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = generator.integers(patients, size=(rows, patients)) + patients * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * patients).reshape(rows, patients)
        found.append(statistic(scores[order], times[:, patient[order]].astype(np.float64)))
    return np.concatenate(found)


def _means(ascending: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(weights @ ascending / weights.sum(axis=1))


def _medians(ascending: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    reached = np.cumsum(weights, axis=1)
    half = reached[:, -1:] / 2
    lower, upper = (reached >= half).argmax(axis=1), (reached > half).argmax(axis=1)
    return np.asarray((ascending[lower] + ascending[upper]) / 2)


EXCHANGES = 100_000

_ROUNDING = 1e-9
"""Sums of the same ranks in another order are the same sum."""

_DECIMALS = 12
"""0.9 - 0.8 and 0.8 - 0.7 are one difference, and floating point makes them two."""

_EXACT_UP_TO = 50
"""2^50 patterns of signs are counted without rounding in float64."""


@dataclass(frozen=True)
class SignedRank:
    """Result of the signed-rank test of differences.

    `p` is two-sided: NaN where there are no differences, 1 where all are zero. `effect` is the rank-biserial
    correlation in [-1, 1]: the share of positive ranks less that of negative ones; 0 if all are 0. `method` is how p
    was computed: "exact", "asymptotic" (normal, corrected for ties) or "none". `zeros` are the differences left out.
    """

    p: float
    effect: float
    method: str
    zeros: int
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
    return np.asarray(rankdata(badness, axis=0).mean(axis=2))


def rank_scores(ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    """The final rank score of each model, (models,), of cumulative ranks (models, cases); the lowest wins."""
    return np.asarray(ranks.mean(axis=1))


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
