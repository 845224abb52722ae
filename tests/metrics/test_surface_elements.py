"""Surfaces made of elements: areas of marching-cubes triangles by hand, percentiles of area."""

from __future__ import annotations

import math

import numpy as np
import pytest

from segkit.metrics.surface import element_areas_mm2, element_hausdorff_mm

MILLIMETRE = (1.0, 1.0, 1.0)


def area(*corners: str, spacing_mm=MILLIMETRE) -> float:
    """Area of the element around which these corners of the cube are inside, `011` for (0, 1, 1)."""
    return float(element_areas_mm2(spacing_mm)[sum(1 << int(corner, 2) for corner in corners)])


@pytest.mark.parametrize(
    ("corners", "expected"),
    [
        ([], 0),
        (["000"], math.sqrt(3) / 8),  # an equilateral triangle of side sqrt(2) / 2
        (["000", "001"], math.sqrt(2) / 2),  # a rectangle of 1 by sqrt(2) / 2
        (["000", "011"], 2 * math.sqrt(3) / 8),  # two corners that share no edge: two triangles
        (["000", "001", "010"], 1 / 2 + 3 * math.sqrt(3) / 8),
        (["000", "001", "010", "011"], 1),  # a face of the cube
        (["000", "001", "010", "100"], 3 * math.sqrt(3) / 4),  # a hexagon of side sqrt(2) / 2
        (["000", "001", "011", "111"], math.sqrt(3) / 2 + math.sqrt(2) / 2),  # a path through the cube
        (["000", "011", "101", "110"], 4 * math.sqrt(3) / 8),
        (["001", "010", "011", "100", "101", "110", "111"], math.sqrt(3) / 8),  # all but one corner
    ],
)
def test_areas_of_elements(corners, expected):
    assert area(*corners) == pytest.approx(expected)


def test_areas_in_millimetres():
    spacing = (1.0, 2.0, 3.0)  # faces of 6, 3 and 2 mm^2 across the three axes
    assert area("000", "001", "010", "011", spacing_mm=spacing) == 6
    assert area("000", "010", "100", "110", spacing_mm=spacing) == 2
    assert area("000", "100", spacing_mm=spacing) == pytest.approx(math.hypot(3, 2) / 2)
    assert area("000", spacing_mm=spacing) == pytest.approx(7 / 8)  # hypot(6, 3, 2) = 7
    assert area("000", "001", "011", "111", spacing_mm=spacing) == pytest.approx(
        7 / 2 + (math.hypot(3, 6) + math.hypot(3, 2)) / 4
    )


def test_a_box_far_away_is_as_far_from_the_other_as_its_corners():
    near, far = np.zeros((2, 4, 4, 20), bool)
    near[1:3, 1:3, 1:3] = True
    far[1:3, 1:3, 11:13] = True
    # Elements lie at the corners of voxels: of each box those at 10 mm, 11 mm and 12 mm from the nearest of the other
    # are 8, 8 + 1 and 8 + 1; the last layer has more than a twentieth of the area.
    assert element_hausdorff_mm(far, near, MILLIMETRE) == 10
    assert element_hausdorff_mm(far, near, (1.0, 1.0, 2.5)) == 25


def test_a_single_voxel_has_eight_elements():
    voxel, other = np.zeros((2, 9, 9, 9), bool)
    voxel[2, 2, 2] = other[2, 2, 5] = True
    assert element_hausdorff_mm(voxel, other, MILLIMETRE) == 3
    assert element_hausdorff_mm(voxel, other, (1.0, 1.0, 2.0)) == 6


def test_a_percentile_is_one_of_area():
    bar, longer = np.zeros((2, 3, 3, 60), bool)
    bar[1, 1, 2:52], longer[1, 1, 2:54] = True, True
    # The longer bar: 4 x 51 elements of sqrt(2) / 2 between 4 + 4 of sqrt(3) / 8. Off the other by 1 mm and 2 mm are
    # 4 of the former and 4 of the latter: 2.5 % of the area.
    assert element_hausdorff_mm(longer, bar, MILLIMETRE, percentile=97) == 0
    assert element_hausdorff_mm(longer, bar, MILLIMETRE, percentile=98) == 1
    assert element_hausdorff_mm(longer, bar, MILLIMETRE, percentile=100) == 2


def test_empty_masks():
    empty = np.zeros((3, 3, 3), bool)
    full = ~empty
    assert math.isnan(element_hausdorff_mm(empty, empty, MILLIMETRE))
    assert element_hausdorff_mm(full, empty, MILLIMETRE) == element_hausdorff_mm(empty, full, MILLIMETRE) == math.inf
    assert element_hausdorff_mm(full, full, MILLIMETRE) == 0
