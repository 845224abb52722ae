"""The loss of made-up voxels: absolute and squared difference from the truth, and structural similarity.

Every term looks at the hole alone. What a network gives elsewhere is thrown away, since known voxels are kept as they
are, so nothing is asked of it there and no gradient reaches it.

Adversarial terms: a discriminator learns to tell true images from made-up ones, a generator to deceive it.

Both are the non-saturating ones of Goodfellow et al. 2014: binary cross-entropy of each patch's logit, the generator's
against the verdict "true". MONAI's PatchAdversarialLoss with "bce" has the same values where logits are small, but
takes the logarithm of a sigmoid in the precision that it gets: in float32 a logit of -40 teaches the generator nothing
any more and one of 17 the discriminator nothing, just where each of them is most wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from segkit.config import Config
from segkit.losses.global_batch import batch_sum


class RestorationConfig(Config):
    """How the terms are combined, and the scale of the intensities that structural similarity needs to know."""

    l1: float = Field(default=1.0, ge=0)
    """Weight of the mean absolute difference."""

    ssim: float = Field(default=0.5, ge=0)
    """Weight of 1 - SSIM; 0 does not compute it."""

    mse: float = Field(default=0.1, ge=0)
    """Weight of the mean squared difference."""

    ssim_window: int = Field(default=7, ge=3)
    """Edge of the window in which SSIM compares, voxels, odd."""

    darkest: float = 0.0
    """Intensity that SSIM takes for black. It compares means by their ratio, so it needs intensities from 0 on: of
    intensities around 0, such as z-scores, a 0.1 for a -0.1 would cost as much as black for white."""

    data_range: float = Field(default=6.0, gt=0)
    """Intensities from black to white; of a brain with deviation 1 about 6."""

    @field_validator("ssim_window")
    @classmethod
    def _has_a_centre(cls, window: int) -> int:
        if window % 2 == 0:
            raise ValueError(f"a window of {window} voxels has no voxel in its centre; use an odd number")
        return window


def restoration_loss(
    found: Tensor | Sequence[Tensor], image: Tensor, hole: Tensor, config: RestorationConfig
) -> Tensor:
    """Weighted L1 + (1 - SSIM) + MSE of what was made up in a hole.

    Each term is a mean over the channels of all hole voxels of the batch, so that a small hole counts as little as it
    is. SSIM is that of the truth and the truth with the hole filled: its windows see known voxels around a hole.

    Args:
        found: (B, C, *spatial), any floating type, as the network gives it; of a list the first entry counts. The loss
            is computed in float32 also under autocast.
        image: The truth, (B, C, *spatial).
        hole: (B, 1, *spatial) booleans, True where the image is to be made up.
        config: The weights of the terms.

    Returns:
        A float32 scalar; without any hole voxel it is 0, with a gradient of 0.

    Raises:
        ValueError: the three do not go together.
    """
    found = found if isinstance(found, Tensor) else found[0]
    expected = (image.shape[0], 1, *image.shape[2:])
    if found.shape != image.shape or hole.shape != expected or hole.dtype != torch.bool:
        raise ValueError(
            f"found {tuple(found.shape)}, image {tuple(image.shape)}, hole {tuple(hole.shape)} of {hole.dtype}; "
            f"expected the shape of the image twice and {expected} of torch.bool"
        )
    found, image = found.float(), image.float()
    difference = torch.where(hole, found - image, 0.0)
    error = config.l1 * difference.abs().sum() + config.mse * difference.square().sum()
    if config.ssim > 0:
        filled = torch.where(hole, found, image) - config.darkest
        similarity = ssim_map(filled, image - config.darkest, window=config.ssim_window, data_range=config.data_range)
        error = error + config.ssim * torch.where(hole, 1 - similarity, 0.0).sum()
    sums = batch_sum(torch.stack((error, hole.sum().to(error.dtype))))
    return sums[0] / (sums[1].clamp(min=1) * image.shape[1])


def ssim_map(x: Tensor, y: Tensor, *, window: int, data_range: float) -> Tensor:
    """Structural similarity of two images around each voxel (Wang et al. 2004), in 2D and 3D, with a gradient for both.

        (2 mean_x mean_y + c1) (2 covariance + c2) / ((mean_x^2 + mean_y^2 + c1) (variance_x + variance_y + c2))

    with c1 = (0.01 range)^2 and c2 = (0.03 range)^2. All voxels of a window count the same; at a border the window is
    what of it lies in the image. MONAI convolves with the window in all its dimensions, without a border: on a CPU that
    takes fifty times as long for a patch of 48 voxels an axis.

    Args:
        x: (B, C, *spatial) float32, intensities from 0 on.
        y: Likewise.
        window: Edge of the window, voxels, odd.
        data_range: Intensities from black to white.

    Returns:
        (B, C, *spatial), in (-1, 1].
    """
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    with torch.autocast(x.device.type, enabled=False):  # it would take the products in half precision
        mean_x, mean_y, square_x, square_y, product = (_local_mean(v, window) for v in (x, y, x * x, y * y, x * y))
    of_means = mean_x * mean_y
    squares = mean_x.square() + mean_y.square()
    spread = square_x + square_y - squares
    return (2 * of_means + c1) * (2 * (product - of_means) + c2) / ((squares + c1) * (spread + c2))


def _local_mean(x: Tensor, window: int) -> Tensor:
    """Mean of the part of the window that lies in the image.

    One axis after the other is moved to the end and multiplied by a matrix with a band of equal weights: four times as
    fast as pooling on a CPU, though most of the products are with 0. After the last axis the order is the first again.
    """
    for _ in range(x.dim() - 2):
        places = torch.arange(x.shape[2], device=x.device)
        band = ((places[:, None] - places).abs() <= window // 2).to(x.dtype)
        x = functional.linear(x.movedim(2, -1), band / band.sum(1, keepdim=True))
    return x


class AdversarialTerms(NamedTuple):
    """Two float32 scalars to be added up with weights of their own."""

    generator: Tensor
    """Small where the discriminator takes the made-up image for a true one."""
    discriminator: Tensor
    """Small where the discriminator tells the two apart."""


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Mean binary cross-entropy of the logits of made-up patches, of any shape, against "true": a float32 scalar."""
    return functional.softplus(-fake_logits.float()).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half the sum of the mean binary cross-entropies of true and made-up patches: a float32 scalar."""
    return (functional.softplus(-real_logits.float()).mean() + functional.softplus(fake_logits.float()).mean()) / 2


def adversarial_terms(discriminator: nn.Module, found: Tensor, image: Tensor) -> AdversarialTerms:
    """Both terms such that one backward pass of any weighted sum of them trains both networks.

    The generator's term gives the discriminator no gradient, whose own term gives the generator none.

    Args:
        discriminator: From images (B, C, *spatial) to logits of patches.
        found: What the generator gives, (B, C, *spatial), hole or not: the released code of region normalisation judges
            it so, rather than with the known voxels put back.
        image: True images, (B, C, *spatial).
    """
    # In one batch and one precision: a discriminator could tell two roundings apart.
    logits = discriminator(torch.cat((image.to(found.dtype), found.detach())))
    real, fake = logits.chunk(2)
    fixed = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    deceived: Tensor = functional_call(discriminator, fixed, (found,))
    return AdversarialTerms(generator_loss(deceived), discriminator_loss(real, fake))
