"""Training patches with holes; case, position and hole depend only on (seed, index)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from segkit.checkpoint.card import Context, Fill
from segkit.inpainting.inputs import needs_mirror, stack_inputs
from segkit.inpainting.midplane import Midplane, find_midplane, mirror_of
from segkit.inpainting.predictor import Box
from segkit.preparing.holes import HoleMaker, grow
from segkit.preparing.preprocessing import PreparedCase
from segkit.shapes import AnyArray, Image

_JITTER = 0.125  # largest distance of the chosen voxel from the centre of its patch, as a share of the patch
_TRIES = 100
_SLICE_AXIS = 2  # axis of a volume in RAS that axial slices lack


@dataclass(frozen=True)
class HoleRules:
    """Holes and augmentation of a patch; see `InpaintingConfig`."""

    maker: HoleMaker = field(repr=False)
    margin_voxels: int
    hidden_lesions: float
    mirror_axes: tuple[int, ...] = ()
    gain: float = 0.0
    shift: float = 0.0


class HoleDataset(Dataset[dict[str, torch.Tensor]]):
    """Patches of prepared cases with a hole in healthy tissue.

    Item i depends only on (seed, i). Labelled voxels of a case are not healthy or unknown: no hole reaches them. If the
    patch has two axes, volumes give slices.
    """

    def __init__(
        self,
        prepared: Sequence[PreparedCase],
        patch_size: Sequence[int],
        context: Context,
        fill: Fill,
        rules: HoleRules,
        *,
        seed: int,
        length: int,
    ) -> None:
        self.prepared = prepared
        self.patch_size = tuple(patch_size)
        self.context: Context = context
        self.fill: Fill = fill
        self.rules = rules
        self.seed = seed
        self.length = length
        self._midplanes: dict[int, Midplane] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Item `index`: "x" (K, *patch) float32, "image" (C, *patch) float32, "hole" (1, *patch) bool.

        x is the input of the network (`stack_inputs`), image the truth, hole the compared voxels.
        """
        if not 0 <= index < self.length:
            raise IndexError(index)
        generator = np.random.default_rng((self.seed, index))
        number = int(generator.integers(len(self.prepared)))
        case = self.prepared[number]
        box = self._place(case, generator)
        image, size = box.cut(case.image), box.size
        marked, lesion = self._lesion(case, box)
        is_brain = (image != 0).any(0) | lesion
        squeeze = tuple(axis for axis, length in enumerate(size) if len(size) > len(self.patch_size) and length == 1)
        hole = self.rules.maker.draw(is_brain.squeeze(squeeze), ~lesion.squeeze(squeeze), generator).reshape(size)
        missing = hole | lesion if generator.random() < self.rules.hidden_lesions else hole
        if _is_voided(image, marked):
            missing = missing | marked
        mirrored = self._mirrored(number, box, missing) if needs_mirror(self.context, self.fill) else None
        gain = np.float32(max(0.5, 1 + self.rules.gain * generator.standard_normal()))
        shift = np.float32(self.rules.shift * generator.standard_normal())
        image = np.where(image != 0, gain * image + shift, image)
        if mirrored is not None:
            mirrored = np.where(mirrored[1], gain * mirrored[0] + shift, mirrored[0]), mirrored[1]
        flips = tuple(axis - len(self.patch_size) for axis in self.rules.mirror_axes if generator.random() < 0.5)
        x = stack_inputs(image, missing, self.context, mirrored, self.fill)
        arrays: dict[str, AnyArray] = {"x": x, "image": image, "hole": hole[None]}
        outer = tuple(1 + axis for axis in squeeze)
        return {
            name: torch.from_numpy(np.ascontiguousarray(np.flip(array.squeeze(outer), flips)))
            for name, array in arrays.items()
        }

    def _place(self, case: PreparedCase, generator: np.random.Generator) -> Box:
        shape = case.image.shape[1:]
        size = self.patch_size
        if len(shape) > len(size):
            size = (*size[:_SLICE_AXIS], 1, *size[_SLICE_AXIS:])
        voxel = tuple(length // 2 for length in shape)
        for _ in range(_TRIES):
            drawn = tuple(int(generator.integers(length)) for length in shape)
            here: tuple[Any, ...] = (slice(None), *drawn)
            if case.image[here].any() and not (case.labels is not None and case.labels[drawn]):
                voxel = drawn
                break
        reach = [int(length * _JITTER) for length in size]
        start = (
            place - length // 2 + int(generator.integers(-most, most + 1))
            for place, length, most in zip(voxel, size, reach, strict=True)
        )
        return Box(tuple(start), size)

    def _lesion(self, case: PreparedCase, box: Box) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """The labelled voxels of a box, (*size), without and with the margin that no hole may touch."""
        if case.labels is None:
            return np.zeros(box.size, bool), np.zeros(box.size, bool)
        is_slice = len(box.size) > len(self.patch_size)
        halo = [0 if is_slice and length == 1 else self.rules.margin_voxels for length in box.size]
        start = tuple(first - more for first, more in zip(box.start, halo, strict=True))
        size = tuple(length + 2 * more for length, more in zip(box.size, halo, strict=True))
        wide = Box(start, size).cut(case.labels)
        inner = tuple(slice(more, more + length) for more, length in zip(halo, box.size, strict=True))
        return wide[inner] > 0, np.ascontiguousarray(grow(wide > 0, self.rules.margin_voxels)[inner])

    def _mirrored(self, number: int, box: Box, missing: NDArray[np.bool_]) -> tuple[Image, NDArray[np.bool_]]:
        """The box of the mirrored volume, and where it is known: not opposite missing voxels."""
        case = self.prepared[number]
        if number not in self._midplanes:
            self._midplanes[number] = find_midplane(case.image, case.preparation.spacing_mm)
        is_missing = np.zeros(case.image.shape[1:], bool)
        box.paste(missing, is_missing, missing)
        return mirror_of(case.image, is_missing, self._midplanes[number], box.start, box.size)


def _is_voided(image: Image, marked: NDArray[np.bool_]) -> bool:
    return bool(marked.any()) and float((image[:, marked] != 0).mean()) < 0.5
