"""Fills without a network: polynomials they must reproduce, dense solutions, holes at the edge."""

from __future__ import annotations

import itertools
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from segkit.errors import DataError
from segkit.inpainting.inputs import rough_fill, smooth_fill
from segkit.runtime import variables_with

harmonic_fill, biharmonic_fill = partial(smooth_fill, power=1), partial(smooth_fill, power=2)
FILLS = {"harmonic": harmonic_fill, "biharmonic": biharmonic_fill}

SHAPES = [(12, 14), (9, 11, 10)]


def coordinates(shape: tuple[int, ...]) -> list[np.ndarray]:
    return list(np.meshgrid(*(np.arange(size, dtype=np.float64) for size in shape), indexing="ij"))


def box_hole(shape: tuple[int, ...], start: int = 3, stop: int = 7) -> np.ndarray:
    hole = np.zeros(shape, bool)
    hole[(slice(start, stop),) * len(shape)] = True
    return hole


def laplacian(shape: tuple[int, ...]) -> np.ndarray:
    """Sum of the differences to the face neighbours that exist, as a dense matrix of all voxels."""
    number = np.arange(np.prod(shape)).reshape(shape)
    matrix = np.zeros((number.size, number.size))
    for index in itertools.product(*map(range, shape)):
        for axis, step in itertools.product(range(len(shape)), (-1, 1)):
            other = list(index)
            other[axis] += step
            if 0 <= other[axis] < shape[axis]:
                matrix[number[index], number[tuple(other)]] += 1
                matrix[number[index], number[index]] -= 1
    return matrix


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_known_voxels_and_the_argument_stay_as_they_are(fill, shape):
    image = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    image[:, box_hole(shape)] = np.nan  # nothing may come from the hole
    before, hole = image.copy(), box_hole(shape)
    filled = fill(image, hole)
    assert filled.dtype == np.float32
    assert filled.shape == image.shape
    assert filled[:, ~hole].tobytes() == image[:, ~hole].tobytes()
    assert image.tobytes() == before.tobytes()
    assert np.isfinite(filled).all()
    assert not np.array_equal(filled[0][hole], filled[1][hole])  # channels are filled by themselves


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
def test_an_empty_hole_gives_the_image_back(fill):
    image = np.random.default_rng(0).normal(size=(1, 6, 7)).astype(np.float32)
    assert fill(image, np.zeros((6, 7), bool)).tobytes() == image.tobytes()


