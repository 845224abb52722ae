"""Overlap fractions on masks small enough to count by eye."""

from __future__ import annotations

import math

import numpy as np
import pytest

from segkit.metrics.overlap import (
    dice,
    dice_by_region,
    precision,
    region_mask,
    sensitivity,
    specificity,
    volume_ml,
)

PREDICTION = np.array([[1, 1, 1, 0], [0, 0, 0, 0]], bool)
REFERENCE = np.array([[0, 1, 1, 1], [1, 0, 0, 0]], bool)  # TP 2, FP 1, FN 2, TN 3
EMPTY = np.zeros_like(REFERENCE)


def test_fractions():
    assert dice(PREDICTION, REFERENCE) == pytest.approx(4 / 7)
    assert sensitivity(PREDICTION, REFERENCE) == pytest.approx(2 / 4)
    assert precision(PREDICTION, REFERENCE) == pytest.approx(2 / 3)
    assert specificity(PREDICTION, REFERENCE) == pytest.approx(3 / 4)
    assert specificity(PREDICTION, REFERENCE, judged_voxels=100) == pytest.approx(95 / 96)


def test_undefined_fractions_are_nan():
    assert math.isnan(dice(EMPTY, EMPTY))
    assert math.isnan(sensitivity(PREDICTION, EMPTY))
    assert math.isnan(precision(EMPTY, REFERENCE))
    assert math.isnan(specificity(PREDICTION, ~EMPTY))


def test_one_empty_mask_has_no_overlap():
    assert dice(PREDICTION, EMPTY) == dice(EMPTY, PREDICTION) == 0.0
    assert sensitivity(EMPTY, REFERENCE) == 0.0
    assert precision(PREDICTION, EMPTY) == 0.0


def test_volume_in_millilitres():
    mask = np.ones((2, 5, 10), bool)  # 100 voxels of 6 mm^3
    assert volume_ml(mask, (1.0, 2.0, 3.0)) == pytest.approx(0.6)


def test_region_mask_is_the_union_of_its_values():
    labels = np.array([[0, 1, 2], [3, 4, 255]], np.uint8)
    np.testing.assert_array_equal(region_mask(labels, (1, 255)), [[False, True, False], [False, False, True]])


def test_dice_by_region_of_label_maps():
    prediction = np.array([1, 2, 3, 0], np.uint8)
    reference = np.array([1, 1, 0, 3], np.uint8)
    scores = dice_by_region(prediction, reference, {"WT": (1, 2, 3), "TC": (1, 3), "RC": (4,)})
    assert scores["WT"] == pytest.approx(2 * 2 / 6)
    assert scores["TC"] == pytest.approx(2 * 1 / 5)
    assert math.isnan(scores["RC"])
