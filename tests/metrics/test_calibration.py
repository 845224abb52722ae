"""Calibration of a handful of voxels by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from segkit.metrics.calibration import measure_reliability, surrounding_box

PROBABILITIES = np.array([[0.1, 0.3, 0.7, 1.0]], np.float32)
REFERENCE = np.array([[False, True, True, True]])


def test_four_voxels_by_hand():
    # Two bins: 0.1 and 0.3 with mean 0.2, one of two present; 0.7 and 1.0 with mean 0.85, both present.
    found = measure_reliability(PROBABILITIES, REFERENCE, bins=2)
    np.testing.assert_array_equal(found.edges, [0.0, 0.5, 1.0])
    np.testing.assert_array_equal(found.count, [2, 2])
    np.testing.assert_allclose(found.confidence, [0.2, 0.85], rtol=1e-6)
    np.testing.assert_array_equal(found.frequency, [0.5, 1.0])
    assert found.calibration_error() == pytest.approx((2 * 0.3 + 2 * 0.15) / 4)
    assert found.average_calibration_error() == pytest.approx((0.3 + 0.15) / 2)
    assert found.brier_score() == pytest.approx((0.01 + 0.49 + 0.09 + 0.0) / 4)


def test_average_error_gives_every_bin_the_same_weight():
    # 98 voxels of certain background, right, and two called 0.9 that are not there.
    probabilities = np.repeat(np.array([0.0, 0.9], np.float32), [98, 2])[None]
    found = measure_reliability(probabilities, np.zeros((1, 100), bool))
    assert found.calibration_error() == pytest.approx(0.018)
    assert found.average_calibration_error() == pytest.approx(0.45)


def test_certainty_that_is_right_and_wrong():
    assert measure_reliability(REFERENCE.astype(np.float32), REFERENCE).calibration_error() == 0.0
    wrong = measure_reliability(1 - REFERENCE.astype(np.float32), REFERENCE)
    assert (wrong.calibration_error(), wrong.brier_score()) == (1.0, 1.0)
    # Half of the voxels called 0.5 are there: calibrated, and of no use.
    half = measure_reliability(np.full((1, 4), 0.5, np.float32), np.array([[True, False, True, False]]))
    assert (half.calibration_error(), half.brier_score()) == (0.0, 0.25)


def test_bins_hold_their_lower_end_and_the_last_holds_one():
    found = measure_reliability(np.array([[0.0, 0.5, 1.0]], np.float32), np.ones((1, 3), bool), bins=2)
    np.testing.assert_array_equal(found.count, [1, 2])
    assert math.isnan(measure_reliability(PROBABILITIES, REFERENCE, bins=15).frequency[0])


def test_only_voxels_that_count():
    inside = np.array([[True, False, False, True]])
    found = measure_reliability(PROBABILITIES, REFERENCE, inside, bins=2)
    assert found.calibration_error() == pytest.approx((0.1 + 0.0) / 2)
    nowhere = measure_reliability(PROBABILITIES, REFERENCE, np.zeros((1, 4), bool))
    assert math.isnan(nowhere.calibration_error())
    assert math.isnan(nowhere.average_calibration_error())
    assert math.isnan(nowhere.brier_score())


def test_slabs_and_cases_add_up(monkeypatch):
    generator = np.random.default_rng(0)
    probabilities, reference = generator.random((5, 6, 7), np.float32), generator.random((5, 6, 7)) > 0.4
    whole = measure_reliability(probabilities, reference)
    monkeypatch.setattr("segkit.metrics.calibration._SLAB_VOXELS", 1)
    halves = measure_reliability(probabilities[:2], reference[:2]) + measure_reliability(
        probabilities[2:], reference[2:]
    )
    np.testing.assert_array_equal(whole.count, halves.count)
    np.testing.assert_array_equal(whole.present, halves.present)
    np.testing.assert_allclose(whole.total, halves.total)
    assert whole.brier_score() == pytest.approx(halves.brier_score())
    # Straight from the definition.
    error = sum(
        abs(probabilities[chosen].sum(dtype=float) - reference[chosen].sum())
        for index in range(15)
        if (chosen := (probabilities * 15).astype(int) == index).any()
    )
    assert whole.calibration_error() == pytest.approx(error / whole.count.sum())


def test_what_is_no_probability_is_refused():
    with pytest.raises(ValueError, match=r"probabilities from -2 to 3 are not in \[0, 1\]"):
        measure_reliability(np.array([[-2.0, 3.0]], np.float32), np.ones((1, 2), bool))
    scaled = np.array([[np.float32(1) + np.float32(1.2e-7)]])  # one step above 1
    assert measure_reliability(scaled, np.ones((1, 1), bool)).count[-1] == 1


def test_box_is_twice_as_long_as_the_region():
    region = np.zeros((20, 20), bool)
    region[8:12, 1] = True
    # 4 rows from 8 grow by 2 at both ends; 1 column grows by 1.
    assert surrounding_box(region) == (slice(6, 14), slice(0, 3))
    region[17:20, 1] = True
    assert np.zeros((20, 20))[surrounding_box(region)].shape == (18, 3)  # rows 2 to the edge
    assert surrounding_box(np.zeros((3, 3), bool)) is None
