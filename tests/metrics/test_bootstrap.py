"""Bootstrap intervals against what is known without drawing, and against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from segkit.metrics.statistics import mean_interval, median_interval


def test_mean_of_zeros_and_ones_is_binomial():
    # Of 100 drawn from 40 ones and 60 zeros, the count of ones is binomial: 2.5 % lie below 31 and above 50.
    values = np.repeat([1.0, 0.0], [40, 60])
    exact = stats.binom(100, 0.4).ppf([0.025, 0.975]) / 100
    assert mean_interval(values) == pytest.approx(exact, abs=0.011)


def test_intervals_agree_with_scipy_and_with_student():
    values = np.random.default_rng(3).normal(0.8, 0.1, size=60)
    mean = mean_interval(values, resamples=20_000)
    median = median_interval(values, resamples=20_000)
    half = stats.t(59).ppf(0.975) * values.std(ddof=1) / np.sqrt(60)
    assert mean == pytest.approx((values.mean() - half, values.mean() + half), abs=0.002)
    widened = 1 - 2 * stats.norm.sf(np.sqrt(60 / 59) * stats.t(59).ppf(0.975))
    for ours, statistic, level in ((mean, np.mean, widened), (median, np.median, 0.95)):
        theirs = stats.bootstrap(
            (values,),
            statistic,
            n_resamples=20_000,
            confidence_level=level,
            method="percentile",
            rng=np.random.default_rng(5),
        ).confidence_interval
        assert ours == pytest.approx(tuple(theirs), abs=0.003)


def test_few_cases_are_no_narrower_than_by_student():
    # Five normal values: 2.776 standard errors to each side, where resampled means lie within 1.96 * sqrt(4 / 5).
    values = stats.norm.ppf([0.1, 0.3, 0.5, 0.7, 0.9])
    half = stats.t(4).ppf(0.975) * values.std(ddof=1) / np.sqrt(5)
    low, high = mean_interval(values, resamples=50_000)
    assert (low, high) == pytest.approx((-half, half), rel=0.2)
    assert high > 1.2 * 1.96 * np.sqrt(4 / 5) * values.std(ddof=1) / np.sqrt(5)


def test_all_resamples_of_two_cases():
    # Two cases give means 0, 1/2 and 1 with chances 1/4, 1/2 and 1/4, so 95 % reach from end to end.
    assert mean_interval([0.0, 1.0]) == median_interval([0.0, 1.0]) == (0.0, 1.0)
    assert mean_interval([0.0, 1.0], level=0.2) == (0.5, 0.5)


def test_cases_of_one_patient_are_drawn_together():
    values = np.repeat(np.random.default_rng(0).uniform(size=12), 4)
    patients = [f"p{index // 4}" for index in range(48)]
    together, apart = mean_interval(values, patients), mean_interval(values)
    # Copies of a case are no evidence: the interval is that of the twelve, and twice as wide as that of 48, or more.
    assert together == pytest.approx(mean_interval(values[::4]), abs=1e-12)
    assert np.ptp(together) > 2 * np.ptp(apart)


def test_patients_with_more_cases_weigh_more():
    # Drawn are: a twice, mean 0; both, mean 1/3; b twice, mean 1.
    assert mean_interval([0.0, 0.0, 1.0], ["a", "a", "b"]) == (0.0, 1.0)
    assert mean_interval([0.0, 0.0, 1.0], ["a", "a", "b"], level=0.2) == pytest.approx((1 / 3, 1 / 3))
    assert median_interval([0.0, 0.0, 1.0], ["a", "a", "b"], level=0.4) == (0.0, 0.0)


def test_one_patient_has_no_interval():
    for interval in (mean_interval, median_interval):
        assert interval([]) is None
        assert interval([0.5]) is None
        assert interval([0.5, 0.7], ["a", "a"]) is None
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5)


def test_the_seed_decides_and_blocks_do_not(monkeypatch):
    values = np.random.default_rng(1).uniform(size=30)
    whole = mean_interval(values, seed=7)
    assert mean_interval(values, seed=7) == whole
    assert mean_interval(values, seed=8) != whole
    monkeypatch.setattr("segkit.metrics.statistics._BLOCK", 1000)
    assert mean_interval(values, seed=7) == pytest.approx(whole, abs=1e-12)


def test_patients_must_be_as_many_as_cases():
    with pytest.raises(ValueError, match="1 patients for 2 cases"):
        mean_interval([0.1, 0.2], ["a"])
