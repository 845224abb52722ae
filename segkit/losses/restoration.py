"""Losses of inpainting: L1, MSE and structural similarity in the hole, and adversarial terms.

`restoration_loss` covers the hole alone: outside it the known voxels are kept, so no gradient comes from there.

The adversarial terms are the non-saturating ones of Goodfellow et al. 2014: binary cross-entropy of each patch's logit,
for the generator with the target "true". MONAI's PatchAdversarialLoss takes the logarithm of a sigmoid in the input's
precision: in float32 a logit of -40 then gives the generator no gradient and one of 17 none to the discriminator.
"""

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
    """Weights of the terms, and the intensity scale for structural similarity."""

    l1: float = Field(default=1.0, ge=0)
    """Weight of the mean absolute difference."""
    ssim: float = Field(default=0.5, ge=0)
    """Weight of 1 - SSIM; 0 does not compute it."""
    mse: float = Field(default=0.1, ge=0)
    """Weight of the mean squared difference."""
    ssim_window: int = Field(default=7, ge=3)
    """Edge of the window in which SSIM compares, voxels, odd."""
    darkest: float = 0.0
    """Intensity that is black for SSIM, which compares means by their ratio and so needs intensities from 0 on: with
    z-scores around 0, a 0.1 in place of a -0.1 would cost as much as black in place of white."""
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
    """Weighted L1 + (1 - SSIM) + MSE in a hole.

    Each term is a mean over the channels of all hole voxels of the batch, so holes count by their size. SSIM compares
    the truth with the truth with the hole filled: its windows see known voxels around a hole.

    `found` is the output of the network, (B, C, *spatial), any floating type (of a list the first entry), `image` the
    truth, `hole` (B, 1, *spatial) booleans, True where the image is missing. Returns a float32 scalar also under
    autocast; without any hole voxel it is 0, with a gradient of 0.

    Raises:
        ValueError: the three do not fit each other.
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
    error, voxels = batch_sum(error, hole.sum().to(error.dtype))
    return error / (voxels.clamp(min=1) * image.shape[1])


def ssim_map(x: Tensor, y: Tensor, *, window: int, data_range: float) -> Tensor:
    """Structural similarity of two images around each voxel (Wang et al. 2004), in 2D and 3D, with a gradient for both.

        (2 mean_x mean_y + c1) (2 covariance + c2) / ((mean_x^2 + mean_y^2 + c1) (variance_x + variance_y + c2))

    with c1 = (0.01 range)^2 and c2 = (0.03 range)^2. All voxels of a window have the same weight; at a border the
    window is cut to the image. MONAI, without a border, takes fifty times as long on a CPU for 48 voxels an axis.

    `x` and `y` are (B, C, *spatial) float32, intensities from 0 on; `window` is the edge of the window in voxels, odd.
    The result has the shape of the images and is in (-1, 1].
    """
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    with torch.autocast(x.device.type, enabled=False):  # it would take the products in half precision
        mean_x, mean_y, square_x, square_y, product = (_local_mean(v, window) for v in (x, y, x * x, y * y, x * y))
    of_means = mean_x * mean_y
    squares = mean_x.square() + mean_y.square()
    spread = square_x + square_y - squares
    return (2 * of_means + c1) * (2 * (product - of_means) + c2) / ((squares + c1) * (spread + c2))


def _local_mean(x: Tensor, window: int) -> Tensor:
    """Mean of the part of the window in the image, by band matrices: on a CPU four times as fast as pooling."""
    # Each axis is moved to the end in turn, which restores the original order.
    for _ in range(x.dim() - 2):
        places = torch.arange(x.shape[2], device=x.device)
        band = ((places[:, None] - places).abs() <= window // 2).to(x.dtype)
        x = functional.linear(x.movedim(2, -1), band / band.sum(1, keepdim=True))
    return x


class AdversarialTerms(NamedTuple):
    """The losses of generator and discriminator, float32 scalars."""

    generator: Tensor
    discriminator: Tensor


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Mean binary cross-entropy of the logits of generated patches, of any shape, with the target "true"; float32."""
    return functional.softplus(-fake_logits.float()).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half the sum of the mean binary cross-entropies of true and generated patches: a float32 scalar."""
    return (functional.softplus(-real_logits.float()).mean() + functional.softplus(fake_logits.float()).mean()) / 2


def adversarial_terms(discriminator: nn.Module, found: Tensor, image: Tensor) -> AdversarialTerms:
    """Both terms: neither gives a gradient to the other's network, so one backward pass of their sum trains both.

    `found` is the output of the generator, (B, C, *spatial), without the known voxels put back, as in the released code
    of region normalisation, `image` the true images.
    """
    # In one batch and one precision: otherwise the discriminator could learn the rounding.
    logits = discriminator(torch.cat((image.to(found.dtype), found.detach())))
    real, fake = logits.chunk(2)
    fixed = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    deceived: Tensor = functional_call(discriminator, fixed, (found,))
    return AdversarialTerms(generator_loss(deceived), discriminator_loss(real, fake))
