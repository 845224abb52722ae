"""Training patches: case, place and augmentation depend on (seed, index) only."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.networks.layers import AffineTransform
from monai.networks.utils import to_norm_affine
from monai.transforms import Compose, RandomizableTransform, Transform
from numpy.typing import NDArray
from torch.utils.data import Dataset, default_collate

from segkit.preparing.preprocessing import PreparedCase
from segkit.preparing.transforms import (
    IMAGE,
    LABEL,
    drawn_about_one,
    rotation,
    rotation_planes,
    run,
    share_random_state,
)
from segkit.shapes import AnyArray, overlap

_THETA, _STATE = "theta", "state"
"""Further keys of a box: the map from its patch, and the random state with which the patch is made."""

_JITTER = 0.25
"""Largest distance of a chosen foreground voxel from the middle of its patch, as a share of the patch."""


class RandBoxd(RandomizableTransform):  # type: ignore[misc]
    """Cuts the box from which `ResampleBoxd` makes a patch around a drawn centre, rotated and scaled.

    With probability `foreground_fraction` the patch is centred, within a jitter, on a voxel of a label value drawn
    uniformly from those present in the case; otherwise it lies anywhere inside the volume, in a case with ignored
    voxels around any of the others. Voxel `patch_size // 2` is the centre. `scale_range` is the size of what the patch
    shows, relative to the patch.

    Takes {"case": PreparedCase, possibly "lesion": Transplant}; returns "image" (C, *box) float32 and, with a
    reference, "label" (1, *box) uint8. Without rotation and scale they are the patch, padded with zeros on both sides
    where the volume is smaller; else there is "theta" (1, dims + 1, dims + 1), from the patch to the box in torch's
    normalised coordinates. Only the voxels of the box are read from a memory-mapped case.

    `RandAffined` does not replace both: it draws all rotations together and a scale for each axis, and needs a box that
    is large enough for every rotation. From that box it takes twice as long: 62 ms instead of 30 ms for 4 x 64^3 voxels
    with their labels (one core, 2026-12-01, `benchmarks/patches.py --transforms`).
    """

    def __init__(
        self,
        patch_size: Sequence[int],
        *,
        foreground_fraction: float,
        rotation_probability: float = 0.0,
        rotation_degrees: float = 0.0,
        scale_probability: float = 0.0,
        scale_range: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.foreground_fraction = foreground_fraction
        self.rotation_probability = rotation_probability
        self.rotation_degrees = rotation_degrees
        self.scale_probability = scale_probability
        self.scale_range = scale_range

    def __call__(self, data: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The box."""
        case: PreparedCase = data["case"]
        centre, matrix = np.array(self.draw_centre(case)), self.draw_matrix()
        before, after = self.reach(matrix)
        start, stop = np.maximum(centre - before, 0), centre + after
        region = tuple(slice(first, last) for first, last in zip(start.tolist(), stop.tolist(), strict=True))
        sample: dict[str, AnyArray] = {IMAGE: case.image[(slice(None), *region)]}
        if case.labels is not None:
            sample[LABEL] = case.labels[region][None]
        if (lesion := data.get("lesion")) is not None:
            sample = lesion.paste_into(sample, start.tolist())
        if matrix is None:
            corner = (centre - start - before).tolist()
            return {key: torch.from_numpy(_crop(array, corner, self.patch_size)) for key, array in sample.items()}
        box = {key: torch.from_numpy(np.array(array, order="C")) for key, array in sample.items()}
        return box | {_THETA: self.theta(matrix, centre - start, sample[IMAGE].shape[1:])}

    def draw_centre(self, case: PreparedCase) -> list[int]:
        """The voxel of the case at voxel `patch_size // 2` of the patch."""
        shape = case.image.shape[1:]
        limits = [_centre_limits(size, patch) for size, patch in zip(shape, self.patch_size, strict=True)]
        values = sorted(case.foreground.keys() - {0})
        if self.R.random_sample() < self.foreground_fraction and values:
            voxels = case.foreground[values[self.R.randint(len(values))]]
        elif 0 in case.foreground:
            voxels = case.foreground[0]
        else:
            return [int(self.R.randint(low, high + 1)) for low, high in limits]
        voxel = np.unravel_index(int(voxels[self.R.randint(len(voxels))]), shape)
        centre = []
        for place, patch, (low, high) in zip(voxel, self.patch_size, limits, strict=True):
            jitter = int(patch * _JITTER)
            centre.append(min(max(int(place) + int(self.R.randint(-jitter, jitter + 1)), low), high))
        return centre

    def draw_matrix(self) -> NDArray[np.float64] | None:
        """Rotation and scale from patch to case offsets, in voxels; None for the identity."""
        matrix = None
        for plane in rotation_planes(self.patch_size):
            if self.R.random_sample() < self.rotation_probability:
                turn = rotation(len(self.patch_size), plane, self.R.uniform(-1, 1) * self.rotation_degrees)
                matrix = turn if matrix is None else turn @ matrix
        if self.R.random_sample() < self.scale_probability:
            scale = drawn_about_one(self.R, self.scale_range)
            matrix = scale * (np.eye(len(self.patch_size)) if matrix is None else matrix)
        return matrix

    def reach(self, matrix: NDArray[np.float64] | None) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Voxels before and after the centre, per axis, that a patch needs."""
        size = np.array(self.patch_size)
        if matrix is None:
            return size // 2, size - size // 2
        extent = np.ceil(np.abs(matrix) @ (size / 2)).astype(int) + 1
        return extent, extent + 1

    def theta(self, matrix: NDArray[np.float64], centre: NDArray[np.intp], box_size: Sequence[int]) -> torch.Tensor:
        """The map from the patch to a box in which `centre` is the centre of the patch."""
        pivot = np.array(self.patch_size) // 2
        affine = np.eye(len(pivot) + 1, dtype=np.float32)
        affine[:-1, :-1] = matrix
        affine[:-1, -1] = centre - matrix @ pivot
        theta: torch.Tensor = to_norm_affine(
            torch.from_numpy(affine)[None], box_size, self.patch_size, align_corners=_has_corners(self.patch_size)
        )
        return theta


class ResampleBoxd(Transform):  # type: ignore[misc]
    """Resamples a box of `RandBoxd` to the patch, on the device of the box; draws nothing.

    Returns "image" (C, *patch_size) float32 and, if given, "label" (1, *patch_size) uint8.
    """

    def __init__(self, patch_size: Sequence[int]) -> None:
        self.patch_size = tuple(patch_size)

    def __call__(self, data: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The patch."""
        patch = dict(data)
        if (theta := patch.pop(_THETA, None)) is None:
            return patch
        has_corners = _has_corners(self.patch_size)
        for key, box in patch.items():
            mode = "nearest" if key == LABEL else "bilinear"
            resample = AffineTransform(self.patch_size, True, mode, padding_mode="zeros", align_corners=has_corners)
            patch[key] = resample(box[None].float(), theta)[0].to(box.dtype)
        return patch


