"""Components of masks, and the best matching of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from segkit.metrics.lesions import box_around, components_of, match_one_to_one, overlaps


def test_corners_connect_and_boxes_are_tight():
    mask = np.zeros((6, 6, 6), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[4, 2:4, 5] = True
    found = components_of(mask)
    assert (found.count, found.voxels.tolist()) == (2, [2, 2])
    assert found.boxes[0] == (slice(0, 2), slice(0, 2), slice(0, 2))
    assert found.boxes[1] == (slice(4, 5), slice(2, 4), slice(5, 6))
    assert found.mask(1, found.boxes[0]).sum() == 2
    assert not found.mask(1, found.boxes[1]).any()


@pytest.mark.parametrize("shape", [(1, 9), (5, 7), (1, 1, 6), (1, 5, 5), (4, 5, 3)])
def test_components_are_those_of_another_library(shape):
    for seed in range(40):
        generator = np.random.default_rng(seed)
        mask = generator.random(shape) < generator.random()
        expected, count = ndimage.label(mask, np.ones((3,) * len(shape)))
        found = components_of(mask)
        assert found.count == count
        assert np.array_equal(found.ids > 0, mask)
        assert len(set(zip(found.ids[mask].tolist(), expected[mask].tolist(), strict=True))) == count


def test_nothing_has_no_components():
    assert components_of(np.zeros((2, 2), bool)).count == 0


def test_every_pair_that_shares_voxels():
    reference, prediction = np.zeros((2, 1, 12), bool)
    reference[0, 0:5] = reference[0, 7:12] = True
    prediction[0, 3:9] = prediction[0, 11] = True
    assert overlaps(components_of(prediction), components_of(reference)) == {(1, 1): 2, (2, 1): 2, (2, 2): 1}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({}, {}),
        ({(1, 1): 0.6, (1, 2): 0.5, (2, 1): 0.5}, {1: 2, 2: 1}),  # 1.0 in all, where the best pair first leaves 0.6
        ({(1, 1): 0.9, (1, 2): 0.3, (2, 1): 0.3}, {1: 1}),
        ({(1, 1): 0.5, (1, 2): 0.25, (2, 1): 0.25}, {1: 2, 2: 1}),  # of two equal sums the one with more pairs
        ({(3, 7): 0.1, (3, 9): 0.2, (8, 7): 0.3}, {3: 9, 8: 7}),
    ],
)
def test_the_best_matching_is_not_the_greedy_one(scores, expected):
    assert match_one_to_one(scores, bonus=1e-6) == expected


def test_many_matches_need_no_table_of_all_against_all():
    chain = {(lesion, lesion + step): 0.5 - 0.1 * step for lesion in range(1, 30_000, 2) for step in (0, 1)}
    assert match_one_to_one(chain, bonus=1e-6) == {lesion: lesion for lesion in range(1, 30_000, 2)}


def test_boxes_stay_within_the_shape():
    boxes = [(slice(1, 2), slice(3, 5)), (slice(2, 4), slice(0, 1))]
    assert box_around(boxes, (9, 6)) == (slice(1, 4), slice(0, 5))
    assert box_around(boxes, (9, 6), margin=2) == (slice(0, 6), slice(0, 6))
