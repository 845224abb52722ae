"""Pictures of a case in the page: stills as one inline SVG, and volumes for the interactive viewer.

A still has a row for each plane, with image, prediction, reference and uncertainty. The image of a plane is stored once
and used in every column; masks lie over it as small palette pictures, and the outline of the reference is a path.

The viewer, NiiVue, is not part of this repository. The package `ipyniivue` (extra `viewer`) has it in a bundle for
notebooks; the bundle is read when a page is written, and its last line is rewritten to export NiiVue itself. The page
stores it as data, compressed and in base64, which becomes a script only when a reader opens the viewer.
"""

import base64
import gzip
import importlib.util
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image, features

from segkit.metrics.overlap import box_of
from segkit.reading.geometry import reorientation_to, reoriented_grid
from segkit.report.images import COLOURS, MASK_OPACITY, CaseArrays, View, content_box, intensity_window, views_of
from segkit.report.templates import render
from segkit.shapes import Affine, AnyArray, LabelMap

_SIZES = ((256, 72), (160, 60), (96, 50))
"""Longest side in pixels and quality of the image, tried until the pictures of a case fit its share of the page."""
_SIZES_OF_ONE = ((640, 72), (400, 60), (256, 50))
"""The same for pictures, which have one plane only."""

_WIDTH, _WIDEST = 1000.0, 320.0
_GAP, _GUTTER, _HEAD = 8.0, 28.0, 28.0
_UNCERTAIN = (0xE6, 0x9F, 0x00)
_MOST_OUTLINE = 12_000
"""Characters of an outline; vessels and the like go without."""


Colours = Mapping[int, tuple[str, str]]
"""Label value -> name and colour."""


def case_picture(case_id: str, arrays: CaseArrays, colours: Colours, key: str, most_bytes: int) -> Markup | None:
    """The picture of a case, at the largest size that fits `most_bytes`, its share of the page; None where none does.

    `case_id` is part of the text alternative, `colours` are by label value with their names, and `key` distinguishes
    the parts of this picture from those of the others in a page.
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


def _draw(case_id: str, arrays: CaseArrays, views: Sequence[View], colours: Colours, quality: int, key: str) -> Markup:
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
    layer: str, view: View, masks: Sequence[str], colours: Colours, box: tuple[float, float, float, float]
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
    sides = ((5, height / 2 + 5, "letter"), (width - 5, height / 2 + 5, "letter end"))
    ends = ((width / 2, 17, "letter middle"), (width / 2, height - 6, "letter middle"))
    places = zip(view.letters, (*sides, *ends), strict=True)
    return [{"text": text, "x": left + x, "y": top + y, "kind": kind} for text, (x, y, kind) in places if text]


def _photo(picture: Image.Image, quality: int) -> str:
    return _address(picture, "webp" if features.check("webp") else "jpeg", quality=quality)


def _tint(mask: LabelMap, colours: Colours) -> str:
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


_CLASS = re.compile(r'"Creating new Niivue instance"\).{0,300}?=\s*new ([\w$]+)\(', re.DOTALL)
"""Where the bundle makes its NiiVue; the name of the class differs from version to version."""
_EXPORT = re.compile(r"export\s*\{[^{}]*\}\s*;?\s*$")

DIFFERENCES = {1: ("missed", COLOURS[5]), 2: ("surplus", COLOURS[3]), 3: ("other label", COLOURS[4])}
"""Names and colours of the values of the difference layer; the colours are not those of the first three labels."""

_MOST_VOXELS = 1_500_000
_MARGIN_MM = 15.0
_SPARE_MM = 4.0


@dataclass(frozen=True)
class CaseVolumes:
    """One case for the viewer: layer -> gzipped NIfTI in base64; `facts` are the settings of their display."""

    layers: Mapping[str, str]
    facts: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Characters that the layers take in a page."""
        return sum(len(text) for text in self.layers.values())


@cache
def viewer_script() -> str | None:
    """NiiVue as a module that exports `Niivue`, gzipped, in base64; None where the package is missing or unknown."""
    found = importlib.util.find_spec("ipyniivue")
    try:
        script = Path(str(found and found.origin)).with_name("static").joinpath("widget.js").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    made, exported = _CLASS.search(script), _EXPORT.search(script)
    if made is None or exported is None:
        return None
    return _packed(f"{script[: exported.start()]}export{{{made[1]} as Niivue}};".encode())


