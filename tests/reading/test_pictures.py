"""Two-dimensional pictures: planes, masks, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from segkit.errors import DataError
from segkit.labels import classes_scheme
from segkit.preparing.preprocessing import load_case
from segkit.reading.case import Case, ImageFile
from segkit.reading.files import count_channels, read_grid, read_labels, read_volume, write_labels
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


UPRIGHT = np.array([[10, 60, 110], [160, 210, 250]], np.uint8)
STORED = {  # EXIF 2.3, tag 274: the sides of the shown picture where row 0 and column 0 of the stored one lie
    1: UPRIGHT,  # top, left
    2: UPRIGHT[:, ::-1],  # top, right
    3: UPRIGHT[::-1, ::-1],  # bottom, right
    4: UPRIGHT[::-1],  # bottom, left
    5: UPRIGHT.T,  # left, top
    6: UPRIGHT.T[::-1],  # right, top
    7: UPRIGHT.T[::-1, ::-1],  # right, bottom
    8: UPRIGHT.T[:, ::-1],  # left, bottom
}


def save_turned(path: Path, picture: np.ndarray, orientation: int, mode: str = "L", **options: object) -> Path:
    exif = PIL.Image.Exif()
    exif[274] = orientation
    image = PIL.Image.fromarray(np.ascontiguousarray(picture))
    if mode == "P":
        image.putpalette([value // 3 for value in range(768)])
    (image if mode == "P" else image.convert(mode)).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("suffix", "mode", "options"),
    [
        *[("png", mode, {}) for mode in ("L", "RGB", "P")],
        *[("tif", mode, {"compression": packing}) for mode in ("L", "RGB", "P") for packing in (None, "tiff_lzw")],
    ],
)
def test_pictures_are_turned_as_viewers_show_them(
    tmp_path: Path, orientation: int, suffix: str, mode: str, options: dict[str, object]
) -> None:
    path = save_turned(tmp_path / f"a.{suffix}", STORED[orientation], orientation, mode, **options)
    assert read_grid(path).shape == (2, 3)
    labels = read_labels(path)[0] if mode in ("L", "P") else read_volume(path, 2).array
    assert labels.tolist() == UPRIGHT.tolist()


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_photographs_are_turned(tmp_path: Path, orientation: int) -> None:
    large = np.kron(STORED[orientation], np.ones((16, 16), np.uint8))  # whole JPEG blocks of one grey
    path = save_turned(tmp_path / "a.jpg", large, orientation, "RGB", quality=95)
    volume = read_volume(path, 0)
    assert volume.array.shape == volume.grid.shape == (32, 48)
    assert np.abs(volume.array[8::16, 8::16].astype(int) - UPRIGHT).max() <= 2


def test_a_mask_of_the_unturned_picture_is_named(tmp_path: Path) -> None:
    photograph = save_turned(tmp_path / "eye.jpg", STORED[6], 6)
    PIL.Image.fromarray(np.ones((3, 2), np.uint8)).save(tmp_path / "unturned.png")
    PIL.Image.fromarray(np.ones((2, 3), np.uint8)).save(tmp_path / "turned.png")
    case = Case("eye", "eye", {"grey": ImageFile(photograph)}, ImageFile(tmp_path / "turned.png"))
    scheme = classes_scheme("classes", {"vessel": 1})
    assert load_case(case, ("grey",), scheme).image.shape == (1, 2, 3)
    unturned = replace(case, label=ImageFile(tmp_path / "unturned.png"))
    with pytest.raises(DataError, match=r"unturned\.png fits eye\.jpg as it is stored, .*EXIF.*rows and columns"):
        load_case(unturned, ("grey",), scheme)


def test_damaged_exif_and_a_phone_with_two_pictures_in_a_file(tmp_path: Path) -> None:
    picture = PIL.Image.fromarray(UPRIGHT)
    picture.save(tmp_path / "a.png", exif=b"Exif\0\0garbage")
    assert read_volume(tmp_path / "a.png").array.tolist() == UPRIGHT.tolist()
    picture.save(tmp_path / "a.mpo", save_all=True, append_images=[PIL.Image.fromarray(255 - UPRIGHT)], quality=95)
    phone = (tmp_path / "a.mpo").rename(tmp_path / "phone.jpg")
    assert np.abs(read_volume(phone).array.astype(int) - UPRIGHT).max() < 20


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
