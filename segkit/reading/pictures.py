"""Two-dimensional pictures through PIL: grey (H, W) or the red, green and blue planes of a colour picture.

Cameras store photographs as the sensor lies and note how to turn them (EXIF 2.3, tag 274, Orientation). They are turned
here as by every viewer.
"""

from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.TiffImagePlugin

from segkit.errors import DataError
from segkit.reading.volume import (
    Grid,
    ImageHeader,
    as_data_errors,
    damaged,
    pick_channel,
    plain_numbers,
    refuse_implausible,
    require_file,
)
from segkit.shapes import AnyArray

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm")

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM")
"""PIL chooses by content and knows forty more formats, one of which (EPS) is a program that Ghostscript runs."""

_ALWAYS_PIXELS, _MOST_PIXELS_PER_BYTE = 2**22, 10_000
"""Deflate packs at most 1032 bytes, of eight black or white pixels each, into one."""
_WIDTH, _HEIGHT, _ORIENTATION = 256, 257, 274
_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
"""By EXIF orientation, what turns the stored picture as it is to be shown; from 5 on, rows become columns."""
_GREY_MODES = frozenset({"1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F"})


def open_picture(path: Path) -> ImageHeader:
    """The header of a picture: 1 channel where it is grey, 3 (red, green, blue) where it is in colour.

    The alpha of an RGBA picture is not counted, and can be read as channel 3.
    """
    size = require_file(path)
    with as_data_errors(path), PIL.Image.open(path, formats=_FORMATS) as picture:
        width, height = picture.size
        refuse_implausible(path, (height, width), bytes_per_voxel=0, stored_bytes=size, is_compressed=True)
        if height * width > _ALWAYS_PIXELS + _MOST_PIXELS_PER_BYTE * size:
            raise damaged(path, f"the header claims {height} x {width} pixels, and the file has {size} bytes")
        frames = getattr(picture, "n_frames", 1)
        if frames > 1 and picture.format != "MPO":  # a JPEG of a phone; its other pictures are a preview or a depth map
            remedy = "Split it, or convert a stack of slices to .nii.gz"
            raise DataError(f"the file holds {frames} pictures", where=path, expected="one picture", remedy=remedy)
        is_grey = picture.mode in _GREY_MODES
        if picture.mode == "P":
            palette = np.reshape(picture.getpalette("RGB") or [], (-1, 3))
            is_grey = bool((palette == palette[:, :1]).all())
        is_turned = _orientation(picture) > 4
        if is_turned and picture.format != "TIFF":  # of which PIL gives the size as shown
            height, width = width, height

    def read(channel: int | None) -> AnyArray:
        with as_data_errors(path), PIL.Image.open(path, formats=_FORMATS) as stored:
            picture = _upright(stored)
            if is_grey:
                # A grey picture among coloured ones has the same grey in all three planes.
                pick_channel(path, 3, channel or 0)
                grey = picture.convert("L") if picture.mode in ("1", "P", "LA") else picture
                return plain_numbers(np.array(grey), path)
            readable = 4 if picture.mode == "RGBA" else 3
            planes = np.array(picture.convert("RGBA" if picture.mode in ("P", "RGBA") else "RGB"))[..., :readable]
        if channel is None and (planes[..., :3] == planes[..., :1]).all():
            return planes[..., 0]
        return planes[..., pick_channel(path, readable, channel)]

    grid = Grid((height, width), np.eye(4), source=path, is_turned=is_turned)
    return ImageHeader(grid, 1 if is_grey else 3, read)


def open_mask(path: Path) -> ImageHeader:
    """The header of a picture of label values: a palette picture gives its indices, a black-and-white one 0 and 1."""
    header = open_picture(path)

    def read(channel: int | None) -> AnyArray:
        with as_data_errors(path), PIL.Image.open(path, formats=_FORMATS) as picture:
            if picture.mode in ("1", "P"):
                return np.asarray(_upright(picture)).astype(np.uint8)
        return header.read(channel)

    return ImageHeader(header.grid, 1, read)


def _orientation(picture: PIL.Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none."""
    with suppress(Exception):  # PIL raises SyntaxError and others where the EXIF block is damaged
        found = picture.getexif().get(_ORIENTATION)
        return found if found in _TURNS else 1
    return 1


def _upright(picture: PIL.Image.Image) -> PIL.Image.Image:
    turn = _TURNS.get(_orientation(picture))
    if turn is not None and isinstance(picture, PIL.TiffImagePlugin.TiffImageFile):
        # PIL turns these itself, and Pillow 13 mixes up the pixels of uncompressed ones: undo what it prepared.
        picture._size = picture.tag_v2[_WIDTH], picture.tag_v2[_HEIGHT]
        del picture.getexif()[_ORIENTATION]
    return picture if turn is None else picture.transpose(turn)


def save_picture(path: Path, array: AnyArray) -> None:
    """Write (H, W) or (H, W, 3); PIL chooses the format by the suffix."""
    PIL.Image.fromarray(np.ascontiguousarray(array)).save(path)
