"""Our transforms beside MONAI's, and how a `Compose` of both is run.

They take and return dictionaries with "image" (C, *spatial) float32 and, where there is a reference, "label"
(1, *spatial) uint8, and draw from `self.R` as all transforms of MONAI do.
"""

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from monai.data import get_track_meta, set_track_meta
from monai.networks.layers import GaussianFilter
from monai.transforms import Compose, MapTransform, Randomizable, RandomizableTransform
from numpy.typing import NDArray

IMAGE, LABEL = "image", "label"
"""The keys of a patch."""

_SETS = 64
"""Sets of modalities that are drawn for a patch: the probability that none is incomplete is below 1e-19."""

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


class _RandChanged(RandomizableTransform, MapTransform):  # type: ignore[misc]
    """A random change of images on their device, for which the host does not wait."""

    def __init__(self, keys: Sequence[str], prob: float) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The changed patch."""
        changed = dict(data)
        self.randomize(None)
        for key in self.key_iterator(changed) if self._do_transform else ():
            changed[key] = self.change(changed[key])
        return changed

    @abstractmethod
    def change(self, image: torch.Tensor) -> torch.Tensor:
        """The image (C, *spatial), changed as drawn."""


class RandNoised(_RandChanged):
    """Gaussian noise whose standard deviation is drawn from a range.

    `RandGaussianNoised` draws it from 0 up, and the noise on the CPU in float64: 3.2 ms instead of 0.7 ms for 64^3
    voxels (one core, 2026-12-01, `benchmarks/patches.py --transforms`).
    """

    def __init__(self, keys: Sequence[str], std_range: tuple[float, float], prob: float) -> None:
        super().__init__(keys, prob)
        self.std_range = std_range

    def change(self, image: torch.Tensor) -> torch.Tensor:
        """The image with noise."""
        std: float = self.R.uniform(*self.std_range)
        generator = torch.Generator(image.device).manual_seed(int(self.R.randint(2**63)))
        noise = torch.randn(image.shape, generator=generator, device=image.device)
        return image + std * noise


class RandBlurd(_RandChanged):
    """Gaussian blurring, with a standard deviation in voxels drawn for each axis.

    It is MONAI's filter. `RandGaussianSmoothd` makes the host wait for the widths, which it puts on the device.
    """

    def __init__(self, keys: Sequence[str], sigma_range: tuple[float, float], prob: float) -> None:
        super().__init__(keys, prob)
        self.sigma_range = sigma_range

    def change(self, image: torch.Tensor) -> torch.Tensor:
        """The blurred image."""
        sigma = [self.R.uniform(*self.sigma_range) for _ in image.shape[1:]]
        blurred: torch.Tensor = GaussianFilter(len(sigma), sigma)(image[None])[0]
        return blurred


class RandGammad(_RandChanged):
    """A gamma curve that keeps mean and standard deviation, in a quarter of the cases of the inverted image.

    These are nnU-Net's two, with probabilities of 0.3 and 0.1. `RandAdjustContrastd` makes the host wait for the range
    of intensities.
    """

    def __init__(self, keys: Sequence[str], gamma_range: tuple[float, float], prob: float) -> None:
        super().__init__(keys, prob)
        self.gamma_range = gamma_range

    def change(self, image: torch.Tensor) -> torch.Tensor:
        """The image with the curve."""
        gamma, sign = drawn_about_one(self.R, self.gamma_range), -1 if self.R.random_sample() < 0.25 else 1
        image = sign * image
        low = image.min()
        extent = image.max() - low
        curve = ((image - low) / (extent + 1e-7)) ** gamma * extent
        curve = (curve - curve.mean()) / (curve.std() + 1e-8)
        return sign * (image.std() * curve + image.mean())


class RandModalityDropoutd(_RandChanged):
    """Sets random modalities to 0; at least one that is not 0 is kept, and every incomplete set is equally likely."""

    def change(self, image: torch.Tensor) -> torch.Tensor:
        """The image with the first drawn set that is incomplete, which is found on the device."""
        drawn = torch.from_numpy(self.R.random_sample((_SETS, len(image))) < 0.5).to(image.device)
        present = image.flatten(1).any(dim=1)
        sets = drawn & present
        is_incomplete = sets.any(1) & (sets != present).any(1)
        first = sets[is_incomplete.int().argmax(0, keepdim=True)]  # (1, C)
        is_kept = torch.where(is_incomplete.any(), first, present)
        return image.where(is_kept.view(-1, *[1] * (image.dim() - 1)), 0.0)


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


def run(transforms: Compose, data: Mapping[str, Any], start: int = 0, end: int | None = None) -> dict[str, Any]:
    """The result of `transforms[start:end]`, with plain tensors: `MetaTensor` takes more time than most transforms.

    Raises:
        Exception: as the transform raised it, without the RuntimeErrors in which MONAI wraps it.
    """
    try:
        with _plain_tensors():
            result: dict[str, Any] = transforms(data, start=start, end=end)
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


def drawn_about_one(random: np.random.RandomState, limits: tuple[float, float]) -> float:
    """A number from a range; as often from its part below 1 as from that above, if it has both."""
    low, high = limits
    if low < 1 < high:
        low, high = (low, 1.0) if random.random_sample() < 0.5 else (1.0, high)
    return random.uniform(low, high)
