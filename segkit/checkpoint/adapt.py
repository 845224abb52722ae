"""The first kernels of a network, made for other image channels than they were trained with.

Weights are (outputs, channels, *kernel). What each new channel sees is decided by its name where both sides are known,
else by a rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from segkit.data.layouts.modality import canonical_modality

InputAdapt = Literal["mean", "repeat", "zero"]
"""How kernels are made for another number of channels.

mean: old kernels in turn, scaled by old over new channels, and the sum of all for a single new one, so that the
answer to an image that is the same in every channel stays what it was (exactly so where one number of channels is a
multiple of the other); repeat: the same unscaled, which is what STU-Net's own fine-tuning does; zero: the first
channels keep their kernels, further ones start at zero.
"""


def adapt_channels(weight: Tensor, channels: int, rule: InputAdapt) -> Tensor:
    """Kernels (outputs, old, *kernel) for `channels` image channels: (outputs, channels, *kernel)."""
    old = weight.shape[1]
    if rule == "zero":
        added = weight.new_zeros(weight.shape[0], max(channels - old, 0), *weight.shape[2:])
        return torch.cat([weight[:, :channels], added], dim=1)
    if rule == "mean" and channels == 1:
        return weight.sum(1, keepdim=True)
    in_turn = torch.cat([weight] * -(-channels // old), dim=1)[:, :channels]
    return in_turn if rule == "repeat" else in_turn * (old / channels)


def adapt_by_modality(weight: Tensor, before: Sequence[str], after: Sequence[str]) -> Tensor | None:
    """Kernels (outputs, len(before), *kernel) for channels named `after`; None where no name is on both sides.

    A channel takes the kernel of the same modality, whatever either side calls it (`t1ce` is `t1c`), and the mean of
    all kernels where there is none.
    """
    known = {plain_name(name): channel for channel, name in enumerate(before)}
    if not any(plain_name(name) in known for name in after):
        return None
    mean = weight.mean(1)
    channels = [known.get(plain_name(name)) for name in after]
    return torch.stack([mean if channel is None else weight[:, channel] for channel in channels], dim=1)


def plain_name(modality: str) -> str:
    """A modality's canonical name, else its own in small letters."""
    return canonical_modality(modality) or modality.casefold()
