"""Reorientation of arrays, exact in both directions, and comparison of two grids.

An *orientation* names the direction in which each voxel axis grows: "RAS" to the Right, Anterior, Superior; an oblique
grid has the closest one. The letters I, J and K are the first, second and third axis of the file, in any direction:
"KJI" reverses the order of the axes, as in SimpleITK. Reorienting permutes and flips axes and never interpolates.
"""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from segkit.errors import RequestError
from segkit.reading.volume import Grid
from segkit.shapes import AnyArray

REPAIR_COMMAND = "segkit convert headers"
"""Part of the remedy of every problem that this verb can repair."""

_LARGEST_DRIFT = 1e-3
"""Accepted drift between two grids, as a share of the longest side: float32 headers differ in the 8th digit,
text headers in the 5th."""
_LARGEST_DRIFT_VOXELS = 0.25


@dataclass(frozen=True)
class Reorientation:
    """New axis i is old axis `axes[i]`, reversed where `flips[i]`; `source_shape` is the shape before.

    Works on the last axes: (D, H, W), (C, D, H, W) and (B, C, D, H, W) are all accepted.
    """

    axes: tuple[int, ...]
    flips: tuple[bool, ...]
    source_shape: tuple[int, ...]

    @property
    def target_shape(self) -> tuple[int, ...]:
        """The shape after `apply`, in voxels."""
        return tuple(self.source_shape[axis] for axis in self.axes)

    def apply(self, array: AnyArray) -> AnyArray:
        """(..., *source_shape) to (..., *target_shape), contiguous; the array itself where nothing changes."""
        self._require(array, self.source_shape)
        leading = array.ndim - len(self.axes)
        turned = array.transpose(*range(leading), *(leading + axis for axis in self.axes))
        return np.ascontiguousarray(np.flip(turned, self._flipped(leading)))

    def undo(self, array: AnyArray) -> AnyArray:
        """(..., *target_shape) to (..., *source_shape), contiguous: the exact inverse of `apply`."""
        self._require(array, self.target_shape)
        leading = array.ndim - len(self.axes)
        back = np.argsort(self.axes)
        turned = np.flip(array, self._flipped(leading))
        return np.ascontiguousarray(turned.transpose(*range(leading), *(leading + int(axis) for axis in back)))

    def _flipped(self, leading: int) -> tuple[int, ...]:
        return tuple(leading + axis for axis, is_flipped in enumerate(self.flips) if is_flipped)

    def _require(self, array: AnyArray, shape: tuple[int, ...]) -> None:
        if array.shape[-len(shape) :] != shape:
            raise ValueError(f"an array of shape {array.shape} does not end in {shape}")


def reorientation_to(grid: Grid, orientation: str = "RAS") -> Reorientation:
    """The reorientation of arrays on `grid`, by the closest axes of an oblique grid; none for pictures.

    Raises RequestError where `orientation` is not three letters: one of each pair L/R, A/P and I/S, or I, J and K.
    """
    if grid.dims == 2:
        return Reorientation((0, 1), (False, False), grid.shape)
    letters = orientation.upper()
    if sorted(letters) == ["I", "J", "K"]:
        return Reorientation(tuple("IJK".index(letter) for letter in letters), (False,) * 3, grid.shape)
    opposite = letters.translate(str.maketrans("LRAPIS", "RLPASI"))
    if sorted("".join(sorted(pair)) for pair in zip(letters, opposite, strict=True)) != ["AP", "IS", "LR"]:
        expected = "three letters, one of each pair L/R, A/P, I/S (or I, J, K: the axes of each file)"
        remedy = 'The usual one is "RAS"'
        raise RequestError(f"{orientation!r} is not an orientation", expected=expected, remedy=remedy)
    to_target = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(grid.affine), nib.orientations.axcodes2ornt(letters)
    )  # row = old axis; columns = its new place, and -1 where it is flipped
    axes = tuple(int(axis) for axis in np.argsort(to_target[:, 0]))
    return Reorientation(axes, tuple(bool(to_target[axis, 1] < 0) for axis in axes), grid.shape)


def reoriented_grid(grid: Grid, reorientation: Reorientation) -> Grid:
    """The grid of an array after `reorientation.apply`: every voxel keeps its world position."""
    if grid.dims == 2:
        return grid
    to_old = np.zeros((4, 4))  # new voxel indices to old ones
    to_old[3, 3] = 1.0
    for new_axis, (old_axis, is_flipped) in enumerate(zip(reorientation.axes, reorientation.flips, strict=True)):
        to_old[old_axis, new_axis] = -1.0 if is_flipped else 1.0
        to_old[old_axis, 3] = grid.shape[old_axis] - 1.0 if is_flipped else 0.0
    qform = None if grid.qform is None else grid.qform @ to_old
    return replace(grid, shape=reorientation.target_shape, affine=grid.affine @ to_old, qform=qform)


