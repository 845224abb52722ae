from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from segkit.errors import DataError
from segkit.preparing.holes import (
    ChallengeRules,
    TumourShape,
    challenge_hole,
    inverse_ranks,
    tumour_components,
    unhealthy_region,
    whole_tumour,
)

Mask = NDArray[np.bool_]


def _box(shape: tuple[int, ...], *extents: tuple[int, int]) -> Mask:
    mask = np.zeros(shape, np.bool_)
    mask[tuple(slice(first, last) for first, last in extents)] = True
    return mask


def _pool(*sides: int) -> list[TumourShape]:
    """Cubes of these sides, in a brain of 100,000 voxels."""
    return [TumourShape(np.ones((side,) * 3, np.bool_), side**3 / 100_000) for side in sides]


def test_components_of_800_voxels_are_kept_and_filled() -> None:
    shape = (40, 40, 40)
    tumour = _box(shape, (0, 10), (0, 10), (0, 8)) | _box(shape, (20, 30), (20, 30), (20, 30))
    tumour |= _box(shape, (0, 7), (30, 37), (0, 16))  # 784 voxels
    tumour[25, 25, 25] = False
    brain = np.ones(shape, np.bool_)
    large, small = tumour_components(tumour, brain)
    assert (large.mask.shape, large.share) == ((10, 10, 10), 1000 / 64000)
    assert large.mask.all()
    assert (small.mask.shape, small.share) == ((10, 10, 8), 800 / 64000)
    assert whole_tumour(tumour).sum() == 1800
    assert whole_tumour(tumour, ChallengeRules(smallest_voxels=700)).sum() == 2584
    assert unhealthy_region(tumour).sum() < unhealthy_region(tumour, ChallengeRules(smallest_voxels=700)).sum()


def test_voxels_that_touch_at_a_corner_are_one_component() -> None:
    shape = (30, 30, 30)
    tumour = _box(shape, (0, 10), (0, 10), (0, 10)) | _box(shape, (10, 13), (10, 13), (10, 13))
    (only,) = tumour_components(tumour, np.ones(shape, np.bool_))
    assert only.mask.shape == (13, 13, 13)


def test_the_unhealthy_region_reaches_five_voxels_farther() -> None:
    tumour = _box((40, 40, 40), (15, 25), (15, 25), (15, 25))
    region = unhealthy_region(tumour)
    assert np.flatnonzero(region[:, 20, 20]).tolist() == list(range(10, 30))
    assert not region[10, 10, 20]  # 5 x sqrt(2) away
    assert not unhealthy_region(np.zeros((5, 5, 5), np.bool_)).any()


def test_ranks_are_inverse() -> None:
    shares = [number / 100 for number in range(1, 41)]
    # 0.30 is the 30th smallest of 40 and goes with the 30th largest, 0.11; 5 % are 2 ranks.
    assert [shares[rank] for rank in inverse_ranks(shares, 0.30, 0.05)] == [0.09, 0.10, 0.11, 0.12, 0.13]
    assert [shares[rank] for rank in inverse_ranks(shares, 0.9, 0.05)] == [0.01, 0.02, 0.03]
    assert [shares[rank] for rank in inverse_ranks(shares, 0.001, 0.05)] == [0.38, 0.39, 0.40]
    assert list(inverse_ranks([0.5], 0.1, 0.05)) == [0]


@pytest.mark.parametrize(("side", "expected"), [(10, 14), (12, 12), (14, 10)])
def test_large_tumours_get_small_holes(side: int, expected: int) -> None:
    brain = np.ones((64, 64, 64), np.bool_)
    tumour = _box(brain.shape, (0, side), (0, side), (0, side))
    pool = [TumourShape(shape.mask, shape.mask.sum() / brain.size) for shape in _pool(10, 12, 14)]
    for seed in range(4):
        hole = challenge_hole(brain, tumour, pool, np.random.default_rng(seed))
        assert hole.sum() == pytest.approx(expected**3, rel=0.06)


