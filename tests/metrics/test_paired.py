"""Signed ranks, Holm's correction and effect sizes by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from segkit.metrics.statistics import holm, signed_rank


def test_three_cases_by_hand():
    # Sizes 0.1, 0.2, 0.3 rank 1, 2, 3: 1 + 3 are positive, 2 negative. Of the 8 patterns of signs the smaller sum is
    # 2 or less in 6 (+: none, 1, 2, and the same of -), so p = 6/8; the effect is (4 - 2) / 6.
    test = signed_rank([0.1, -0.2, 0.3])
    assert test.p == 6 / 8
    assert test.effect == pytest.approx(2 / 6)
    assert (test.method, test.zeros, test.has_ties) == ("exact", 0, False)
    # All of one sign: only the two extreme patterns are as far out.
    assert signed_rank([0.1, 0.2, 0.3]).p == 2 / 8
    assert signed_rank([-0.1, -0.2, -0.3]).effect == -1.0


def test_ties_share_their_rank_and_stay_exact():
    # 0.9 - 0.8 and 0.8 - 0.7 differ in floating point and are one size: ranks 1.5, 1.5, 3. The rank sum of the positive
    # is 6 in one pattern of eight and 0 in another.
    test = signed_rank([0.9 - 0.8, 0.8 - 0.7, 0.3])
    assert (test.method, test.has_ties) == ("exact", True)
    assert test.p == 2 / 8
    # - 1.5 against 1.5 + 3: sums of 1.5 or less or 4.5 or more are 0, 1.5, 1.5 and 6, 4.5, 4.5.
    other = signed_rank([-(0.9 - 0.8), 0.8 - 0.7, 0.3])
    assert other.p == 6 / 8
    assert other.effect == pytest.approx(3 / 6)


@pytest.mark.parametrize("cases", [5, 12, 50])
def test_exact_p_is_that_of_scipy(cases):
    differences = np.random.default_rng(cases).normal(0.3, 1.0, cases)
    assert signed_rank(differences).p == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue)
    tied = np.round(differences[:10], 1)
    every_sign = stats.wilcoxon(tied[tied != 0], method=stats.PermutationMethod())
    assert signed_rank(tied).p == pytest.approx(every_sign.pvalue)


def test_zeros_are_left_out_and_told():
    test = signed_rank([0.0, 0.1, 0.0, -0.2, 0.3])
    assert test == replace(signed_rank([0.1, -0.2, 0.3]), zeros=2)


def test_nothing_to_tell_apart():
    nothing = signed_rank([0.0, 0.0])
    assert (nothing.p, nothing.effect, nothing.method, nothing.zeros) == (1.0, 0.0, "none", 2)
    empty = signed_rank([])
    assert math.isnan(empty.p)
    assert empty.effect == 0.0


def test_many_cases_are_asymptotic_as_in_scipy():
    differences = np.round(np.random.default_rng(0).normal(0.2, 1.0, 80), 1)
    test = signed_rank(differences)
    assert (test.method, test.has_ties) == ("asymptotic", True)
    assert test.p == pytest.approx(stats.wilcoxon(differences, method="approx").pvalue)


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 is 0.04, 0.06, 0.06, 0.04, and none may fall below one before it.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    adjusted = holm([math.nan, 0.02, 0.5])
    assert math.isnan(adjusted[0])
    assert adjusted[1:] == [0.04, 0.5]
    assert holm([]) == []
