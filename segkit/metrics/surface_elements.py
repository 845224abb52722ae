"""Distances between two surfaces made of elements that have an area, as the BraTS 2023 tools measure them.

A surface element lies at the corner where 2 x 2 x 2 voxels meet, some of them inside the mask and some not. Its area is
that of the marching-cubes triangles in the cube between the eight voxel centres (Lorensen & Cline, SIGGRAPH 1987,
vertices half-way between centres), and a percentile of the distances is one of area (Nikolov et al., arXiv 1809.04430,
section 4.2). Far from each other, two masks get other percentiles than by counting voxels of their surfaces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from segkit.metrics.overlap import Mask
from segkit.metrics.surface import Distances, distances_to

Corner = tuple[int, int, int]

_CORNERS: tuple[Corner, ...] = tuple((x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1))
_ALL_INSIDE = 255


def element_hausdorff_mm(
    prediction: Mask, reference: Mask, spacing_mm: Sequence[float], percentile: float = 95.0
) -> float:
    """The larger of the two directed percentiles of area; NaN where both masks are empty, infinite where one is.

    Args:
        prediction: (D, H, W).
        reference: The same shape.
        spacing_mm: Voxel spacing of each axis.
        percentile: 0 to 100. The distance below which this part of a surface lies; never one between two elements.
    """
    spacing = tuple(float(value) for value in spacing_mm)
    codes = [_corner_codes(mask) for mask in (prediction, reference)]
    surfaces = [(code != 0) & (code != _ALL_INSIDE) for code in codes]
    if not all(surface.any() for surface in surfaces):
        return math.inf if any(surface.any() for surface in surfaces) else math.nan
    areas = element_areas_mm2(spacing)
    directed = (
        (distances_to(other, own, spacing), areas[code[own]])
        for code, own, other in zip(codes, surfaces, reversed(surfaces), strict=True)
    )
    return max(_percentile_of_area(distances, own_areas, percentile) for distances, own_areas in directed)


@lru_cache(maxsize=16)
def element_areas_mm2(spacing_mm: tuple[float, float, float]) -> NDArray[np.float64]:
    """(256,) area of the element of every pattern of eight voxels; bit i is set where voxel i is inside.

    Voxel i of the eight is the i-th in C order. The fewer of the inside and the outside voxels are what is wrapped,
    each group that shares cube edges by itself; of four and four, the inside ones.
    """
    inside_by_code = [[corner for i, corner in enumerate(_CORNERS) if code >> i & 1] for code in range(256)]
    areas = []
    for inside in inside_by_code:
        wrapped = inside if len(inside) <= 4 else [corner for corner in _CORNERS if corner not in inside]
        areas.append(math.fsum(_wrapping_area(group, spacing_mm) for group in _edge_connected(wrapped)))
    table = np.array(areas)
    table.flags.writeable = False
    return table


def _wrapping_area(group: Sequence[Corner], spacing_mm: tuple[float, float, float]) -> float:
    """Area of the triangles that part edge-connected corners of the unit cell, at most four, from the others.

    With a_k the area of the cell's face across axis k, a triangle at a corner has area |a| / 8, and the larger faces of
    the patch are multiples of |a|, of one a_k, or of sqrt(a_i^2 + a_j^2).
    """
    x, y, z = spacing_mm
    faces = (y * z, x * z, x * y)
    whole = math.hypot(*faces)
    axes = [_axis_between(*pair) for pair in combinations(group, 2) if _share_edge(*pair)]
    used = set(axes)
    across = [axis for axis in range(3) if axis not in used]
    if len(group) == 1:
        return whole / 8
    if len(group) == 2:
        return math.hypot(*(faces[axis] for axis in across)) / 2
    if len(group) == 3:
        return faces[across[0]] / 2 + 3 * whole / 8
    if across:  # four corners of one face
        return faces[across[0]]
    degrees = [sum(_share_edge(corner, other) for other in group) for corner in group]
    if max(degrees) == 3:  # a corner and its three neighbours: a hexagon
        return 3 * whole / 4
    middle = next(  # of the three edges of a path, the one whose ends have two neighbours each
        _axis_between(*pair)
        for pair in combinations([corner for corner, degree in zip(group, degrees, strict=True) if degree == 2], 2)
    )
    outer = (axis for axis in range(3) if axis != middle)
    return whole / 2 + sum(math.hypot(faces[middle], faces[axis]) for axis in outer) / 4


def _edge_connected(corners: Sequence[Corner]) -> list[list[Corner]]:
    groups: list[list[Corner]] = []
    for corner in corners:
        touching = [group for group in groups if any(_share_edge(corner, other) for other in group)]
        groups = [group for group in groups if group not in touching]
        groups.append([corner, *(other for group in touching for other in group)])
    return groups


def _share_edge(first: Corner, second: Corner) -> bool:
    return sum(a != b for a, b in zip(first, second, strict=True)) == 1


def _axis_between(first: Corner, second: Corner) -> int:
    return next(axis for axis in range(3) if first[axis] != second[axis])


def _corner_codes(mask: Mask) -> NDArray[np.uint8]:
    """(D + 1, H + 1, W + 1) which of the eight voxels around each corner are inside; bits as in the table of areas."""
    padded = np.pad(mask, 1)
    codes = np.zeros([size + 1 for size in mask.shape], np.uint8)
    for i, corner in enumerate(_CORNERS):
        around = tuple(slice(offset, offset + size) for offset, size in zip(corner, codes.shape, strict=True))
        codes |= padded[around].view(np.uint8) << np.uint8(i)
    return codes


def _percentile_of_area(distances: Distances, areas: NDArray[np.float64], percentile: float) -> float:
    order = np.argsort(distances, kind="stable")
    covered = np.cumsum(areas[order])
    index = int(np.searchsorted(covered, percentile / 100 * covered[-1]))
    return float(distances[order[min(index, len(order) - 1)]])
