"""Training patches: case, place and augmentation depend on (seed, index) only."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from segkit.preparing.augmentation import Augmentation, AugmentationConfig
from segkit.preparing.lesion_bank import LesionBank
from segkit.preparing.preprocessing import PreparedCase
from segkit.shapes import AnyArray

_JITTER = 0.25
"""Largest distance of a chosen foreground voxel from the middle of its patch, as a share of the patch."""


class PatchDataset(Dataset[dict[str, torch.Tensor]]):
    """Random patches of prepared cases.

    Item i depends on (seed, i) only, not on the number of workers, so a resumed run continues exactly. Each
    `len(prepared)` items have every case once, in a new random order.

    With probability `foreground_fraction` a patch is centred, within a jitter, on a voxel of a label value drawn
    uniformly from those present in the case; otherwise it lies anywhere inside the volume, in a case with ignored
    voxels at any of the others. A volume smaller than the
    patch is padded with zeros on both sides. With a `bank` some patches show a lesion of their case in another
    brain, or no lesion.
    """

    def __init__(
        self,
        prepared: Sequence[PreparedCase],
        patch_size: Sequence[int],
        augmentation: AugmentationConfig,
        *,
        foreground_fraction: float,
        seed: int,
        length: int,
        bank: LesionBank | None = None,
    ) -> None:
        self.prepared = prepared
        self.patch_size = tuple(patch_size)
        self.augmentation = Augmentation(augmentation, patch_size)
        self.foreground_fraction = foreground_fraction
        self.seed = seed
        self.length = length
        self.bank = bank

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Item `index`: "image" (C, *patch_size) float32 and, with a reference, "labels" (*patch_size) uint8."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        case = self.prepared[self._case_number(index)]
        lesion = None
        if self.bank is not None:
            case, lesion = self.bank.exchange(case, np.random.default_rng((self.seed, 2, index)))
        generator = np.random.default_rng((self.seed, 1, index))
        centre = self._centre(case, generator)
        seed = int(generator.integers(2**63))
        before, after = self.augmentation.reach(seed)
        start = np.maximum(np.subtract(centre, before), 0).tolist()
        region = tuple(map(slice, start, np.add(centre, after).tolist()))
        sample: dict[str, AnyArray] = {"image": case.image[(slice(None), *region)]}
        if case.labels is not None:
            sample["labels"] = case.labels[region][None]
        if lesion is not None:
            sample = lesion.paste_into(sample, start)
        patch = self.augmentation(sample, seed, np.subtract(centre, start).tolist())
        if "labels" in patch:
            patch["labels"] = patch["labels"][0]
        return patch

    def _case_number(self, index: int) -> int:
        which_pass, place = divmod(index, len(self.prepared))
        order = np.random.default_rng((self.seed, 0, which_pass)).permutation(len(self.prepared))
        return int(order[place])

    def _centre(self, case: PreparedCase, generator: np.random.Generator) -> list[int]:
        """The voxel of the case at voxel `patch_size // 2` of the patch."""
        shape = case.image.shape[1:]
        limits = [_centre_limits(size, patch) for size, patch in zip(shape, self.patch_size, strict=True)]
        values = sorted(case.foreground.keys() - {0})
        if values and generator.random() < self.foreground_fraction:
            voxels = case.foreground[values[generator.integers(len(values))]]
        elif 0 in case.foreground:
            voxels = case.foreground[0]
        else:
            return [int(generator.integers(low, high + 1)) for low, high in limits]
        voxel = np.unravel_index(int(voxels[generator.integers(len(voxels))]), shape)
        centre = []
        for place, patch, (low, high) in zip(voxel, self.patch_size, limits, strict=True):
            jitter = int(patch * _JITTER)
            moved = int(place) + int(generator.integers(-jitter, jitter + 1))
            centre.append(min(max(moved, low), high))
        return centre


def _centre_limits(size: int, patch: int) -> tuple[int, int]:
    """First and last centre for which the patch stays inside; only the middle if the volume is smaller."""
    if size <= patch:
        middle = patch // 2 - (patch - size) // 2
        return middle, middle
    return patch // 2, size - patch + patch // 2
