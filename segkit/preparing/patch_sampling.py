"""Training patches: case, place and augmentation depend on (seed, index) only."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.networks.layers import AffineTransform
from monai.transforms import Compose, RandomizableTransform
from numpy.typing import NDArray
from torch.utils.data import Dataset

from segkit.preparing.preprocessing import PreparedCase
from segkit.preparing.transforms import (
    IMAGE,
    LABEL,
    halves_about_one,
    rotation,
    rotation_planes,
    run,
    share_random_state,
)
from segkit.shapes import AnyArray, overlap

_JITTER = 0.25
"""Largest distance of a chosen foreground voxel from the middle of its patch, as a share of the patch."""


class RandPatchd(RandomizableTransform):  # type: ignore[misc]
    """Cuts a patch around a drawn centre, rotated and scaled.

    With probability `foreground_fraction` the patch is centred, within a jitter, on a voxel of a label value drawn
    uniformly from those present in the case; otherwise it lies anywhere inside the volume, in a case with ignored
    voxels around any of the others. Voxel `patch_size // 2` is the centre. A volume smaller than the patch is padded
    with zeros on both sides. `scale_range` is the size of what the patch shows, relative to the patch.

    Takes {"case": PreparedCase, possibly "lesion": Transplant}; returns "image" (C, *patch_size) float32 and, with a
    reference, "label" (1, *patch_size) uint8. Only the voxels that a patch shows are read from a memory-mapped case.

    `RandAffined` does not replace it: it draws all rotations together and a scale for each axis, and needs a box that
    is large enough for every rotation. From that box it takes twice as long: 58 ms instead of 26 ms for 4 x 64^3 voxels
    with their labels (one core, 2026-11-30, `benchmarks/patches.py --transforms`).
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
        """The patch."""
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
        return {key: self.cut(array, centre - start, matrix, is_label=key == LABEL) for key, array in sample.items()}

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
            halves = halves_about_one(self.scale_range)
            scale = self.R.uniform(*halves[self.R.randint(len(halves))])
            matrix = scale * (np.eye(len(self.patch_size)) if matrix is None else matrix)
        return matrix

    def reach(self, matrix: NDArray[np.float64] | None) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Voxels before and after the centre, per axis, that a patch needs."""
        size = np.array(self.patch_size)
        if matrix is None:
            return size // 2, size - size // 2
        extent = np.ceil(np.abs(matrix) @ (size / 2)).astype(int) + 1
        return extent, extent + 1

    def cut(
        self, array: AnyArray, centre: NDArray[np.intp], matrix: NDArray[np.float64] | None, *, is_label: bool
    ) -> torch.Tensor:
        """The patch (C, *patch_size) of (C, *spatial) around `centre`, resampled once if there is a matrix."""
        pivot = np.array(self.patch_size) // 2
        if matrix is None:
            return torch.from_numpy(_crop(array, (centre - pivot).tolist(), self.patch_size))
        theta = np.eye(len(pivot) + 1)
        theta[:-1, :-1] = matrix
        theta[:-1, -1] = centre - matrix @ pivot
        mode = "nearest" if is_label else "bilinear"
        has_corners = 1 not in self.patch_size  # else torch places the only slice half a voxel off
        resample = AffineTransform(self.patch_size, mode=mode, padding_mode="zeros", align_corners=has_corners)
        source = torch.from_numpy(np.array(array, np.float32, order="C"))
        patch: torch.Tensor = resample(source[None], torch.from_numpy(theta).float())[0]
        return patch.to(torch.uint8) if is_label else patch


class PatchDataset(Dataset[dict[str, torch.Tensor]]):
    """Random patches of prepared cases: `transforms` applied to {"case": PreparedCase}.

    Item i depends on (seed, i) only, not on the number of workers, so a resumed run continues exactly. Each
    `len(prepared)` items have every case once, in a new random order.
    """

    def __init__(self, prepared: Sequence[PreparedCase], transforms: Compose, *, seed: int, length: int) -> None:
        self.prepared = prepared
        self.transforms = transforms
        self.seed = seed
        self.length = length
        self._random = np.random.RandomState(0)
        share_random_state(transforms, self._random)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Item `index`: "image" (C, *patch_size) float32 and, with a reference, "label" (*patch_size) uint8."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        self._random.seed(np.random.SeedSequence((self.seed, 1, index)).generate_state(4))
        patch = run(self.transforms, {"case": self.prepared[self.case_number(index)]})
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
