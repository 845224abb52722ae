"""Pictures: what is drawn where, seen through the planes and curves, and that files are real pictures."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from segkit.labels import SCHEMES
from segkit.reading.volume import Grid
from segkit.report import planes as planes_module
from segkit.report.curves import training_curves
from segkit.report.figures import curves_figure, overlay_figure
from segkit.report.planes import COLOURS, content_box, views_of

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
    assert planes_module._richest_slice([labels], axis=2) == 4
    assert planes_module._richest_slice([np.zeros_like(labels)], axis=2) == 3


def test_view_is_cropped_to_the_content():
    image = np.zeros((8, 9, 7), np.float32)
    image[2:5, 3:4, 1:7] = 5
    assert content_box(image) == (slice(2, 5), slice(3, 4), slice(1, 7))
    assert content_box(np.zeros((3, 4, 5))) == (slice(0, 3), slice(0, 4), slice(0, 5))


def is_near(pixels: np.ndarray, colour: str) -> np.ndarray:
    return np.abs(pixels - np.array(to_rgb(colour)) * 255).max(axis=-1) < 12


@pytest.mark.parametrize("has_reference", [True, False])
def test_overlay_of_a_volume_is_written_with_a_legend(tmp_path, has_reference):
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[1:3, 1:4, 2:5] = 1
    labels[1, 2, 3] = 4
    path = tmp_path / "deep" / "case.png"
    reference = np.roll(labels, 1, axis=2) if has_reference else None
    overlay_figure(path, volume(), labels, Grid((4, 5, 6), LPS), reference=reference, scheme=SCHEMES["brats2017"])
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert pixels.shape[0] == (990 if has_reference else 660)
    legend = pixels[-60:]
    drawn = [is_near(legend, colour).any() for colour in COLOURS[:3]]
    assert drawn == [False, True, True]  # NCR and ET, in the colours of the page


def test_overlay_of_a_picture(tmp_path):
    image = np.arange(48, dtype=np.uint8).reshape(6, 8)
    labels = np.zeros((6, 8), np.uint8)
    labels[2:4, 2:4] = 1
    title = "eye of Andr\udce9"  # from a file name that is not UTF-8
    overlay_figure(tmp_path / "p.png", image, labels, Grid((6, 8), np.eye(4)), reference=labels, title=title)
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > 2 * picture.height  # image, prediction and reference side by side


def test_empty_masks_and_flat_images_are_drawn_without_warnings(tmp_path):
    empty = np.zeros((4, 5, 6), np.uint8)
    overlay_figure(tmp_path / "e.png", np.zeros((4, 5, 6)), empty, Grid((4, 5, 6), RAS), reference=empty)
    assert (tmp_path / "e.png").stat().st_size > 0


def test_curves_are_sorted_into_panels():
    rows = [
        {"step": 10, "epoch": 1, "loss": 1.0, "lr": 0.1, "seconds": 3.0},
        {"step": 20, "loss": float("nan"), "lr": 0.05, "score": 0.5, "dice": {"WT": 0.8, "ET": None}},
    ]
    assert training_curves(rows) == {
        "loss": {"loss": [(10, 1.0)]},
        "validation": {"score": [(20, 0.5)], "WT": [(20, 0.8)]},
        "learning rate": {"lr": [(10, 0.1), (20, 0.05)]},
    }


def test_curves_are_written_also_before_anything_is_recorded(tmp_path):
    curves_figure(tmp_path / "none.png", [])
    curves_figure(tmp_path / "some.png", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "dice": {"WT": 0.1}}])
    heights = []
    for name in ("none", "some"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            heights.append(picture.height)
    assert heights[1] == 2 * heights[0]


def test_no_window_system_is_touched(tmp_path):
    sys.modules.pop("matplotlib.pyplot", None)
    curves_figure(tmp_path / "c.png", [{"step": 1, "loss": 2.0}])
    assert "matplotlib.pyplot" not in sys.modules
