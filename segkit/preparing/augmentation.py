"""The recipe of random changes to training patches: MONAI's dictionary transforms, and ours beside them.

It is that of nnU-Net (Isensee et al. 2021, supplementary note 2) with two additions. A voxel that is exactly 0 stays 0:
background of skull-stripped images, padding and missing modalities are exactly 0 at inference too. And whole
modalities are set to 0 at random, so that the network works without them: modality dropout (Neverova et al., "ModDrop",
IEEE PAMI 38(8), 2016, arXiv 1501.00102), with every incomplete set of modalities equally likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from monai.transforms import (
    Compose,
    RandFlipd,
    RandomizableTransform,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
    RandSimulateLowResolutiond,
    Transform,
)
from pydantic import Field, model_validator

from segkit.config import Config
from segkit.preparing.patch_sampling import RandBoxd, ResampleBoxd
from segkit.preparing.transforms import (
    IMAGE,
    LABEL,
    EachModality,
    RandBlurd,
    RandGammad,
    RandModalityDropoutd,
    RandNoised,
)

Range = tuple[float, float]


class IntensityConfig(Config):
    """Probabilities (per item and modality) and ranges of intensity changes, in the order of their application."""

    noise_probability: float = Field(default=0.1, ge=0, le=1)
    """Probability of Gaussian noise."""

    noise_std_range: Range = (0.0, 0.1)
    """Standard deviation of the noise, in units of the normalised image."""

    blur_probability: float = Field(default=0.1, ge=0, le=1)
    """Probability of Gaussian blurring."""

    blur_sigma_range: Range = (0.5, 1.0)
    """Standard deviation of the blur in voxels, drawn for each axis."""

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

    on_device: bool = False
    """Whether patches are rotated, zoomed, mirrored and changed in intensity on the device of the training, instead of
    by the processes that read them: for a GPU that waits for patches. Modalities are dropped there too."""

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


def training_transforms(
    config: AugmentationConfig,
    patch_size: Sequence[int],
    *,
    foreground_fraction: float,
    bank: RandomizableTransform | None = None,
    before: Sequence[Transform] = (),
    after: Sequence[Transform] = (),
) -> Compose:
    """From {"case": PreparedCase} to a patch of "image" (C, *patch_size) and "label" (1, *patch_size).

    `before` and `after` are transforms of the user, applied to the patch before and after ours. Modalities are dropped
    last, so that a missing one is exactly 0.
    """
    both, c, first = (IMAGE, LABEL), config, [] if bank is None else [bank]
    if not config.enabled:
        return Compose([*first, RandBoxd(patch_size, foreground_fraction=foreground_fraction), *before, *after])
    return Compose(
        [
            *first,
            RandBoxd(
                patch_size,
                foreground_fraction=foreground_fraction,
                rotation_probability=c.rotation_probability,
                rotation_degrees=c.rotation_degrees,
                scale_probability=c.scale_probability,
                scale_range=c.scale_range,
            ),
            ResampleBoxd(patch_size),
            *before,
            *(RandFlipd(both, 0.5, axis, allow_missing_keys=True) for axis in c.mirror_axes or ()),
            intensity_transforms(config, len(patch_size)),
            *after,
            RandModalityDropoutd(IMAGE, c.modality_dropout or 0.0),
        ]
    )


def intensity_transforms(config: IntensityConfig, dims: int) -> EachModality:
    """Changes of "image" (C, *spatial) with `dims` axes, drawn for each modality; exact zeros stay 0."""
    c, linear = config, "bilinear" if dims == 2 else "trilinear"
    return EachModality(
        [
            RandNoised(IMAGE, c.noise_std_range, c.noise_probability),
            RandBlurd(IMAGE, c.blur_sigma_range, c.blur_probability),
            RandScaleIntensityd(IMAGE, _factors(c.brightness_range), c.brightness_probability),
            RandScaleIntensityFixedMeand(
                IMAGE, _factors(c.contrast_range), preserve_range=True, prob=c.contrast_probability
            ),
            RandSimulateLowResolutiond(
                IMAGE, c.low_resolution_probability, "nearest-exact", linear, c.low_resolution_range
            ),
            RandGammad(IMAGE, c.gamma_range, c.gamma_probability),
        ]
    )


def _factors(limits: Range) -> Range:
    """A range about 1 as MONAI counts it, about 0."""
    return limits[0] - 1, limits[1] - 1
