"""Shapes of holes in 2D and 3D: boxes, strokes, tumour-like blobs, rotated shapes; and components of masks.

The size of a hole is the *diameter* in voxels of the ball (in 2D the disc) of as many voxels. Shapes are centred in an
array of a given shape and cut at its edges. All random numbers are drawn from the given generator.
"""

import math
from collections.abc import Sequence

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segkit.shapes import Mask, connectivity, label_components, zeros_and_ones

_BALL = {2: math.pi / 4, 3: math.pi / 6}  # area of the disc and volume of the ball of diameter 1
_STRETCH = 0.25  # standard deviation of the logarithm of a box's or blob's extent along an axis
_BUMPS = 0.22  # standard deviation of a blob's surface, as a share of its radius
_STROKE_RADII = (0.1, 0.22)  # thinnest and thickest radius of a stroke, as a share of the diameter
_NEW_STROKE = 0.06  # probability, at every step, that a new stroke branches off an old one
_MOST_STEPS = 3000


def voxels_of(diameter: float, dims: int) -> float:
    """Voxels of the ball or disc of a diameter in voxels."""
    return float(_BALL[dims] * diameter**dims)


def diameter_of(voxels: float, dims: int) -> float:
    """Diameter in voxels of the ball or disc of that many voxels."""
    return float((voxels / _BALL[dims]) ** (1 / dims))


