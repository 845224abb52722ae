"""Pictures in output folders: that files are real pictures, with colours and legends."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from segkit.labels import SCHEMES
from segkit.reading.volume import Grid
from segkit.report.figures import curves_figure, overlay_figure
from segkit.report.images import COLOURS

RAS = np.eye(4)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def volume() -> np.ndarray:
    """Brightness tells the place: 100 x + 10 y + z + 1."""
    x, y, z = np.indices((4, 5, 6))
    return (100 * x + 10 * y + z + 1).astype(np.float32)


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
