"""A volume: an array that never travels without its grid.

A *grid* is where an array's voxels lie in the patient: its shape, its affine, and what is needed to write a file that
says the same as the file it came from (codes, units). Two-dimensional pictures have a grid of two axes and an identity
affine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np

from segkit.shapes import Affine, AnyArray


@dataclass(frozen=True)
class Grid:
    """Where voxels lie: shape (D, H, W) or (H, W), affine in mm (RAS+ world), and the codes of the source header.

    `source` is the file the grid was read from, for messages and for writing in the same format; `qform` is the
    affine of the quaternion form where the file carried one that differs from `affine`.
    """

    shape: tuple[int, ...]
    affine: Affine
    sform_code: int = 1
    qform_code: int = 1
    qform: Affine | None = None
    xyzt_units: int = 2
    source: Path | None = None

    @property
    def dims(self) -> int:
        """3 for a volume, 2 for a picture."""
        return len(self.shape)

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Distance between neighbouring voxels along each axis."""
        lengths = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))
        return tuple(float(length) for length in lengths[: self.dims])

    @property
    def orientation(self) -> str:
        """Direction in which each voxel axis grows, such as "RAS" or "LPS"; pictures have none ("")."""
        return "".join(nib.orientations.aff2axcodes(self.affine)) if self.dims == 3 else ""


@dataclass(frozen=True)
class Volume:
    """One image: array (D, H, W) or (H, W) in the file's own orientation, with its grid."""

    array: AnyArray = field(repr=False)
    grid: Grid