def box_hole(shape: Sequence[int], generator: np.random.Generator, diameter: float) -> Mask:
    """A box in the middle of an array (*shape), with about the voxels of a ball of `diameter` voxels."""
    side = voxels_of(diameter, len(shape)) ** (1 / len(shape))
    hole, box = np.zeros(tuple(shape), np.bool_), []
    for count, ratio in zip(shape, _ratios(len(shape), generator), strict=True):
        extent = min(count, max(1, round(side * ratio)))
        box.append(slice((count - extent) // 2, (count - extent) // 2 + extent))
    hole[tuple(box)] = True
    return hole


def stroke_hole(shape: Sequence[int], generator: np.random.Generator, diameter: float) -> Mask:
    """Connected strokes of varying thickness along a branching random walk from the middle of an array (*shape).

    They cover the voxels of a ball of `diameter` voxels, or half the array if that is less.
    """
    hole = np.zeros(tuple(shape), np.bool_)
    limits = np.asarray(shape) - 1.0
    target = min(voxels_of(diameter, len(shape)), hole.size / 2)
    thin, thick = (max(1.0, share * diameter) for share in _STROKE_RADII)
    point, heading, radius = limits / 2, generator.standard_normal(len(shape)), generator.uniform(thin, thick)
    walked, covered = [point], 0
    for _ in range(_MOST_STEPS):
        covered += _paint_ball(hole, point, radius)
        if covered >= target:
            break
        if generator.random() < _NEW_STROKE:
            point, heading = walked[generator.integers(len(walked))], generator.standard_normal(len(shape))
        heading = heading / max(float(np.linalg.norm(heading)), 1e-6) + generator.normal(0, 0.35, len(shape))
        moved = point + 0.8 * radius * heading / max(float(np.linalg.norm(heading)), 1e-6)
        heading = np.where((moved < 0) | (moved > limits), -heading, heading)  # reflected at the edges
        point = np.clip(moved, 0, limits)
        walked.append(point)
        radius = float(np.clip(radius * math.exp(generator.normal(0, 0.15)), thin, thick))
    return hole


def blob_hole(shape: Sequence[int], generator: np.random.Generator, diameter: float) -> Mask:
    """A bumpy, rotated ellipsoid like a tumour in the middle of an array (*shape), connected and without cavities.

    It has about the voxels of a ball of `diameter` voxels.
    """
    dims = len(shape)
    radii = diameter / 2 * _ratios(dims, generator)
    turn = _random_turn(dims, generator)
    steps = [np.arange(count, dtype=np.float32) - (count - 1) / 2 for count in shape]
    axes = [step.reshape([-1 if axis == place else 1 for place in range(dims)]) for axis, step in enumerate(steps)]
    squared = np.zeros(tuple(shape), np.float32)
    for direction, radius in zip(turn, radii, strict=True):
        along = sum(np.float32(weight / radius) * axis for weight, axis in zip(direction, axes, strict=True))
        squared += np.square(along)
    distance = np.sqrt(squared) * np.clip(1 + _BUMPS * _smooth_field(steps, diameter, generator), 0.3, 2.0)
    wanted = min(round(voxels_of(diameter, dims)), distance.size - 1)
    return without_cavities(largest_component(distance <= np.partition(distance.ravel(), wanted - 1)[wanted - 1]))


def turned(mask: Mask, generator: np.random.Generator, scale: float = 1.0) -> Mask:
    """A shape (*spatial) flipped along random axes and rotated by random angles, cropped to its True voxels.

    The rotations are those of the BraTS local-synthesis challenge: in the plane of the first two axes, then (3D) of the
    last two, 0 to 360 degrees each, by the nearest voxel; both are done in one step. `scale` multiplies lengths.
    """
    flips = tuple(axis for axis in range(mask.ndim) if generator.random() < 0.5)
    mask = np.flip(mask, flips)
    turn = _random_turn(mask.ndim, generator)
    middle = (np.asarray(mask.shape) - 1) / 2
    reached = scale * ((np.argwhere(mask) - middle) @ turn.T)
    first, last = np.floor(reached.min(axis=0)) - 1, np.ceil(reached.max(axis=0)) + 1
    back = turn.T / scale  # from voxels of the result to voxels of the shape
    result = ndimage.affine_transform(
        np.ascontiguousarray(mask).view(np.uint8),
        back,
        offset=middle + back @ first,
        output_shape=tuple(int(count) for count in last - first + 1),
        order=0,
        mode="grid-constant",  # "constant" would cut off the outer half of the outermost voxels
        prefilter=False,
    ).view(np.bool_)
    return cropped(result) if result.any() else np.ones((1,) * mask.ndim, np.bool_)


def cropped(mask: Mask) -> Mask:
    """The smallest box with all True voxels of a mask that has any, contiguous."""
    (box,) = ndimage.find_objects(mask.view(np.uint8))
    return np.ascontiguousarray(mask[box])


def largest_component(mask: Mask) -> Mask:
    """The largest connected component of a mask (*spatial)."""
    return np.asarray(cc3d.largest_k(zeros_and_ones(mask), k=1, connectivity=connectivity(mask.ndim)) > 0)


def components(mask: Mask) -> list[Mask]:
    """The connected components of a mask (*spatial), each cropped, largest first."""
    labels = label_components(mask)
    parts = [labels[box] == number for number, box in enumerate(ndimage.find_objects(labels), start=1)]
    return sorted(parts, key=lambda part: -int(part.sum()))


def without_cavities(mask: Mask) -> Mask:
    """A mask (*spatial) with its cavities filled: background not connected to the outside through voxel faces."""
    outside = np.pad(~mask, 1, constant_values=True)
    labels = cc3d.connected_components(zeros_and_ones(outside), connectivity=2 * mask.ndim)
    inside: Mask = labels != labels[(0,) * mask.ndim]
    return inside[(slice(1, -1),) * mask.ndim]


def _ratios(dims: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Extents along the axes relative to each other; their product is 1."""
    logarithms = generator.normal(0, _STRETCH, dims)
    return np.asarray(np.exp(logarithms - logarithms.mean()))


def _random_turn(dims: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """A rotation matrix (dims, dims): in the plane of the first two axes, then in that of the last two."""
    turn = np.eye(dims)
    for axis in range(dims - 1):
        angle = generator.uniform(0, 2 * math.pi)
        step = np.eye(dims)
        cosine, sine = math.cos(angle), math.sin(angle)
        step[axis : axis + 2, axis : axis + 2] = (cosine, -sine), (sine, cosine)
        turn = step @ turn
    return turn


def _smooth_field(
    steps: Sequence[NDArray[np.float32]], diameter: float, generator: np.random.Generator
) -> NDArray[np.float32]:
    """A random field of mean 0 and deviation about 1, smooth over a third of the diameter, on a grid of steps."""
    spacing = max(diameter / 3, 1.0)
    counts = [math.ceil(len(step) / spacing) + 3 for step in steps]
    field = generator.standard_normal(counts).astype(np.float32)
    for step, count in zip(steps, counts, strict=True):
        nodes = (np.arange(count, dtype=np.float32) - (count - 1) / 2) * spacing
        weights = np.exp(-0.5 * ((step[:, None] - nodes) / (0.7 * spacing)) ** 2)
        weights /= np.sqrt(np.square(weights).sum(axis=1, keepdims=True))
        # One axis in, one out. einsum, not BLAS: the same bits with any number of threads.
        field = np.einsum("n...,vn->...v", field, weights)
    return field


def _paint_ball(hole: Mask, point: NDArray[np.float64], radius: float) -> int:
    """Add the voxels within `radius` of a point, in place, and return the number of new voxels."""
    first = np.maximum(np.ceil(point - radius), 0).astype(int)
    last = np.minimum(np.floor(point + radius), np.asarray(hole.shape) - 1).astype(int)
    box = tuple(slice(low, high + 1) for low, high in zip(first, last, strict=True))
    squared = sum((axis - middle) ** 2 for axis, middle in zip(np.ogrid[box], point, strict=True))
    new = (squared <= radius**2) & ~hole[box]
    hole[box] |= new
    return int(np.count_nonzero(new))
