"""Still pictures of a case as one inline SVG: a row for each plane, with image, prediction, reference, uncertainty.

The image of a plane is stored once and used in every column; masks lie over it as small palette pictures, and the
outline of the reference is a path, crisp at every size.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from segkit.report.html import Markup, element
from segkit.report.images import CaseArrays
from segkit.report.planes import MASK_OPACITY, View, intensity_window, views_of
from segkit.shapes import AnyArray, LabelMap

_SIZES = ((256, 72), (160, 60), (96, 50))
"""Longest side in pixels and quality of the image, tried until the pictures of a case fit its share of the page."""
_SIZES_OF_ONE = ((640, 72), (400, 60), (256, 50))
"""The same for pictures, which have one plane only."""

_WIDTH, _WIDEST = 1000.0, 320.0
_GAP, _GUTTER, _HEAD = 8.0, 28.0, 28.0
_LAYERS = ("image", "prediction", "reference", "uncertainty")
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
    masks = arrays.masks
    views = views_of(arrays.image, tuple(masks.values()), arrays.grid, maps)
    window = intensity_window(arrays.image)
    for side, quality in _SIZES if arrays.grid.dims == 3 else _SIZES_OF_ONE:
        shrunk = [_shrunk(view, side) for view in views]
        picture = _draw(case_id, arrays.modality, shrunk, list(masks), colours, window, quality, key)
        if len(picture) <= most_bytes:
            return picture
    return None


def embedded_figure(path: Path, alternative: str, most_side: int = 1100) -> Markup:
    """A picture file of a run as an `img` with its data inside."""
    with Image.open(path) as picture:
        picture.thumbnail((most_side, most_side))
        address = _photo(picture.convert("RGB"), 72)
        width, height = picture.size
    return element("img", src=address, alt=alternative, width=width, height=height)


def _draw(
    case_id: str,
    modality: str,
    views: Sequence[View],
    masks: Sequence[str],
    colours: Mapping[int, tuple[str, str]],
    window: tuple[float, float],
    quality: int,
    key: str,
) -> Markup:
    layers = [layer for layer in _LAYERS if layer in ("image", *masks) or (layer == "uncertainty" and views[0].maps)]
    widest = max(view.image.shape[1] for view in views)
    scale = min((_WIDTH - _GUTTER + _GAP) / len(layers) - _GAP, _WIDEST) / widest
    step = widest * scale + _GAP
    low, high = window
    heads = [f"image ({modality})", *layers[1:]]
    parts = [
        element("text", head, x=f"{_GUTTER + (column + 0.5) * step - _GAP / 2:.1f}", y="18", class_="middle")
        for column, head in enumerate(heads)
    ]
    top = _HEAD
    for row, view in enumerate(views):
        name, width, height = f"{key}-{row}", view.image.shape[1] * scale, view.image.shape[0] * view.aspect * scale
        grey = np.clip((view.image.astype(np.float32) - low) / (high - low) * 255, 0, 255).astype(np.uint8)
        size = {"width": f"{width:.1f}", "height": f"{height:.1f}", "preserveAspectRatio": "none"}
        parts.append(element("defs", element("image", href=_photo(Image.fromarray(grey), quality), id=name, **size)))
        parts.append(
            element("text", view.title, class_="middle", transform=f"translate(14 {top + height / 2:.1f}) rotate(-90)")
        )
        for column, layer in enumerate(layers):
            left = _GUTTER + column * step + (step - _GAP - width) / 2
            place = {"x": f"{left:.1f}", "y": f"{top:.1f}"}
            parts.append(element("use", href=f"#{name}", **place))
            if layer == "image":
                parts += _letters(view, left, top, width, height)
            elif layer == "uncertainty":
                parts.append(element("image", href=_heat(view.maps[0]), **place, **size))
            else:
                tint = _tint(view.masks[masks.index(layer)], colours)
                parts.append(element("image", href=tint, class_="mask", **place, **size))
            if layer == "prediction" and "reference" in masks:
                pixel = (width / view.image.shape[1], height / view.image.shape[0])
                path = outline(view.masks[masks.index("reference")] > 0, left, top, pixel)
                parts += [element("path", d=path, class_="outline")] if len(path) <= _MOST_OUTLINE else []
        top += height + _GAP
    planes = ", ".join(view.title for view in views if view.title)
    label = f"{case_id}: {', '.join(layers)}" + (f" in the {planes} plane" if planes else "")
    whole = _GUTTER + step * len(layers)
    return element("svg", *parts, viewBox=f"0 0 {whole:.0f} {top:.0f}", role="img", aria_label=label, class_="planes")


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


def _letters(view: View, left: float, top: float, width: float, height: float) -> list[Markup]:
    places = (
        (5, height / 2 + 5, ""),
        (width - 5, height / 2 + 5, "end"),
        (width / 2, 17, "middle"),
        (width / 2, height - 6, "middle"),
    )
    return [
        element("text", letter, x=f"{left + x:.1f}", y=f"{top + y:.1f}", class_=f"letter {kind}".strip())
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
