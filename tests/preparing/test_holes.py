from __future__ import annotations

import cc3d
import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy import ndimage

from segkit.preparing.hole_shapes import (
    blob_hole,
    box_hole,
    components,
    cropped,
    diameter_of,
    stroke_hole,
    turned,
    voxels_of,
    without_cavities,
)
from segkit.preparing.holes import ChallengeRules, HoleMaker, HolesConfig, brain_mask, grow, whole_tumour

Mask = NDArray[np.bool_]

KINDS = ("boxes", "strokes", "blobs", "tumours")


def _only(kind: str, **more: object) -> HolesConfig:
    return HolesConfig.model_validate({**{name: float(name == kind) for name in KINDS}, **more})


def _ball(size: int, radius: float, dims: int = 3) -> Mask:
    axes = np.ogrid[(slice(size),) * dims]
    return np.asarray(sum((axis - (size - 1) / 2) ** 2 for axis in axes) <= radius**2)


def _pieces(mask: Mask) -> int:
    return int(cc3d.connected_components(mask, connectivity=26 if mask.ndim == 3 else 8, return_N=True)[1])


def test_sizes_are_those_of_balls_and_discs() -> None:
    assert voxels_of(2, 3) == pytest.approx(4 / 3 * np.pi)
    assert voxels_of(2, 2) == pytest.approx(np.pi)
    assert diameter_of(voxels_of(17, 3), 3) == pytest.approx(17)
    assert voxels_of(HolesConfig().diameter_range[0], 3) < 800  # the smallest and largest tumours of the challenge
    assert voxels_of(HolesConfig().diameter_range[1], 3) > 60_000


@pytest.mark.parametrize("make", [box_hole, stroke_hole, blob_hole])
@pytest.mark.parametrize("shape", [(40, 44, 36), (40, 44)])
def test_shapes_are_connected_and_as_large_as_asked(make: object, shape: tuple[int, ...]) -> None:
    assert callable(make)
    wanted = voxels_of(16, len(shape))
    for seed in range(10):
        hole = make(shape, np.random.default_rng(seed), 16)
        assert hole.shape == shape
        assert hole.dtype == np.bool_
        assert _pieces(hole) == 1
        assert 0.7 * wanted < hole.sum() < 1.3 * wanted
        assert np.array_equal(hole, make(shape, np.random.default_rng(seed), 16))
    assert not np.array_equal(hole, make(shape, np.random.default_rng(99), 16))


def test_blobs_enclose_nothing_and_are_no_balls() -> None:
    for seed in range(10):
        blob = blob_hole((30, 30, 30), np.random.default_rng(seed), 16)
        assert np.array_equal(ndimage.binary_fill_holes(blob), blob)
        extents = cropped(blob).shape
        assert np.prod(extents) > 1.95 * blob.sum()  # 6 / pi = 1.91 for a ball


def test_shapes_larger_than_the_array_are_cut() -> None:
    generator = np.random.default_rng(0)
    assert box_hole((4, 5), generator, 50).all()
    assert stroke_hole((10, 10), generator, 50).sum() >= 50
    assert 0 < blob_hole((6, 6, 6), generator, 30).sum() <= 215


def test_turning_keeps_the_volume() -> None:
    corner = np.zeros((12, 12, 12), np.bool_)
    corner[:6] = corner[:, :6] = True
    for seed in range(5):
        result = turned(corner, np.random.default_rng(seed))
        assert result.sum() == pytest.approx(corner.sum(), rel=0.05)
        assert turned(corner, np.random.default_rng(seed), 0.5).sum() == pytest.approx(corner.sum() / 8, rel=0.2)
    bar = np.ones((9, 1, 1), np.bool_)  # along the first axis: the turn about the third one lays it anywhere
    assert len({turned(bar, np.random.default_rng(seed)).shape for seed in range(6)}) > 3


def test_components_and_cavities() -> None:
    mask = np.zeros((8, 8), np.bool_)
    mask[1:6, 1:6] = True
    mask[3, 3] = False  # enclosed
    mask[6, 6] = True  # touches at a corner
    mask[0, 7] = True  # by itself
    first, second = components(mask)
    assert (first.shape, int(first.sum()), second.shape) == ((6, 6), 25, (1, 1))
    assert not whole_tumour(mask, ChallengeRules(smallest_voxels=2))[0, 7]
    assert np.array_equal(whole_tumour(mask, ChallengeRules(smallest_voxels=2))[1:], without_cavities(mask)[1:])
    filled = without_cavities(mask)
    assert filled[3, 3]
    assert filled.sum() == mask.sum() + 1
    assert np.array_equal(filled, ndimage.binary_fill_holes(mask))


def test_growing_is_by_distance_between_voxel_centres() -> None:
    mask = np.zeros((9, 9), np.bool_)
    mask[1, 4] = True
    rows, columns = np.ogrid[:9, :9]
    assert np.array_equal(grow(mask, 2), (rows - 1) ** 2 + (columns - 4) ** 2 <= 4)
    assert np.array_equal(grow(mask, 0), mask)
    assert not grow(np.zeros((3, 3), np.bool_), 5).any()


