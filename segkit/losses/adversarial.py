"""Adversarial terms: a discriminator learns to tell true images from made-up ones, a generator to deceive it.

Both are the non-saturating ones of Goodfellow et al. 2014: binary cross-entropy of each patch's logit, the generator's
against the verdict "true". MONAI's PatchAdversarialLoss with "bce" has the same values where logits are small, but
takes the logarithm of a sigmoid in the precision that it gets: in float32 a logit of -40 teaches the generator nothing
any more and one of 17 the discriminator nothing, just where each of them is most wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional


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