def _has_corners(patch_size: Sequence[int]) -> bool:
    """Whether torch's coordinates -1 and 1 are middles of voxels: else it places an only slice half a voxel off."""
    return 1 not in patch_size


class PatchDataset(Dataset[dict[str, Any]]):
    """Random patches of prepared cases: `transforms` applied to {"case": PreparedCase}.

    Item i depends on (seed, i) only, not on the number of workers, so a resumed run continues exactly. Each
    `len(prepared)` items have every case once, in a new random order.
    """

    def __init__(
        self,
        prepared: Sequence[PreparedCase],
        transforms: Compose,
        *,
        seed: int,
        length: int,
        gives_boxes: bool = False,
    ) -> None:
        self.prepared = prepared
        self.transforms = transforms
        self.seed = seed
        self.length = length
        self.gives_boxes = gives_boxes
        self._boxed = 1 + [isinstance(transform, RandBoxd) for transform in transforms.transforms].index(True)
        self._random = np.random.RandomState(0)
        share_random_state(transforms, self._random)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Item `index`: "image" (C, *patch_size) float32 and, with a reference, "label" (*patch_size) uint8.

        With `gives_boxes` it is the box of that patch, for `patches_of`.
        """
        if not 0 <= index < self.length:
            raise IndexError(index)
        self._random.seed(np.random.SeedSequence((self.seed, 1, index)).generate_state(4))
        box = run(self.transforms, {"case": self.prepared[self.case_number(index)]}, end=self._boxed)
        return box | {_STATE: self._random.get_state()} if self.gives_boxes else self._patch_of(box)

    def patches_of(self, boxes: Sequence[Mapping[str, Any]], device: torch.device) -> dict[str, torch.Tensor]:
        """A batch of the patches of boxes, made on the device: on a CPU they are equal to items without boxes."""
        patches = []
        for box in boxes:
            self._random.set_state(box[_STATE])
            tensors = {key: value.to(device, non_blocking=True) for key, value in box.items() if key != _STATE}
            patches.append(self._patch_of(tensors))
        batch: dict[str, torch.Tensor] = default_collate(patches)
        return batch

    def _patch_of(self, box: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        patch = run(self.transforms, box, start=self._boxed)
        item = {IMAGE: patch[IMAGE].float()}
        return item | ({LABEL: patch[LABEL][0].to(torch.uint8)} if LABEL in patch else {})

    def case_number(self, index: int) -> int:
        """The case of item `index`."""
        which_pass, place = divmod(index, len(self.prepared))
        order = np.random.default_rng((self.seed, 0, which_pass)).permutation(len(self.prepared))
        return int(order[place])


def _crop(array: AnyArray, start: Sequence[int], size: Sequence[int]) -> AnyArray:
    """A copy of (C, *spatial) from voxel `start`, `size` voxels; zeros outside the array."""
    patch = np.zeros((len(array), *size), array.dtype)
    target, source = overlap(start, size, (0,) * len(size), array.shape[1:])
    patch[(slice(None), *target)] = array[(slice(None), *source)]
    return patch


def _centre_limits(size: int, patch: int) -> tuple[int, int]:
    """First and last centre for which the patch stays inside; only the middle if the volume is smaller."""
    if size <= patch:
        middle = patch // 2 - (patch - size) // 2
        return middle, middle
    return patch // 2, size - patch + patch // 2
