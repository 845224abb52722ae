"""Planes of a case and colours of labels: orientation, choice of slices, cropping."""

from __future__ import annotations

import numpy as np
import pytest

from segkit.labels import SCHEMES
from segkit.reading.volume import Grid
from segkit.report import images
from segkit.report.images import Gallery, content_box, label_colours, views_of

RAS = np.eye(4)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def volume() -> np.ndarray:
    """Brightness tells the place: 100 x + 10 y + z + 1."""
    x, y, z = np.indices((4, 5, 6))
    return (100 * x + 10 * y + z + 1).astype(np.float32)


def planes(affine, labels, spacing=(1.0, 1.0, 1.0)):
    grid = Grid((4, 5, 6), affine @ np.diag([*spacing, 1.0]))
    return {view.title: view for view in views_of(volume(), (labels,), grid)}


def one_voxel() -> np.ndarray:
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[1, 2, 4] = 1
    return labels


def test_planes_cut_through_the_structure_in_radiological_view():
    views = planes(RAS, one_voxel())
    axial = views["axial"].image  # z = 4; rows from the front (y = 4) back, columns from the right (x = 3) to the left
    assert axial.shape == (5, 4)
    assert axial[0, 0] == 100 * 3 + 10 * 4 + 4 + 1
    assert axial[-1, -1] == 4 + 1
    assert views["axial"].letters == ("R", "L", "A", "P")
    coronal = views["coronal"].image  # y = 2; rows from the top (z = 5) down
    assert coronal[0, 0] == 100 * 3 + 10 * 2 + 5 + 1
    sagittal = views["sagittal"].image  # x = 1; columns from the front (y = 4) back
    assert sagittal[0, 0] == 100 * 1 + 10 * 4 + 5 + 1
    assert [int(view.masks[0].sum()) for view in views.values()] == [1, 1, 1]


def test_other_orientation_shows_the_same_anatomy():
    turned = planes(LPS, one_voxel())["axial"].image  # x grows to the left, y to the back
    assert turned[0, 0] == 4 + 1  # voxel (0, 0, 4) is now the rightmost and foremost


def test_aspect_follows_the_spacing():
    views = planes(RAS, one_voxel(), spacing=(1.0, 2.0, 6.0))
    assert [view.aspect for view in views.values()] == pytest.approx([2.0, 6.0, 3.0])  # height by width of a pixel


def test_slice_that_shows_every_structure_wins_over_the_largest_one():
    labels = np.zeros((3, 3, 6), np.uint8)
    labels[:, :, 1] = 1
    labels[:2, :, 4] = 1
    labels[2, 0, 4] = 2
    assert images._richest_slice([labels], axis=2) == 4
    assert images._richest_slice([np.zeros_like(labels)], axis=2) == 3


def test_view_is_cropped_to_the_content():
    image = np.zeros((8, 9, 7), np.float32)
    image[2:5, 3:4, 1:7] = 5
    assert content_box(image) == (slice(2, 5), slice(3, 4), slice(1, 7))
    assert content_box(np.zeros((3, 4, 5))) == (slice(0, 3), slice(0, 4), slice(0, 5))


def test_without_a_scheme_labels_are_told_apart_by_value():
    colours = Gallery().colours()
    assert colours[1] == ("label 1", "#56B4E9")
    assert colours[8] == ("label 8", "#56B4E9")
    assert len(colours) == 255


def test_tissues_share_the_colours_of_the_regions_that_they_paint():
    colours = label_colours(SCHEMES["brats2017"])
    assert [name for name, _ in colours.values()] == ["ED", "NCR", "ET"]
    assert [colour for _, colour in colours.values()] == ["#56B4E9", "#D55E00", "#F0E442"]
