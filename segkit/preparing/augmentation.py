"""Random changes to training patches, computed with MONAI's transforms.

The recipe is that of nnU-Net (Isensee et al. 2021, supplementary note 2) with two additions. A voxel that is exactly 0
stays 0: background of skull-stripped images, padding and missing modalities are exactly 0 at inference too. And whole
modalities are set to 0 at random, so that the network works without them: modality dropout (Neverova et al., "ModDrop",
IEEE PAMI 38(8), 2016, arXiv 1501.00102), with every incomplete set of modalities equally likely.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from monai.data import get_track_meta, set_track_meta
from monai.networks.layers import AffineTransform, gaussian_1d, separable_filtering
from monai.transforms import AdjustContrast, Flip, ScaleIntensity, ScaleIntensityFixedMean
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch.nn import functional

from segkit.config import Config
from segkit.shapes import AnyArray, overlap

Range = tuple[float, float]

_THIN = 3
"""A patch axis this many times shorter than the longest one is the slice axis of anisotropic data."""

_INVERTED_GAMMA = 0.25
"""Share of the gamma curves that act on the inverted image (nnU-Net: 0.1 against 0.3)."""


class IntensityConfig(Config):
    """Probabilities (per item and modality) and ranges of intensity changes, in the order of their application."""

    noise_probability: float = Field(default=0.1, ge=0, le=1)
    """Probability of Gaussian noise."""

    noise_std_range: Range = (0.0, 0.1)
    """Standard deviation of the noise, in units of the normalised image."""

    blur_probability: float = Field(default=0.1, ge=0, le=1)
    """Probability of Gaussian blurring."""

    blur_sigma_range: Range = (0.5, 1.0)
    """Standard deviation of the blur in voxels."""

    brightness_probability: float = Field(default=0.15, ge=0, le=1)
    """Probability of multiplying by a factor."""

    brightness_range: Range = (0.75, 1.25)
    """The factor of the brightness change."""

    contrast_probability: float = Field(default=0.15, ge=0, le=1)
    """Probability of stretching intensities about their mean, within their original range."""

    contrast_range: Range = (0.75, 1.25)
    """The factor of the contrast change."""

    low_resolution_probability: float = Field(default=0.125, ge=0, le=1)
    """Probability of downsampling the patch and upsampling it again."""

    low_resolution_range: Range = (0.5, 1.0)
    """Resolution after downsampling, as a fraction."""

    gamma_probability: float = Field(default=0.3, ge=0, le=1)
    """Probability of a gamma curve that keeps mean and standard deviation; a quarter of them on the inverted image."""

    gamma_range: Range = (0.7, 1.5)
    """Exponent of the gamma curve."""


class AugmentationConfig(IntensityConfig):
    """Probabilities (per item; for intensity changes also per modality) and ranges of the training augmentation."""

    enabled: bool = True
    """Whether to augment; otherwise patches are only cut."""

    mirror_axes: tuple[int, ...] | None = None
    """Voxel axes (0, 1, 2 after orientation) along which patches are mirrored, each with probability 0.5. None lets
    planning decide: left and right must not be exchanged if the labels distinguish them."""

    rotation_probability: float = Field(default=0.2, ge=0, le=1)
    """Probability of a rotation about each axis (in a thin patch, only about the slice axis)."""

    rotation_degrees: float = Field(default=30.0, ge=0, le=180)
    """Largest angle of a rotation, either way, in degrees."""

    scale_probability: float = Field(default=0.2, ge=0, le=1)
    """Probability of zooming."""

    scale_range: Range = (0.7, 1.4)
    """Size of the area shown in the patch, relative to the patch: below 1 magnifies."""

    modality_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Probability that a patch lacks at least one modality, set to 0 as at inference; one is always kept, and every
    incomplete set is equally likely. None lets planning decide: 0.2 for the MRI sequences of BraTS, else 0."""

    lesion_bank: Path | None = None
    """Folder of lesion-free copies of the training cases, written by `segkit inpaint --bank`, into which lesions of
    other training cases are moved; None for no bank."""

    lesion_share: float = Field(default=0.3, ge=0, le=1)
    """With a bank, the share of patches that show a lesion of their case in the copy of another case."""

    lesion_free_share: float = Field(default=0.1, ge=0, le=1)
    """With a bank, the share of patches that show an unchanged copy, without any lesion."""

    @model_validator(mode="after")
    def _check_shares(self) -> AugmentationConfig:
        if self.lesion_share + self.lesion_free_share > 1:
            raise ValueError("lesion_share and lesion_free_share are more than 1 together")
        return self