def same_grid(a: Grid, b: Grid) -> str | None:
    """None where two grids are the same, else a sentence on their difference, in voxels or millimetres.

    Same means: equal shapes, and no corner of the volume differs by more than a thousandth of its longest side or a
    quarter of the smallest voxel side, whichever is less.
    """
    first = a.source.name if a.source else "the first image"
    second = b.source.name if b.source else "the second image"
    if first == second and a.source and b.source:
        first, second = str(a.source), str(b.source)
    if a.shape != b.shape and a.shape == b.shape[::-1] and a.is_turned != b.is_turned:
        photograph, mask = (first, second) if a.is_turned else (second, first)
        return (
            f"{mask} fits {photograph} as it is stored, but not as viewers show it, turned by its EXIF orientation; "
            "save both the same way up"
        )
    if a.shape != b.shape:
        return f"{first} has {format_size(a.shape)} voxels and {second} has {format_size(b.shape)}"
    drift_mm = float(np.linalg.norm(_corners_mm(a) - _corners_mm(b), axis=1).max())
    spacing = np.array(a.spacing_mm)
    longest_mm = float((spacing * a.shape).max())
    if drift_mm <= min(_LARGEST_DRIFT * longest_mm, _LARGEST_DRIFT_VOXELS * float(spacing.min())):
        return None
    for name, grid, other_name, other in ((first, a, second, b), (second, b, first, a)):
        if has_default_affine(grid) and not has_default_affine(other):
            return (
                f"{name} has lost its position in the patient: its affine is the default that programs write when they "
                f"drop the header, so that its voxels lie up to {drift_mm:.1f} mm away from those of {other_name}; "
                "write it again with the header of the scan it belongs to"
            )
    if a.orientation != b.orientation:
        return (
            f"{first} is oriented {a.orientation} and {second} {b.orientation}: the same voxel index lies up to "
            f"{drift_mm:.1f} mm apart"
        )
    if not np.allclose(a.spacing_mm, b.spacing_mm, rtol=_LARGEST_DRIFT):
        own, other_size = format_size(a.spacing_mm), format_size(b.spacing_mm)
        return f"the voxels of {first} measure {own} mm and those of {second} {other_size} mm"
    return (
        f"{first} and {second} lie in different places: the same voxel is up to {drift_mm:.2f} mm "
        f"({drift_mm / float(spacing.min()):.1f} voxels) apart"
    )


def onto_grid(array: AnyArray, own: Grid, target: Grid, *, turns: bool = False) -> AnyArray | None:
    """An array (*own.shape) on `target`, itself where the grids are the same; None where it does not fit.

    An array of a part of the voxels of `target` fits, as 3D Slicer saves segmentations; the others are 0. With `turns`
    (predictions) the axes may have another order or direction, and only a NRRD file may hold a part: a prediction in
    another format that lacks voxels is an error. An affine that programs write when they lose the header gives no
    position: such a volume does not fit.
    """
    if same_grid(own, target) is None:
        return array
    is_lost = has_default_affine(own)
    if own.dims != 3 or target.dims != 3 or (is_lost and not has_default_affine(target)):
        return None
    direction = nib.orientations.io_orientation(np.linalg.inv(target.affine) @ own.affine)
    axes = tuple(int(axis) for axis in np.argsort(direction[:, 0]))
    turn = Reorientation(axes, tuple(bool(direction[axis, 1] < 0) for axis in axes), own.shape)
    if not turns and (axes != (0, 1, 2) or any(turn.flips)):
        return None
    turned = reoriented_grid(own, turn)
    start = np.rint((np.linalg.inv(target.affine) @ turned.affine)[:3, 3]).astype(int)
    stop = start + turned.shape
    moved = turned.affine.copy()
    moved[:3, 3] -= moved[:3, :3] @ start
    is_nrrd = own.source is not None and own.source.suffix.lower() == ".nrrd"
    may_be_part = is_nrrd or not (turns or is_lost)
    is_inside = (start >= 0).all() and (stop <= target.shape).all() and (may_be_part or turned.shape == target.shape)
    if not is_inside or same_grid(target, replace(turned, shape=target.shape, affine=moved)) is not None:
        return None
    whole = np.zeros(target.shape, array.dtype)
    whole[tuple(map(slice, start, stop))] = turn.apply(array)
    return whole


def _corners_mm(grid: Grid) -> NDArray[np.float64]:
    """World positions of the eight corner voxels, (8, 3); four distinct ones for a picture."""
    last = [*(length - 1 for length in grid.shape), 0][:3]
    corners = np.array(list(product(*((0, end) for end in last))), np.float64)
    positions: NDArray[np.float64] = corners @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    return positions


def repair_command(root: Path) -> str:
    """The command that copies a data folder and repairs headers with a wrong affine, quoted for a POSIX shell."""
    return f"{REPAIR_COMMAND} {shlex.quote(str(root))} -o {shlex.quote(root.name + '-repaired')}"


def has_default_affine(grid: Grid) -> bool:
    """Whether the affine is the identity, axes reversed or not, which programs write when they lose the header."""
    return bool(np.allclose(np.abs(grid.affine), np.eye(4), atol=1e-6))


def format_size(numbers: Iterable[float]) -> str:
    """Lengths of axes, such as "240 x 240 x 155"."""
    return " x ".join(f"{number:.4g}" for number in numbers)
