"""The midplane of a head, mirroring at it, and the detail that a fill takes from the other half."""

from __future__ import annotations

import numpy as np
import pytest

from segkit.inpainting.inputs import add_detail, rough_fill
from segkit.inpainting.midplane import Midplane, find_midplane, mirror_of

UNIT = (1.0, 1.0, 1.0)


def mirrored_row(values: list[int], middle: float, missing: tuple[int, ...] = ()) -> tuple[list[float], list[bool]]:
    image = np.array(values, np.float32)[None, :, None, None]
    hole = np.zeros(image.shape[1:], bool)
    hole[list(missing)] = True
    plane = Midplane.through(np.array([middle, 0, 0]), (0, 0), UNIT)
    mirrored, is_known = mirror_of(image, hole, plane, (0, 0, 0), hole.shape)
    return mirrored.ravel().tolist(), is_known.ravel().tolist()


def test_mirrored_by_hand() -> None:
    assert mirrored_row([1, 2, 3, 4, 5], 2)[0] == [5, 4, 3, 2, 1]
    assert mirrored_row([1, 2, 3, 4, 5], 2.5)[0] == [0, 5, 4, 3, 2]  # voxel 0 lies opposite voxel 5, which is none
    assert mirrored_row([1, 2, 3, 4, 5], 1)[0] == [3, 2, 1, 0, 0]
    assert mirrored_row([2, 4, 6, 8], 1.25)[0] == pytest.approx([7, 5, 3, 0])  # halfway between two voxels


def test_what_is_missing_or_background_is_not_known_on_the_other_side() -> None:
    assert mirrored_row([1, 2, 3, 4, 5, 6], 2.5, missing=(1, 2, 3)) == (
        [6, 5, 0, 0, 0, 1],
        [True, True, False, False, False, True],
    )
    assert mirrored_row([1, 0, 3, 4], 1.25)[1] == [True, False, False, False]  # half of each of two voxels


def test_a_box_that_reaches_outside_is_that_part_of_the_mirrored_image() -> None:
    image = np.random.default_rng(0).uniform(1, 2, (2, 9, 10, 8)).astype(np.float32)
    nothing, plane = np.zeros(image.shape[1:], bool), Midplane.through(np.array([4.2, 4, 5]), (0.1, -0.2), UNIT)
    whole, is_known = mirror_of(image, nothing, plane, (0, 0, 0), (9, 10, 8))
    part, is_known_there = mirror_of(image, nothing, plane, (-2, 3, 2), (6, 5, 9))
    np.testing.assert_allclose(part[:, 2:, :, :6], whole[:, :4, 3:8, 2:], atol=1e-5)
    assert np.array_equal(is_known_there[2:, :, :6], is_known[:4, 3:8, 2:])


def test_mirrored_twice_is_the_same_place() -> None:
    plane = Midplane.through(np.array([10.3, 4, 7]), (0.1, -0.05), (1.0, 2.0, 0.5))
    np.testing.assert_allclose(plane.matrix @ plane.matrix, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(plane.matrix @ plane.offset + plane.offset, 0, atol=1e-12)
    distance_mm = plane.matrix @ [1, 0, 0] * [1, 2, 0.5]
    assert np.linalg.norm(distance_mm) == pytest.approx(1)  # lengths in mm stay


def head(
    spacing_mm: tuple[float, float, float], tilts: tuple[float, float], middle_mm: float
) -> tuple[np.ndarray, Midplane]:
    """A head of 48 x 60 x 44 mm in 64 mm a side that is its own mirror image at a tilted plane, and the plane."""
    shape = tuple(round(64 / side) for side in spacing_mm)
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) * spacing_mm - [middle_mm, 31, 32]
    normal = np.array([1, *tilts]) / np.linalg.norm([1, *tilts])
    forward = np.cross([0, 0, 1], normal) / np.linalg.norm(np.cross([0, 0, 1], normal))
    aside, along, up = (places @ axis for axis in (normal, forward, np.cross(normal, forward)))
    image = 4 + np.cos(np.abs(aside) / 3) + np.sin(along / 4 + np.abs(aside) / 6) + np.sin(up / 5)
    image[(aside / 24) ** 2 + (along / 30) ** 2 + (up / 22) ** 2 > 1] = 0
    return image[None].astype(np.float32), Midplane.through(
        np.array([middle_mm, 31, 32]) / spacing_mm, tilts, spacing_mm
    )


@pytest.mark.parametrize(
    ("spacing_mm", "degrees", "middle_mm", "has_lesion"),
    [
        (UNIT, (0, 0), 32.0, False),
        (UNIT, (6, -9), 29.3, False),
        (UNIT, (-12, 4), 34.6, True),
        ((1.0, 2.0, 1.6), (7, 5), 33.1, True),
    ],
)
def test_the_midplane_of_a_head_that_was_turned_and_moved(
    spacing_mm: tuple[float, float, float], degrees: tuple[float, float], middle_mm: float, has_lesion: bool
) -> None:
    image, plane = head(spacing_mm, (np.tan(np.radians(degrees[0])), np.tan(np.radians(degrees[1]))), middle_mm)
    tissue = np.argwhere(image[0] != 0)
    if has_lesion:
        inside = tuple(slice(round(15 / side), round(27 / side)) for side in spacing_mm)
        image[0][inside] = 0
    found = find_midplane(image, spacing_mm)
    away = (tissue @ (found.matrix - plane.matrix).T + found.offset - plane.offset) * spacing_mm
    assert np.linalg.norm(away, axis=1).max() < 0.5  # mm, of the mirrored place of any voxel


def test_an_empty_volume_is_cut_in_half() -> None:
    plane = find_midplane(np.zeros((1, 10, 4, 4), np.float32), UNIT)
    np.testing.assert_allclose(plane.matrix @ [0, 1, 2] + plane.offset, [9, 1, 2])


def test_detail_of_the_other_half_is_added_to_the_fill() -> None:
    """A ramp with a bump: the fill keeps the ramp; the mirrored image has the bump, on another ramp."""
    ramp = np.arange(12, dtype=np.float32)[None, :, None].repeat(12, 2) + 10
    bump, hole = np.zeros_like(ramp), np.zeros((12, 12), bool)
    bump[0, 5:7, 5:7] = 1
    hole[3:9, 3:9] = True
    other, everywhere = 30 - 2 * ramp + bump, np.ones((12, 12), bool)
    filled = rough_fill(ramp, hole)
    np.testing.assert_allclose(add_detail(filled, hole, other, everywhere, share=1), ramp + bump, atol=0.05)
    np.testing.assert_allclose(add_detail(filled, hole, other, everywhere, share=0.5), ramp + bump / 2, atol=0.05)
    np.testing.assert_allclose(add_detail(filled, hole, other, ~everywhere, share=1), ramp, atol=0.05)
    assert np.array_equal(add_detail(filled, hole, other, everywhere)[:, ~hole], ramp[:, ~hole])
