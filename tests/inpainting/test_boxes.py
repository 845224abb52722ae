"""Boxes that reach outside of an array, and the boxes of the parts of a hole."""

from __future__ import annotations

import numpy as np

from segkit.inpainting.predictor import Box, boxes_of


def test_cut_gives_0_outside() -> None:
    row = np.array([1, 2, 3])
    assert Box((-1,), (3,)).cut(row).tolist() == [0, 1, 2]
    assert Box((2,), (3,)).cut(row).tolist() == [3, 0, 0]
    assert Box((7,), (2,)).cut(row).tolist() == [0, 0]
    assert Box((-5,), (2,)).cut(row).tolist() == [0, 0]


def test_cut_takes_leading_axes() -> None:
    image = np.arange(12).reshape(2, 2, 3)
    assert Box((1, 1), (2, 2)).cut(image).tolist() == [[[4, 5], [0, 0]], [[10, 11], [0, 0]]]


def test_paste_writes_where_it_may_and_nowhere_else() -> None:
    image = np.zeros((1, 2, 3), int)
    box = Box((-1, 1), (2, 3))
    box.paste(np.arange(6).reshape(1, 2, 3) + 1, image, np.array([[True] * 3, [True, False, True]]))
    assert image.tolist() == [[[0, 4, 0], [0, 0, 0]]]


def test_parts_of_a_hole_have_boxes_of_their_own() -> None:
    hole = np.zeros((20, 9, 9), bool)
    hole[1:4, 2:5, 2:3] = True
    hole[12:14, 2:5, 5:7] = True
    found = sorted(boxes_of(hole), key=lambda box: box.start)
    assert found == [Box((1, 2, 2), (3, 3, 1)), Box((12, 2, 5), (2, 3, 2))]


def test_boxes_that_touch_go_together() -> None:
    hole = np.zeros((12, 12), bool)
    hole[0:4, 0] = True
    hole[3, 0:6] = True
    hole[0, 5] = True  # inside the box of the first part, though no neighbour of it
    hole[9:11, 9] = True
    assert sorted(boxes_of(hole), key=lambda box: box.start) == [Box((0, 0), (4, 6)), Box((9, 9), (2, 1))]


def test_no_hole_has_no_box() -> None:
    assert boxes_of(np.zeros((3, 3, 3), bool)) == []