class Augmentation:
    """Cuts a patch of `patch_size` voxels around a centre, rotated and scaled, and changes its intensities.

    The result depends on the sample, the centre and the seed only.
    """

    def __init__(self, config: AugmentationConfig, patch_size: Sequence[int]) -> None:
        self.config = config
        self.patch_size = tuple(patch_size)
        self.dims = len(self.patch_size)

    def reach(self, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Voxels before and after the centre, per axis, that a patch of this seed needs."""
        matrix = self._spatial_matrix(seed)
        if matrix is None:
            return tuple(size // 2 for size in self.patch_size), tuple(size - size // 2 for size in self.patch_size)
        half = np.array(self.patch_size) / 2
        extent = np.ceil(np.abs(matrix) @ half).astype(int) + 1
        return tuple(extent.tolist()), tuple((extent + 1).tolist())

    def __call__(
        self, sample: Mapping[str, AnyArray], seed: int, centre: Sequence[int] | None = None
    ) -> dict[str, torch.Tensor]:
        """A patch of "image" (C, *spatial) float32 and possibly "labels" (1, *spatial) uint8, which do not change.

        `centre` is the voxel of the sample at voxel `patch_size // 2` of the patch; by default the middle. Returned are
        the same keys, (C, *patch_size) and (1, *patch_size), with zeros outside the sample.
        """
        if centre is None:
            centre = [size // 2 for size in sample["image"].shape[1:]]
        matrix = self._spatial_matrix(seed)
        with _plain_tensors():
            patch = {
                name: self._cut(array, centre, matrix, "bilinear" if name == "image" else "nearest")
                for name, array in sample.items()
            }
            if self.config.enabled:
                generator = np.random.default_rng((seed, 1))
                if axes := [axis for axis in self.config.mirror_axes or () if generator.random() < 0.5]:
                    patch = {name: Flip(axes)(tensor) for name, tensor in patch.items()}
                patch["image"] = change_intensities(patch["image"], self.config, generator)
                _drop_modalities(patch["image"], self.config.modality_dropout or 0.0, generator)
        return patch

    def _spatial_matrix(self, seed: int) -> NDArray[np.float64] | None:
        """Rotation and scale from patch to sample offsets, in voxels; None for the identity."""
        config = self.config
        generator = np.random.default_rng((seed, 0))
        matrix = np.eye(self.dims)
        for first, second in rotation_planes(self.patch_size):
            is_drawn = generator.random() < config.rotation_probability
            angle = math.radians(generator.uniform(-config.rotation_degrees, config.rotation_degrees))
            if is_drawn:
                turn = np.eye(self.dims)
                turn[[first, second], [first, second]] = math.cos(angle)
                turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
                matrix = turn @ matrix
        if generator.random() < config.scale_probability:
            matrix = matrix * _either_side_of_one(generator, config.scale_range)
        is_identity = np.array_equal(matrix, np.eye(self.dims))
        return None if is_identity or not config.enabled else matrix

    def _cut(
        self, array: AnyArray, centre: Sequence[int], matrix: NDArray[np.float64] | None, mode: str
    ) -> torch.Tensor:
        """The patch (C, *patch_size) of (C, *spatial) around `centre`, resampled once if there is a matrix."""
        pivot = np.array(self.patch_size) // 2
        if matrix is None:
            return torch.from_numpy(_crop(array, (np.asarray(centre) - pivot).tolist(), self.patch_size))
        theta = np.eye(self.dims + 1)
        theta[:-1, :-1] = matrix
        theta[:-1, -1] = np.asarray(centre) - matrix @ pivot
        resample = AffineTransform(self.patch_size, mode=mode, padding_mode="zeros", align_corners=True)
        source = torch.from_numpy(np.array(array, np.float32, order="C"))
        patch: torch.Tensor = resample(source[None], torch.from_numpy(theta).float())[0]
        return patch if mode == "bilinear" else patch.to(torch.uint8)


def change_intensities(image: torch.Tensor, config: IntensityConfig, generator: np.random.Generator) -> torch.Tensor:
    """(C, *spatial) float32, each modality changed in place; voxels that were 0 stay 0."""
    with _plain_tensors():
        for plane in image:
            changed = _change_plane(plane[None], config, generator)
            if changed is not None:
                plane.copy_(changed[0].masked_fill_(plane == 0, 0))
    return image


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Make MONAI return plain tensors; MetaTensor takes more time than most of the transforms."""
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


def _either_side_of_one(generator: np.random.Generator, limits: Range) -> float:
    """A factor below or above 1 with equal probability, also in an asymmetric range."""
    low, high = limits
    if low < 1 and (high <= 1 or generator.random() < 0.5):
        return float(generator.uniform(low, min(high, 1.0)))
    return float(generator.uniform(max(low, 1.0), high))


def _crop(array: AnyArray, start: Sequence[int], size: Sequence[int]) -> AnyArray:
    """A copy of (C, *spatial) from voxel `start`, `size` voxels; zeros outside the array."""
    patch = np.zeros((len(array), *size), array.dtype)
    target, source = overlap(start, size, (0,) * len(size), array.shape[1:])
    patch[(slice(None), *target)] = array[(slice(None), *source)]
    return patch


def _change_plane(
    original: torch.Tensor, config: IntensityConfig, generator: np.random.Generator
) -> torch.Tensor | None:
    """One modality (1, *spatial) after the intensity changes, each with its probability; None if none is drawn."""
    plane = original
    if generator.random() < config.noise_probability:
        std = generator.uniform(*config.noise_std_range)
        plane = plane + std * torch.from_numpy(generator.standard_normal(tuple(plane.shape), np.float32))
    if generator.random() < config.blur_probability:
        plane = _blur(plane, generator.uniform(*config.blur_sigma_range))
    if generator.random() < config.brightness_probability:
        factor = _either_side_of_one(generator, config.brightness_range)
        plane = ScaleIntensity(minv=None, maxv=None, factor=factor - 1)(plane)
    if generator.random() < config.contrast_probability:
        factor = _either_side_of_one(generator, config.contrast_range)
        plane = ScaleIntensityFixedMean(factor=factor - 1, preserve_range=True)(plane)
    if generator.random() < config.low_resolution_probability:
        plane = _lower_resolution(plane, generator.uniform(*config.low_resolution_range))
    if generator.random() < config.gamma_probability:
        gamma = _either_side_of_one(generator, config.gamma_range)
        is_inverted = bool(generator.random() < _INVERTED_GAMMA)
        plane = AdjustContrast(gamma, invert_image=is_inverted, retain_stats=True)(plane)
    return None if plane is original else plane


def _drop_modalities(image: torch.Tensor, probability: float, generator: np.random.Generator) -> None:
    """Set random modalities of (C, *spatial) to 0, in place; at least one that is not 0 is kept."""
    if generator.random() >= probability:
        return
    present = np.flatnonzero(image.flatten(1).any(dim=1).numpy())
    if len(present) < 2:
        return
    is_kept = np.zeros(len(present), np.bool_)
    while is_kept.all() or not is_kept.any():
        is_kept = generator.random(len(present)) < 0.5
    image[torch.from_numpy(present[~is_kept])] = 0


def _blur(plane: torch.Tensor, sigma: float) -> torch.Tensor:
    """As `GaussianSmooth` of MONAI, which builds a module in each call and takes three times as long for a slice."""
    kernel = gaussian_1d(torch.tensor(sigma), truncated=4.0, approx="erf")
    blurred: torch.Tensor = separable_filtering(plane[None], [kernel] * (plane.ndim - 1))[0]
    return blurred


def _lower_resolution(plane: torch.Tensor, fraction: float) -> torch.Tensor:
    """Downsampled by nearest neighbour and upsampled by linear interpolation, like a coarser scan."""
    shape = plane.shape[1:]
    coarse = [max(1, round(size * fraction)) for size in shape]
    small = functional.interpolate(plane[None], size=coarse, mode="nearest-exact")
    return functional.interpolate(small, size=shape, mode="bilinear" if len(shape) == 2 else "trilinear")[0]