def test_the_brain_is_the_largest_part_with_its_cavities() -> None:
    image = np.zeros((6, 6, 6), np.int16)
    image[:4, :4, :4] = -3  # values below 0 are tissue too
    image[1, 1, 1] = 0
    image[5, 5, 5] = 8
    expected = np.zeros((6, 6, 6), np.bool_)
    expected[:4, :4, :4] = True
    assert np.array_equal(brain_mask(image), expected)
    assert not brain_mask(np.zeros((3, 3))).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [2, 3])
def test_holes_stay_where_they_are_allowed(kind: str, dims: int) -> None:
    brain = _ball(40, 18, dims)
    lesion = np.zeros_like(brain)
    lesion[(slice(18, 24),) * dims] = True
    config = _only(kind, diameter_range=(6, 20), min_voxels=30)
    allowed = ~grow(lesion, config.margin_voxels)
    maker = HoleMaker(config, [_ball(15, 6, dims), np.zeros((3,) * dims, np.bool_)])
    distance = ndimage.distance_transform_edt(~lesion)
    for seed in range(25):
        hole = maker.draw(brain, allowed, np.random.default_rng(seed))
        assert hole.shape == brain.shape
        assert distance[hole].min() > 5
        assert np.count_nonzero(hole & brain) >= 30
        assert np.array_equal(hole, maker.draw(brain, allowed, np.random.default_rng(seed)))


def test_three_quarters_of_a_hole_lie_in_the_brain() -> None:
    brain = np.zeros((32, 32, 32), np.bool_)
    brain[16:] = True
    everywhere = np.ones_like(brain)
    shares = []
    for kind in ("boxes", "blobs", "tumours"):
        maker = HoleMaker(_only(kind, diameter_range=(8, 14)), [_ball(12, 5)])
        for seed in range(20):
            hole = maker.draw(brain, everywhere, np.random.default_rng(seed))
            shares.append(np.count_nonzero(hole & brain) / np.count_nonzero(hole))
    assert min(shares) >= 0.75
    assert min(shares) < 1  # holes may reach beyond the brain


def test_the_largest_share_limits_drawn_and_given_shapes() -> None:
    brain = np.ones((24, 24, 24), np.bool_)
    for kind in KINDS:
        maker = HoleMaker(_only(kind, diameter_range=(40, 40), largest_share=0.2), [_ball(40, 19)])
        shares = [maker.draw(brain, brain, np.random.default_rng(seed)).mean() for seed in range(10)]
        assert 0.12 < np.mean(shares) < 0.23
        assert max(shares) < 0.26


def test_kinds_come_as_often_as_asked() -> None:
    config = HolesConfig(boxes=3, strokes=0, blobs=0, tumours=1, diameter_range=(8, 8))
    bar = np.ones((3, 40), np.bool_)
    maker = HoleMaker(config, [bar])
    brain = np.ones((64, 64), np.bool_)
    sizes = [int(maker.draw(brain, brain, np.random.default_rng(seed)).sum()) for seed in range(200)]
    bars = sum(size > 90 for size in sizes)  # 120 voxels, boxes have about 50
    assert 30 < bars < 70  # 50 expected, standard deviation 6.1
    alone = HoleMaker(config)  # no shapes: boxes only
    assert max(int(alone.draw(brain, brain, np.random.default_rng(seed)).sum()) for seed in range(20)) < 75


def test_tumours_only_without_any_are_blobs() -> None:
    brain = np.ones((32, 32), np.bool_)
    tumours, blobs = (
        HoleMaker(_only(kind)).draw(brain, brain, np.random.default_rng(1)) for kind in ("tumours", "blobs")
    )
    assert np.array_equal(tumours, blobs)


def test_little_room_gives_a_small_box_and_none_nothing() -> None:
    maker = HoleMaker(HolesConfig())
    brain = np.zeros((20, 20, 20), np.bool_)
    brain[10, 10, 10] = True
    hole = maker.draw(brain, np.ones_like(brain), np.random.default_rng(0))
    assert hole[10, 10, 10]
    assert hole.sum() == 64  # 4 x 4 x 4
    nowhere = np.zeros_like(brain)
    assert not maker.draw(brain, nowhere, np.random.default_rng(0)).any()
    background = maker.draw(nowhere, ~brain, np.random.default_rng(0))
    assert background.any()
    assert not background[10, 10, 10]


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ValidationError, match="all 0; one of them must be larger"):
        HolesConfig(boxes=0, strokes=0, blobs=0, tumours=0)
    with pytest.raises(ValidationError, match="expected two diameters from 1 up, in order"):
        HolesConfig(diameter_range=(20, 10))
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        HolesConfig(boxes=-1)


def test_parts_of_random_masks_are_those_of_scipy() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        mask = generator.random(tuple(generator.integers(1, 12, 2))) < generator.random()
        _, count = ndimage.label(mask, np.ones((3, 3)))
        parts = components(mask)
        assert len(parts) == count
        assert sum(int(part.sum()) for part in parts) == mask.sum()
