"""The interactive viewer: NiiVue, and the volumes that it shows.

NiiVue is not part of this repository. The package `ipyniivue` (extra `viewer`) has it in a bundle for notebooks; the
bundle is read when a page is written, and its last line is rewritten to export NiiVue itself. The page stores it as
data, compressed and in base64, which becomes a script only when a reader opens the viewer.
"""

import base64
import gzip
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from segkit.reading.geometry import reorientation_to, reoriented_grid
from segkit.report.images import COLOURS, CaseArrays, content_box, extent, intensity_window
from segkit.shapes import Affine, AnyArray

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
    if found is None or found.origin is None:
        return None
    bundle = Path(found.origin).parent / "static" / "widget.js"
    try:
        script = bundle.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    made, exported = _CLASS.search(script), _EXPORT.search(script)
    if made is None or exported is None:
        return None
    module = f"{script[: exported.start()]}export{{{made[1]} as Niivue}};"
    return _packed(module.encode("utf-8"))


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
    facts = {
        "modality": arrays.modality,
        "window": intensity_window(arrays.image),
        "range": (low, low + 255 * slope),
        "step": step,
        "centre_mm": _centre_mm(marked, grid.affine),
        "layers": list(layers),
    }
    return CaseVolumes(layers, facts)


def _box(image: AnyArray, marked: NDArray[np.bool_], spacing_mm: tuple[float, ...]) -> tuple[slice, ...]:
    """The content of the image or, if that is too large, the box of the marked voxels; both with a margin."""
    box, margin_mm = content_box(image), _SPARE_MM
    if np.prod([part.stop - part.start for part in box]) > _MOST_VOXELS and marked.any():
        box, margin_mm = extent(marked), _MARGIN_MM
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
