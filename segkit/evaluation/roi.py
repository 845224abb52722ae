"""Regions of interest to score in, such as the field of view of a retinal camera or a brain mask.

Voxels outside are black by construction: labelling them background proves nothing.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from segkit.errors import DataError, RequestError, some
from segkit.reading.case import Case
from segkit.reading.files import count_channels, read_volume, stem_of, suffix_of
from segkit.reading.geometry import onto_grid, same_grid
from segkit.reading.layouts.layout import list_images
from segkit.reading.volume import Grid
from segkit.shapes import Mask

_LOSSY_SUFFIXES = (".jpg", ".jpeg")
_HALF_WHITE = 127
"""In a JPEG picture black is not exactly 0."""

_LEAST_SHARE = 0.5
"""A mask that holds less than this part of the reference is most likely an inverted region of interest."""


def find_rois(cases: Sequence[Case], given: str, references: Path) -> dict[str, Path]:
    """Case id -> mask of its region of interest.

    `given` is a folder of masks, one file for all cases, or the ending of the names of masks below `references`
    (`.gif`, `_fov.png`), the dataset or folder of the references.

    Raises:
        RequestError: no mask belongs to any case, or two to one.
    """
    path = Path(given)
    if path.is_file():
        return {case.id: path for case in cases}
    if path.is_dir():
        named = [(file, stem_of(file)) for file in list_images(path).images]
    else:
        root = references if references.is_dir() else references.parent
        files = [file for file in list_images(root).images if file.name.lower().endswith(given.lower())]
        named = [(file, file.name[: len(file.name) - len(given)].rstrip("-_. ")) for file in files]
    found = _match_names(cases, named)
    if not found:
        raise RequestError(
            f"--roi {given}: no mask of a region of interest belongs to any of the {len(cases)} cases",
            where=path if path.is_dir() else references,
            expected=f"names with the case id, such as {cases[0].id}",
            remedy="Name a folder of masks, or the end of their names beside the references, such as --roi _fov.png",
        )
    return found


def read_roi(path: Path, grid: Grid, reference: Mask) -> Mask:
    """The region of interest (*grid.shape): all voxels that are not black, or not 0.

    A palette picture counts by its colours, not by its indices. A region that leaves out most of the `reference`, the
    voxels to be scored, is rejected.

    Raises:
        DataError: the file is unusable, lies on another grid, or does not hold the reference.
    """
    channels = count_channels(path)
    planes = [read_volume(path, channel if channels > 1 else None) for channel in range(channels)]
    black = _HALF_WHITE if suffix_of(path) in _LOSSY_SUFFIXES else 0
    stored: Mask = np.any([plane.array > black for plane in planes], axis=0)
    roi = onto_grid(stored, planes[0].grid, grid, turns=True)
    if roi is None:
        found = same_grid(planes[0].grid, grid) or ""
        raise DataError(found, where=path, expected="a region of interest on the grid of the reference")
    if not roi.any():
        raise DataError("the region of interest is empty", where=path, remedy="Correct it, or leave --roi out")
    present, inside = (int(np.count_nonzero(mask)) for mask in (reference, reference & roi))
    if inside < _LEAST_SHARE * present:
        raise DataError(
            f"only {inside / present:.0%} of the reference lies in this region of interest",
            where=path,
            expected="white, or 1, inside and black outside",
            remedy="Invert it, or give another with --roi",
        )
    return roi


def _match_names(cases: Sequence[Case], named: Sequence[tuple[Path, str]]) -> dict[str, Path]:
    """Case id -> file: a file belongs to the case with the longest id, or image name, in the name of the file.

    Only words may be beside the name of the case: `21_mask` belongs to case 21, `21_1_mask` to another.
    """
    names = {name: case.id for case in cases for name in (case.id, *(stem_of(i.path) for i in case.images.values()))}
    patterns = {name: re.compile(rf"{re.escape(name)}([-_. ]\D*)?|\D*[-_. ]{re.escape(name)}") for name in names}
    owned: dict[str, list[Path]] = defaultdict(list)
    for path, stem in named:
        fitting = [name for name, pattern in patterns.items() if pattern.fullmatch(stem)]
        if fitting:
            owned[names[max(fitting, key=len)]].append(path)
    for case_id, paths in owned.items():
        if len(paths) > 1:
            listed = some((path.name for path in paths), 3)
            raise RequestError(
                f"{len(paths)} files could be the region of interest of {case_id}: {listed}",
                where=paths[0].parent,
                remedy="Name a folder or an ending that only one of them has",
            )
    return {case_id: path for case_id, (path,) in owned.items()}
