"""Our transforms beside MONAI's, and how a `Compose` of both is run.

They take and return dictionaries with "image" (C, *spatial) float32 and, where there is a reference, "label"
(1, *spatial) uint8, and draw from `self.R` as all transforms of MONAI do.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from monai.data import get_track_meta, set_track_meta
from monai.transforms import Compose, MapTransform, Randomizable, RandomizableTransform
from numpy.typing import NDArray

IMAGE, LABEL = "image", "label"
"""The keys of a patch."""

_THIN = 3
"""A patch axis this many times shorter than the longest one is the slice axis of anisotropic data."""


class KeepBackground(Compose):  # type: ignore[misc]
    """Transforms of the image alone, after which a voxel that was exactly 0 is 0 again."""

    def __call__(self, data: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        """The changed patch."""
        image = data[IMAGE]
        changed: dict[str, Any] = dict(super().__call__(data))
        if changed[IMAGE] is not image:
            changed[IMAGE].masked_fill_(image == 0, 0)
        return changed


class EachModality(KeepBackground):
    """The same for each modality on its own, with its own random numbers. The image is changed in place."""

    def __call__(self, data: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        """The changed patch."""
        for plane in data[IMAGE]:
            alone = plane[None]
            changed = super().__call__({IMAGE: alone})[IMAGE]
            if changed is not alone:
                plane.copy_(changed[0])
        return dict(data)


class RandNoised(RandomizableTransform, MapTransform):  # type: ignore[misc]
    """Gaussian noise whose standard deviation is drawn from a range.

    `RandGaussianNoised` draws it from 0 up, and the noise in float64: 3.3 ms instead of 2.3 ms for 64^3 voxels (one
    core, 2026-11-30, `benchmarks/patches.py --transforms`).
    """

    def __init__(self, keys: Sequence[str], std_range: tuple[float, float], prob: float) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.std_range = std_range

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The changed patch."""
        changed = dict(data)
        self.randomize(None)
        if self._do_transform:
            std = self.R.uniform(*self.std_range)
            generator = generator_from(self.R)
            for key in self.key_iterator(changed):
                noise = generator.standard_normal(tuple(changed[key].shape), np.float32)
                changed[key] = changed[key] + std * torch.from_numpy(noise)
        return changed


class RandModalityDropoutd(RandomizableTransform, MapTransform):  # type: ignore[misc]
    """Sets random modalities to 0; at least one that is not 0 is kept, and every incomplete set is equally likely."""

    def __init__(self, keys: Sequence[str], prob: float) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The changed patch."""
        changed = dict(data)
        self.randomize(None)
        for key in self.key_iterator(changed) if self._do_transform else ():
            image = changed[key]
            present = np.flatnonzero(image.flatten(1).any(dim=1).numpy())
            if len(present) < 2:
                continue
            is_kept = np.zeros(len(present), np.bool_)
            while is_kept.all() or not is_kept.any():
                is_kept = self.R.random_sample(len(present)) < 0.5
            changed[key] = image.clone()
            changed[key][torch.from_numpy(present[~is_kept])] = 0
        return changed


def generator_from(random: np.random.RandomState) -> np.random.Generator:
    """A generator whose seed is the next number of a MONAI random state."""
    return np.random.default_rng(random.randint(2**32, size=2, dtype=np.uint32))


def share_random_state(transform: Any, random: np.random.RandomState) -> None:
    """Make a transform, and all those in it, draw from one random state; seeding it then seeds all of them.

    `Compose.set_random_state` makes a new state for each transform instead, which takes 1.4 ms for ten of them.
    """
    if isinstance(transform, Compose):
        transform.R = random
        for inner in transform.transforms:
            share_random_state(inner, random)
    elif isinstance(transform, Randomizable):
        transform.set_random_state(state=random)


def run(transforms: Compose, data: Mapping[str, Any]) -> dict[str, Any]:
    """The result of `transforms`, with plain tensors: `MetaTensor` takes more time than most of the transforms.

    Raises:
        Exception: as the transform raised it, without the RuntimeErrors in which MONAI wraps it.
    """
    try:
        with _plain_tensors():
            result: dict[str, Any] = transforms(data)
            return result
    except RuntimeError as error:
        inner: BaseException = error
        while str(inner).startswith("applying transform") and inner.__cause__ is not None:
            inner = inner.__cause__
        raise inner from None


@contextmanager
def _plain_tensors() -> Iterator[None]:
    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)


def rotation_planes(patch_size: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of axes to rotate in: all of them, or only the slice plane if one axis of the patch is thin."""
    planes = list(itertools.combinations(range(len(patch_size)), 2))
    thinnest = min(range(len(patch_size)), key=patch_size.__getitem__)
    if len(planes) > 1 and patch_size[thinnest] * _THIN < max(patch_size):
        return [plane for plane in planes if thinnest not in plane]
    return planes


def rotation(dims: int, plane: tuple[int, int], degrees: float) -> NDArray[np.float64]:
    """The matrix (dims, dims) of a rotation in a plane of two axes."""
    first, second = plane
    angle, turn = math.radians(degrees), np.eye(dims)
    turn[[first, second], [first, second]] = math.cos(angle)
    turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
    return turn


def halves_about_one(limits: tuple[float, float]) -> list[tuple[float, float]]:
    """The parts of a range below and above 1: as long as there are two, each is drawn equally often."""
    low, high = limits
    parts = [(low, min(high, 1.0))] if low < 1 else []
    return [*parts, (max(low, 1.0), high)] if high > 1 or not parts else parts
