"""Still pictures of a case as one inline SVG: a row for each plane, with image, prediction, reference, uncertainty.

The image of a plane is stored once and used in every column; masks lie over it as small palette pictures, and the
outline of the reference is a path, crisp at every size.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image, features

from segkit.report.images import MASK_OPACITY, CaseArrays, View, intensity_window, views_of
from segkit.report.templates import render
from segkit.shapes import AnyArray, LabelMap

_SIZES = ((256, 72), (160, 60), (96, 50))
"""Longest side in pixels and quality of the image, tried until the pictures of a case fit its share of the page."""
_SIZES_OF_ONE = ((640, 72), (400, 60), (256, 50))
"""The same for pictures, which have one plane only."""

_WIDTH, _WIDEST = 1000.0, 320.0
_GAP, _GUTTER, _HEAD = 8.0, 28.0, 28.0
_UNCERTAIN = (0xE6, 0x9F, 0x00)
_MOST_OUTLINE = 12_000
"""Characters of an outline; vessels and the like go without."""


def case_picture(
    case_id: str, arrays: CaseArrays, colours: Mapping[int, tuple[str, str]], key: str, most_bytes: int
) -> Markup | None:
    """The picture of a case, at the largest size that fits; None where none does.

    Args:
        case_id: Part of the text alternative.
        arrays: Image and masks of the case.
        colours: Label value -> name and colour.
        key: Distinguishes the parts of this picture from those of the others in a page.
        most_bytes: Its share of the page.
    """
    maps = () if arrays.uncertainty is None else (arrays.uncertainty,)
    views = views_of(arrays.image, tuple(arrays.masks.values()), arrays.grid, maps)
    for side, quality in _SIZES if arrays.grid.dims == 3 else _SIZES_OF_ONE:
        picture = _draw(case_id, arrays, [_shrunk(view, side) for view in views], colours, quality, key)
        if len(picture) <= most_bytes:
            return picture
    return None


def embedded_figure(path: Path, most_side: int = 1100) -> dict[str, object]:
    """A picture file of a run as the address (with its data inside) and the size of an `img`."""
    with Image.open(path) as picture:
        picture.thumbnail((most_side, most_side))
        return {"address": _photo(picture.convert("RGB"), 72), "width": picture.width, "height": picture.height}


def _draw(
    case_id: str,
    arrays: CaseArrays,
    views: Sequence[View],
    colours: Mapping[int, tuple[str, str]],
    quality: int,
    key: str,
) -> Markup:
    masks = list(arrays.masks)
    layers = ["image", *masks, *(["uncertainty"] if views[0].maps else [])]
    low, high = intensity_window(arrays.image)
    widest = max(view.image.shape[1] for view in views)
    scale = min((_WIDTH - _GUTTER + _GAP) / len(layers) - _GAP, _WIDEST) / widest
    step = widest * scale + _GAP
    rows, top = [], _HEAD
    for row, view in enumerate(views):
        width, height = view.image.shape[1] * scale, view.image.shape[0] * view.aspect * scale
        left = _GUTTER + (step - _GAP - width) / 2
        boxes = [(left + column * step, top, width, height) for column in range(len(layers))]
        grey = np.clip((view.image.astype(np.float32) - low) / (high - low) * 255, 0, 255).astype(np.uint8)
        rows.append(
            {
                "key": f"{key}-{row}",
                "photo": _photo(Image.fromarray(grey), quality),
                "title": view.title,
                "middle": top + height / 2,
                "width": width,
                "height": height,
                "tiles": [_tile(layer, view, masks, colours, box) for layer, box in zip(layers, boxes, strict=True)],
            }
        )
        top += height + _GAP
    planes = ", ".join(view.title for view in views if view.title)
    names = [f"image ({arrays.modality})", *layers[1:]]
    return render(
        "planes.html",
        width=f"{_GUTTER + step * len(layers):.0f}",
        height=f"{top:.0f}",
        label=f"{case_id}: {', '.join(layers)}" + (f" in the {planes} plane" if planes else ""),
        heads=[(_GUTTER + (column + 0.5) * step - _GAP / 2, name) for column, name in enumerate(names)],
        rows=rows,
    )


def _tile(
    layer: str,
    view: View,
    masks: Sequence[str],
    colours: Mapping[int, tuple[str, str]],
    box: tuple[float, float, float, float],
) -> dict[str, object]:
    """One layer of a plane in `box` (left, top, width, height): what lies over the image there."""
    left, top, width, height = box
    tile: dict[str, object] = {"letters": (), "overlay": None, "is_mask": layer in masks, "outline": None}
    if layer == "image":
        tile["letters"] = _letters(view, left, top, width, height)
    elif layer == "uncertainty":
        tile["overlay"] = _heat(view.maps[0])
    else:
        tile["overlay"] = _tint(view.masks[masks.index(layer)], colours)
    if layer == "prediction" and "reference" in masks:
        pixel = (width / view.image.shape[1], height / view.image.shape[0])
        path = outline(view.masks[masks.index("reference")] > 0, left, top, pixel)
        tile["outline"] = path if len(path) <= _MOST_OUTLINE else None
    return {"x": left, "y": top, **tile}


def outline(mask: NDArray[np.bool_], left: float, top: float, factor: tuple[float, float]) -> str:
    """The border of a mask (rows, columns) along the edges of its pixels, as SVG path data.

    A pixel is `factor` (width, height) large, and the first one lies at (left, top).
    """
    padded = np.pad(mask, 1).astype(np.int8)
    width, height = factor
    commands = []
    for row, begin, end in _stretches(np.diff(padded, axis=0)[:, 1:-1] != 0):
        commands.append(f"M{left + begin * width:.1f} {top + row * height:.1f}h{(end - begin) * width:.1f}")
    for column, begin, end in _stretches((np.diff(padded, axis=1)[1:-1] != 0).T):
        commands.append(f"M{left + column * width:.1f} {top + begin * height:.1f}v{(end - begin) * height:.1f}")
    return "".join(commands)


def _stretches(edges: NDArray[np.bool_]) -> list[tuple[int, int, int]]:
    """(line, begin, end) of every run of True along the second axis."""
    steps = np.diff(np.pad(edges, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (lines, begins), (_, ends) = np.nonzero(steps == 1), np.nonzero(steps == -1)
    return list(zip(lines.tolist(), begins.tolist(), ends.tolist(), strict=True))


def _shrunk(view: View, side: int) -> View:
    """A view with at most `side` pixels along its longer side; masks keep their values."""
    rows, columns = view.image.shape
    if max(rows, columns) <= side:
        return view
    shape = (max(1, round(columns * side / max(rows, columns))), max(1, round(rows * side / max(rows, columns))))
    smooth = [_resized(array.astype(np.float32), shape, Image.Resampling.BOX) for array in (view.image, *view.maps)]
    masks = tuple(_resized(mask, shape, Image.Resampling.NEAREST) for mask in view.masks)
    aspect = view.aspect * (rows / columns) / (shape[1] / shape[0])
    return replace(view, image=smooth[0], masks=masks, aspect=aspect, maps=tuple(smooth[1:]))


def _resized(array: AnyArray, shape: tuple[int, int], how: Image.Resampling) -> AnyArray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(array)).resize(shape, how))


def _letters(view: View, left: float, top: float, width: float, height: float) -> list[dict[str, object]]:
    places = (
        (5, height / 2 + 5, "letter"),
        (width - 5, height / 2 + 5, "letter end"),
        (width / 2, 17, "letter middle"),
        (width / 2, height - 6, "letter middle"),
    )
    return [
        {"text": letter, "x": left + x, "y": top + y, "kind": kind}
        for letter, (x, y, kind) in zip(view.letters, places, strict=True)
        if letter
    ]


def _photo(picture: Image.Image, quality: int) -> str:
    return _address(picture, "webp" if features.check("webp") else "jpeg", quality=quality)


def _tint(mask: LabelMap, colours: Mapping[int, tuple[str, str]]) -> str:
    picture = Image.fromarray(np.ascontiguousarray(mask)).convert("P")
    palette = np.zeros((256, 3), np.uint8)
    for value, (_, colour) in colours.items():
        palette[value] = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    picture.putpalette(palette.tobytes())
    opacity = np.zeros(256, np.uint8)
    opacity[list(colours)] = round(255 * MASK_OPACITY)
    return _address(picture, "png", transparency=opacity.tobytes(), optimize=True)


def _heat(values: AnyArray) -> str:
    """Values in 0 to 1 as an orange that is the more opaque the larger they are, in 32 steps."""
    picture = Image.fromarray((np.clip(values, 0, 1) * 31).round().astype(np.uint8)).convert("P")
    picture.putpalette(bytes(_UNCERTAIN) * 256)
    opacity = np.zeros(256, np.uint8)
    opacity[:32] = np.linspace(0, 235, 32).round().astype(np.uint8)
    return _address(picture, "png", transparency=opacity.tobytes(), optimize=True)


def _address(picture: Image.Image, kind: str, **options: object) -> str:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