@pytest.mark.parametrize("fill", [harmonic_fill, biharmonic_fill])
@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_both_smooth_fills_reproduce_a_linear_ramp(fill, shape):
    ramp = sum((2 - axis) * x for axis, x in enumerate(coordinates(shape), start=-1)).astype(np.float32)[None]
    np.testing.assert_allclose(fill(ramp, box_hole(shape)), ramp, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_biharmonic_reproduces_a_quadratic_and_harmonic_does_not(shape):
    x, y, *_ = coordinates(shape)
    bowl = (x**2 - 3 * x * y + 0.5 * y**2 + x).astype(np.float32)[None]
    hole = box_hole(shape)
    np.testing.assert_allclose(biharmonic_fill(bowl, hole), bowl, atol=1e-4)
    assert np.abs(harmonic_fill(bowl, hole) - bowl).max() > 1


@pytest.mark.parametrize(("fill", "power"), [(harmonic_fill, 1), (biharmonic_fill, 2)])
@pytest.mark.parametrize("shape", [(5, 6), (4, 5, 3)], ids=["2d", "3d"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_smooth_fills_solve_the_dense_system(fill, power, shape, share):
    random = np.random.default_rng(7)
    image = random.normal(size=(1, *shape)).astype(np.float32)
    hole = random.random(shape) < share  # scattered: many parts, some at the edge, some joined by a corner only
    matrix, missing = np.linalg.matrix_power(laplacian(shape), power), hole.ravel()
    right = -matrix[np.ix_(missing, ~missing)] @ image.ravel()[~missing].astype(np.float64)
    expected = np.linalg.solve(matrix[np.ix_(missing, missing)], right)
    np.testing.assert_allclose(fill(image, hole)[0][hole], expected, atol=1e-5)


def test_harmonic_by_hand_at_the_edge():
    # A row of known 1 and 3 with one voxel between them, and a last voxel that only has its neighbour to follow.
    image = np.array([[[1, 0, 3, 0]]], np.float32)
    hole = np.array([[False, True, False, True]])
    np.testing.assert_allclose(harmonic_fill(image, hole), [[[1, 2, 3, 3]]], atol=1e-6)


def test_harmonic_stays_within_its_rim():
    random = np.random.default_rng(3)
    image = random.random((1, 20, 20, 20)).astype(np.float32)
    hole = box_hole((20, 20, 20), 0, 12)  # reaches three faces of the image
    filled = harmonic_fill(image, hole)[0][hole]
    assert 0 < filled.min() < filled.max() < 1


@pytest.mark.parametrize("fill", [harmonic_fill, biharmonic_fill])
def test_far_holes_do_not_touch_each_other(fill):
    image = np.random.default_rng(5).normal(size=(1, 30, 10)).astype(np.float32)
    first, second = np.zeros((2, 30, 10), bool)
    first[2:5, 3:6], second[20:24, 2:8] = True, True
    both, alone = fill(image, first | second), fill(image, first)
    np.testing.assert_allclose(both[0][first], alone[0][first], atol=1e-6)


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
def test_what_cannot_be_filled_is_refused(fill):
    image = np.ones((1, 4, 5), np.float32)
    with pytest.raises(DataError, match=r"hole is the whole image; expected known voxels"):
        fill(image, np.ones((4, 5), bool))
    with pytest.raises(DataError, match=r"hole has the shape \(5, 4\); expected \(4, 5\)"):
        fill(image, np.zeros((5, 4), bool))
    image[0, 1, 1] = np.nan
    with pytest.raises(DataError, match="known voxel is not a finite number"):
        fill(image, np.zeros((4, 5), bool))


def test_threads_do_not_change_a_bit():
    """More than 10,000 voxels, from which on a BLAS with several threads shares sums among them."""
    code = """
import hashlib, numpy as np
from segkit.inpainting.inputs import rough_fill, smooth_fill
image = np.random.default_rng(0).normal(500, 100, (1, 40, 40, 40)).astype(np.float32)
hole = np.zeros((40, 40, 40), bool)
hole[3:37, 3:37, 3:37] = True
print(hashlib.sha256(rough_fill(image, hole)).hexdigest())
"""
    variables = [variables_with(OMP_NUM_THREADS=count, OPENBLAS_NUM_THREADS=count) for count in ("1", "2")]
    digests = [subprocess.check_output([sys.executable, "-c", code], env=one, text=True) for one in variables]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_a_rough_fill_is_nearly_the_biharmonic_one_and_keeps_the_range(shape):
    first, *_, last = coordinates(shape)
    image = (np.sin(first / 2) + 0.05 * last**2)[None].astype(np.float32)
    hole = box_hole(shape)
    image[0, hole] = 1e6
    rough, exact = rough_fill(image, hole), biharmonic_fill(image, hole)
    assert np.array_equal(rough[:, ~hole], image[:, ~hole])
    low, high = image[:, ~hole].min(), image[:, ~hole].max()
    assert np.abs(rough - np.clip(exact, low, high)).max() < 0.01 * (high - low)
    assert rough.max() <= high


def test_a_rough_fill_does_not_overshoot_and_of_nothing_makes_0():
    ramp = np.clip(np.arange(12, dtype=np.float32) - 2, 0, 3)[None, :, None].repeat(12, 2)  # the plate would go on
    hole = np.zeros((12, 12), bool)
    hole[4:, 3:9] = True
    assert biharmonic_fill(ramp, hole).max() > 3.05
    assert rough_fill(ramp, hole).max() == 3
    assert not rough_fill(np.ones((2, 3, 3), np.float32), np.ones((3, 3), bool)).any()
