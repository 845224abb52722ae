"""Confidence intervals of a mean and a median over cases, by resampling patients.

The interval is the percentile bootstrap (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13): the
middle 95 % of the means, or medians, of as many patients drawn with replacement. With few cases it is too narrow for a
mean, by as much as a normal interval is narrower than Student's; this is corrected (the expanded percentile interval:
Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69, 2015), but not for a median.

The BCa interval is not used: its acceleration comes from the jackknife, which is inconsistent for a median (Efron &
Tibshirani, section 11.6), and for medians of segmentation scores bootstrap methods other than the percentile can fail
altogether (André et al., Some Hidden Traps of Confidence Intervals in Medical Image Segmentation, 2025).
`benchmarks/interval_coverage.py` measures the coverage of these intervals.

All cases of a patient are drawn together, because they are not independent (the cluster bootstrap: Davison & Hinkley,
Bootstrap Methods and their Application, 1997, section 3.8).
"""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
RESAMPLES = 5000
"""Efron & Tibshirani ask for 1000 or more where the ends of an interval are wanted."""

_BLOCK = 1 << 21
"""Weights that are held at a time: 16 MB, for any number of cases."""

Interval = tuple[float, float]
"""Lower and upper end."""


def mean_interval(
    values: ArrayLike,
    patients: Sequence[Hashable] | None = None,
    *,
    level: float = LEVEL,
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
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """Confidence interval of the median over cases; arguments as for `mean_interval`."""
    patient, count = number_patients(patients, len(np.asarray(values)))
    if count < 2:
        return None
    return _middle(_resampled(_medians, values, patient, count, resamples, seed), level)


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
    means: NDArray[np.float64] = weights @ ascending / weights.sum(axis=1)
    return means


def _medians(ascending: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    reached = np.cumsum(weights, axis=1)
    half = reached[:, -1:] / 2
    lower, upper = (reached >= half).argmax(axis=1), (reached > half).argmax(axis=1)
    medians: NDArray[np.float64] = (ascending[lower] + ascending[upper]) / 2
    return medians
