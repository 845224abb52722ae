"""Moving a lesion into another brain: its image matched to what is around it there, its border blended, its labels.

A *lesion* here is a connected part of the labelled voxels of a prepared case. *Tissue* are the voxels that are not
exactly 0 in every modality: nothing is laid where either brain ends, so the background stays exactly 0. The idea is
that of CarveMix (Zhang et al., MICCAI 2021, arXiv 2108.06883), which carves lesions from one labelled scan into
another; matching and blending are our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segkit.data.preprocessing import PreparedCase
from segkit.shapes import AnyArray, Image, LabelMap

_BORDER = 3
"""Voxels around a lesion in which its image fades into the other one's; on thick slices fewer across them."""
_SHIFT = 0.25
"""Farthest that a lesion is moved from its own place, as a share of the volume's sides."""
_TRIES = 8
_ENOUGH_TISSUE, _LEAST_TISSUE = 0.9, 0.5
"""Share of a lesion in tissue at which a place is taken at once, and below which the best place is not taken."""
_MOST_VOXELS_TRIED = 1000


@dataclass(frozen=True)
class Transplant:
    """A lesion matched to its new surroundings.

    corner: the voxel of the new volume on which the first voxel of the arrays comes to lie; image: (C, *box) float32;
    labels: (*box) uint8, 0 outside the lesion; weight: (*box) float32, the share that `image` has in the result: 1 in
    the lesion, falling to 0 around it.
    """

    corner: tuple[int, ...]
    image: Image = field(repr=False)
    labels: LabelMap = field(repr=False)
    weight: NDArray[np.float32] = field(repr=False)

    def foreground(self, shape: Sequence[int]) -> dict[int, NDArray[np.intp]]:
        """Flat C-order indices, in a volume of `shape`, of the lesion's voxels by label value."""
        voxels = np.nonzero(self.labels)
        flat = np.ravel_multi_index([axis + first for axis, first in zip(voxels, self.corner, strict=True)], shape)
        values = self.labels[voxels]
        return {int(value): flat[values == value] for value in np.unique(values)}

    def laid_over(self, sample: Mapping[str, AnyArray], start: Sequence[int]) -> dict[str, AnyArray]:
        """A sample with the lesion in it.

        Args:
            sample: "image" (C, *region) float32 and "labels" (1, *region) uint8, cut from the new volume; not changed.
            start: the region's first voxel in that volume.
        """
        image, labels = np.array(sample["image"]), np.array(sample["labels"])
        ours, theirs = _overlap(self.corner, self.labels.shape, start, labels.shape[1:])
        part = image[(slice(None), *theirs)]
        part += self.weight[ours] * (self.image[(slice(None), *ours)] - part)
        lesion = self.labels[ours]
        np.copyto(labels[0][theirs], lesion, where=lesion > 0)
        return {"image": image, "labels": labels}


@dataclass(frozen=True)
class Lesion:
    """A lesion and the voxels around it.

    image, labels and weight are those of a `Transplant` before matching; `middle` is the middle of their box as a
    share of the sides of the volume that they were cut from.
    """

    image: Image = field(repr=False)
    labels: LabelMap = field(repr=False)
    weight: NDArray[np.float32] = field(repr=False)
    middle: tuple[float, ...]

    def moved_into(self, volume: Image, generator: np.random.Generator) -> Transplant | None:
        """The lesion at a place in `volume` (C, *spatial) where most of it lies in tissue; None if there is none.

        Places are drawn around the lesion's own, relative to the volume; its own is tried last.
        """
        shape = np.array(volume.shape[1:])
        own = np.array(self.middle) * shape - np.array(self.labels.shape) / 2
        shifts = [generator.uniform(-_SHIFT, _SHIFT, len(shape)) for _ in range(_TRIES)]
        voxels = np.argwhere((self.labels > 0) & (self.weight > 0))
        voxels = voxels[:: 1 + len(voxels) // _MOST_VOXELS_TRIED]
        best, best_share = None, _LEAST_TISSUE
        for shift in [*shifts, np.zeros(len(shape))]:
            corner = tuple(np.rint(own + shift * shape).astype(int).tolist())
            share = _share_in_tissue(volume, voxels + corner)
            if share >= best_share:
                best, best_share = corner, share
            if share >= _ENOUGH_TISSUE:
                break
        return None if best is None else self.matched(volume, best)

    def matched(self, volume: Image, corner: Sequence[int]) -> Transplant:
        """The lesion with its box's first voxel on `corner` of `volume` (C, *spatial), as far as there is tissue.

        Each modality is shifted by the difference of the means of the two images around the lesion.
        """
        ours, theirs = _overlap(corner, self.labels.shape, (0,) * len(corner), volume.shape[1:])
        there, image, labels = volume[(slice(None), *theirs)], self.image[(slice(None), *ours)], self.labels[ours]
        weight = self.weight[ours] * there.any(axis=0)
        shell = (weight > 0) & (labels == 0)
        if shell.any():
            offset = there[:, shell].mean(axis=1) - image[:, shell].mean(axis=1)
            image = image + offset.reshape(-1, *(1,) * labels.ndim)
        return Transplant(tuple(max(first, 0) for first in corner), image, np.where(weight > 0, labels, 0), weight)


def cut_lesion(case: PreparedCase, voxel: Sequence[int]) -> Lesion:
    """The lesion of a case with a reference that holds the labelled `voxel`; touching corners connect."""
    if case.labels is None:
        raise ValueError(f"case {case.id} has no reference")
    parts, _ = ndimage.label(case.labels, structure=np.ones((3,) * case.labels.ndim))
    number = parts[tuple(voxel)]
    if number == 0:
        raise ValueError(f"voxel {tuple(voxel)} of case {case.id} has no label")
    tight = ndimage.find_objects(parts, number)[number - 1]
    box = tuple(slice(max(side.start - _BORDER, 0), side.stop + _BORDER) for side in tight)
    image, labels = np.asarray(case.image[(slice(None), *box)]), case.labels[box]
    is_lesion = parts[box] == number
    is_usable = image.any(axis=0) & (is_lesion | (labels == 0))  # another lesion would come without its labels
    sides_mm = np.array(case.preparation.spacing_mm)
    distance = ndimage.distance_transform_edt(~is_lesion, sampling=sides_mm / sides_mm.min())
    weight = np.where(is_usable, np.clip(1 - distance / (_BORDER + 1), 0, 1), 0).astype(np.float32)
    shape = case.labels.shape
    middle = tuple((side.start + size / 2) / whole for side, size, whole in zip(box, labels.shape, shape, strict=True))
    return Lesion(image, np.where(is_lesion, labels, 0), weight, middle)


def _share_in_tissue(volume: Image, voxels: NDArray[np.intp]) -> float:
    """Share of the voxels (N, axes) that lie in tissue of `volume` (C, *spatial); those outside do not."""
    is_inside = ((voxels >= 0) & (voxels < volume.shape[1:])).all(axis=1)
    if not is_inside.any():
        return 0.0
    is_tissue = volume[(slice(None), *voxels[is_inside].T)].any(axis=0)
    return float(is_tissue.sum()) / len(voxels)


def _overlap(
    corner: Sequence[int], shape: Sequence[int], other_corner: Sequence[int], other_shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where two boxes overlap, as an index into the first and into the second; empty where they do not."""
    ours, theirs = [], []
    for first, size, other, other_size in zip(corner, shape, other_corner, other_shape, strict=True):
        low = max(first, other)
        high = max(low, min(first + size, other + other_size))
        ours.append(slice(low - first, high - first))
        theirs.append(slice(low - other, high - other))
    return tuple(ours), tuple(theirs)
