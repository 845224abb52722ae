"""Comparison of two models on the same cases: signed-rank test, effect size, correction for many tests.

The Wilcoxon signed-rank test does not need normal differences, which scores close to 1 do not have (Wilcoxon,
Biometrics Bulletin 1, 1945). Many tests are corrected by Holm's method (Scandinavian Journal of Statistics 6, 1979).
The effect size is the matched-pairs rank-biserial correlation (Kerby, Comprehensive Psychology 3, 2014; King, Rosopa &
Minium, Statistical Reasoning in the Behavioral Sciences, 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_DECIMALS = 12
"""0.9 - 0.8 and 0.8 - 0.7 are one difference, and floating point makes them two."""

_EXACT_UP_TO = 50
"""2^50 patterns of signs are counted without rounding in float64."""


@dataclass(frozen=True)
class SignedRank:
    """Result of the signed-rank test of differences.

    `p` is two-sided, NaN where there are no differences and 1 where all are zero. `effect` is the rank-biserial
    correlation in [-1, 1]: the share of ranks on the positive side less that on the negative side, 0 where all are
    zero. `method` gives p: "exact", "asymptotic" (normal, corrected for ties) or "none". `zeros` differences were left
    out, and `has_ties` is True if others are equal in size.
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
