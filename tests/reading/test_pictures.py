"""Two-dimensional pictures: planes, masks, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from segkit.errors import DataError
from segkit.reading.files import count_channels, read_labels, read_volume, write_labels
from segkit.reading.geometry import same_grid
from segkit.reading.volume import Grid


def test_pictures_and_their_channels(tmp_path: Path) -> None:
    colour = np.zeros((4, 6, 3), np.uint8)
    colour[1, 2] = (10, 20, 30)
    PIL.Image.fromarray(colour).save(tmp_path / "c.png")
    PIL.Image.fromarray(colour[..., 0]).save(tmp_path / "g.bmp")
    PIL.Image.fromarray(np.repeat(colour[..., :1], 3, axis=2)).save(tmp_path / "grey_as_rgb.png")
    assert [count_channels(tmp_path / name) for name in ("c.png", "g.bmp", "grey_as_rgb.png")] == [3, 1, 3]
    for channel, value in enumerate((10, 20, 30)):
        volume = read_volume(tmp_path / "c.png", channel=channel)
        assert volume.array.shape == volume.grid.shape == (4, 6)
        assert volume.array[1, 2] == value
        assert read_volume(tmp_path / "g.bmp", channel=channel).array[1, 2] == 10
    assert read_volume(tmp_path / "grey_as_rgb.png").array[1, 2] == 10
    with pytest.raises(DataError, match="holds 3 channels"):
        read_volume(tmp_path / "c.png")


def test_palette_and_black_and_white_masks_give_their_indices(tmp_path: Path) -> None:
    indices = np.zeros((4, 6), np.uint8)
    indices[1, 2] = 2
    palette = PIL.Image.fromarray(indices)
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "p.png")
    PIL.Image.fromarray(indices > 0).save(tmp_path / "b.png")
    assert read_labels(tmp_path / "p.png")[0][1, 2] == 2
    assert read_labels(tmp_path / "b.png")[0].max() == 1
    assert count_channels(tmp_path / "p.png") == 3
    assert read_volume(tmp_path / "p.png", channel=1).array[1, 2] == 255


def test_a_picture_mask_is_png(tmp_path: Path) -> None:
    labels = np.zeros((4, 6), np.uint8)
    labels[1, 2] = 3
    grid = Grid((4, 6), np.eye(4))
    write_labels(tmp_path / "a.png", labels, grid)
    read, read_back = read_labels(tmp_path / "a.png")
    np.testing.assert_array_equal(read, labels)
    assert same_grid(grid, read_back) is None
    with pytest.raises(DataError, match=r"not written as \.jpg; expected \.png"):
        write_labels(tmp_path / "a.jpg", labels, grid)


def test_several_pictures_in_one_file_are_refused(tmp_path: Path) -> None:
    pages = [PIL.Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (1, 2)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match="holds 2 pictures; expected one picture"):
        read_volume(tmp_path / "a.tif")