def viewer_licence() -> str | None:
    """The licence of NiiVue, which must accompany it; None where it is not installed."""
    try:
        return metadata.distribution("ipyniivue").read_text("licenses/LICENSE")
    except metadata.PackageNotFoundError:
        return None


def case_volumes(arrays: CaseArrays) -> CaseVolumes | None:
    """A volume and its masks, cropped, in bytes; None for pictures.

    The image is cropped to its content; if that is large, to the masks with a margin, and if that is large too, every
    second or third voxel is kept. Intensities become 255 steps between the 0.05th and 99.95th percentile.
    """
    if arrays.grid.dims != 3:
        return None
    way = reorientation_to(arrays.grid, "RAS")
    grid = reoriented_grid(arrays.grid, way)
    image = way.apply(arrays.image)
    masks = {name: way.apply(mask) for name, mask in arrays.masks.items()}
    marked = np.any([mask > 0 for mask in masks.values()], axis=0) if masks else np.zeros(image.shape, np.bool_)
    box = _box(image, marked, grid.spacing_mm)
    step = 1
    while np.prod([-(-(part.stop - part.start) // step) for part in box]) > _MOST_VOXELS:
        step += 1
    cut = tuple(slice(part.start, part.stop, step) for part in box)
    affine = grid.affine @ np.diag([step, step, step, 1.0])
    affine[:3, 3] = grid.affine[:3, :3] @ [part.start for part in box] + grid.affine[:3, 3]
    low, high = (float(value) for value in np.percentile(image[box], (0.05, 99.95)))
    slope = max(high - low, 1e-6) / 255
    bytes_ = np.clip((image[cut].astype(np.float32) - low) / slope, 0, 255).round().astype(np.uint8)
    layers = {"image": _nifti(bytes_, affine, slope, low)}
    layers |= {name: _nifti(mask[cut], affine) for name, mask in masks.items()}
    if len(masks) > 1:
        prediction, reference = masks["prediction"][cut], masks["reference"][cut]
        kinds = [(prediction == 0) & (reference > 0), (prediction > 0) & (reference == 0), prediction != reference]
        layers["difference"] = _nifti(np.select(kinds, list(DIFFERENCES), 0).astype(np.uint8), affine)
    if arrays.uncertainty is not None:
        uncertainty = way.apply(arrays.uncertainty)[cut]
        layers["uncertainty"] = _nifti((np.clip(uncertainty, 0, 1) * 255).round().astype(np.uint8), affine, 1 / 255)
    facts = {"modality": arrays.modality, "step": step, "layers": list(layers)}
    shown = {"window": intensity_window(arrays.image), "range": (low, low + 255 * slope)}
    return CaseVolumes(layers, facts | shown | {"centre_mm": _centre_mm(marked, grid.affine)})


def _box(image: AnyArray, marked: NDArray[np.bool_], spacing_mm: tuple[float, ...]) -> tuple[slice, ...]:
    """The content of the image or, if that is too large, the box of the marked voxels; both with a margin."""
    box, margin_mm = content_box(image), _SPARE_MM
    if np.prod([part.stop - part.start for part in box]) > _MOST_VOXELS and (around := box_of(marked)):
        box, margin_mm = around, _MARGIN_MM
    margins = [round(margin_mm / spacing) for spacing in spacing_mm]
    return tuple(
        slice(max(part.start - margin, 0), min(part.stop + margin, length))
        for part, margin, length in zip(box, margins, image.shape, strict=True)
    )


def _centre_mm(marked: NDArray[np.bool_], affine: Affine) -> list[float]:
    """Where the crosshair starts: the middle of the marked voxels, or of the volume."""
    places = np.argwhere(marked)
    middle = np.median(places, axis=0) if len(places) else (np.array(marked.shape) - 1) / 2
    world = affine[:3, :3] @ middle + affine[:3, 3]
    return [round(float(value), 3) for value in world]


def _nifti(array: AnyArray, affine: Affine, slope: float = 1.0, intercept: float = 0.0) -> str:
    """A gzipped NIfTI with an empty header but for the geometry, in base64."""
    image = nib.Nifti1Image(np.ascontiguousarray(array), affine)
    image.header.set_slope_inter(slope, intercept)
    return _packed(image.to_bytes())


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode("ascii")