def test_holes_obey_the_rules() -> None:
    axes = np.ogrid[:48, :48, :40]
    brain = np.asarray(sum((axis - middle) ** 2 for axis, middle in zip(axes, (24, 24, 20), strict=True)) < 19**2)
    tumour = _box(brain.shape, (12, 20), (16, 26), (14, 24))
    rules = ChallengeRules(margin_voxels=3)
    distance = ndimage.distance_transform_edt(~unhealthy_region(tumour, rules))
    shares = []
    for seed in range(25):
        hole = challenge_hole(brain, tumour, _pool(9, 10, 11), np.random.default_rng(seed), rules)
        assert distance[hole].min() >= 3
        shares.append(np.count_nonzero(hole & brain) / np.count_nonzero(hole))
        assert np.array_equal(hole, challenge_hole(brain, tumour, _pool(9, 10, 11), np.random.default_rng(seed), rules))
    assert 0.75 <= min(shares) < 1


def test_of_two_points_the_farther_one_is_taken() -> None:
    brain = np.ones((200, 5, 5), np.bool_)
    tumour = _box(brain.shape, (0, 1), (0, 5), (0, 5))
    rules = ChallengeRules(smallest_voxels=1, margin_voxels=1)
    places = [
        np.argwhere(challenge_hole(brain, tumour, _pool(1), np.random.default_rng(seed), rules))[0, 0]
        for seed in range(300)
    ]
    # The larger of two uniform numbers is 2/3 of the range on average, deviation 0.24 / sqrt(300).
    assert np.mean(places) / 200 == pytest.approx(2 / 3, abs=0.05)


def test_without_a_tumour_any_shape_may_come() -> None:
    brain = np.ones((40, 40, 40), np.bool_)
    sizes = {
        round(challenge_hole(brain, ~brain, _pool(4, 8), np.random.default_rng(seed)).sum(), -2) for seed in range(12)
    }
    assert sizes == {100, 500}


def test_pictures_work_as_volumes_do() -> None:
    brain = np.ones((60, 60), np.bool_)
    tumour = _box(brain.shape, (0, 10), (0, 12))
    rules = ChallengeRules(smallest_voxels=50)
    pool = tumour_components(tumour, brain, rules)
    hole = challenge_hole(brain, tumour, pool, np.random.default_rng(0), rules)
    assert hole.sum() == pytest.approx(120, rel=0.1)
    assert np.argwhere(hole).max() > 15


def test_what_leaves_no_room_is_told() -> None:
    brain = _box((30, 30, 30), (5, 25), (5, 25), (5, 25))
    pool = _pool(10)
    with pytest.raises(DataError, match="no voxel of the brain lies farther than 5 voxels from the tumour"):
        challenge_hole(brain, brain, pool, np.random.default_rng(0))
    corner = _box(brain.shape, (5, 15), (5, 15), (5, 15))
    with pytest.raises(
        DataError, match=r"no place for a healthy hole was found in 20 attempts; .* Leave this case out"
    ):
        challenge_hole(brain, corner, _pool(16), np.random.default_rng(0), ChallengeRules(attempts=20))
    with pytest.raises(DataError, match="there is no tumour of 800 or more voxels"):
        challenge_hole(brain, corner, [], np.random.default_rng(0))
    with pytest.raises(DataError, match="the brain is empty"):
        tumour_components(corner, np.zeros_like(corner))


def test_limits_scale_with_the_volume() -> None:
    assert ChallengeRules().scaled_to(240) == ChallengeRules()
    half = ChallengeRules().scaled_to(120)
    assert (half.smallest_voxels, half.margin_voxels) == (100, 2.5)
    tiny = ChallengeRules().scaled_to(24)
    assert (tiny.smallest_voxels, tiny.margin_voxels) == (64, 1.0)
