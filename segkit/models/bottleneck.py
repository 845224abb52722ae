"""The inverted bottleneck of MobileNetV2 (Sandler et al. 2018, section 3.3) in two and three dimensions."""

from __future__ import annotations

import functools
from math import gcd
from typing import cast

import torch
from torch import Tensor, nn

from segkit.models.blocks import checkpointed, group_norm, pointwise, pointwise_convolve
from segkit.models.depthwise import depthwise_conv, depthwise_convolve
from segkit.models.normalisation import normalise, normalise_and_activate


class InvertedBottleneck(nn.Module):
    """Expand 1 -> depthwise 3 -> project 1 (Sandler et al. 2018), each followed by group norm; linear at the end.

    Every group of hidden channels is normalised by itself and meets the others in the projection only, as a sum. So
    the groups can be computed one after another, exactly: nothing of a part is kept but what it adds to that sum.
    """

    def __init__(self, channels: int, expansion: int, dims: int, chunks: int = 1) -> None:
        super().__init__()
        self.hidden = hidden = channels * expansion
        self.expand = pointwise(dims, channels, hidden, bias=False)
        self.expand_norm = group_norm(hidden)
        self.depthwise = depthwise_conv(hidden, dims)
        self.depthwise_norm = group_norm(hidden)
        self.project = pointwise(dims, hidden, channels, bias=False)
        self.project_norm = group_norm(channels)
        self.chunks = gcd(chunks, self.expand_norm.num_groups)
        # Blocks start as the identity, so that depth does not hurt the first steps.
        nn.init.zeros_(self.project_norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) to the same shape."""
        total = self._projected(x) if self.chunks == 1 else self._projected_in_parts(x)
        return normalise(total, self.project_norm)

    def _projected(self, x: Tensor) -> Tensor:
        x = normalise_and_activate(self.expand(x), self.expand_norm)
        x = normalise_and_activate(self.depthwise(x), self.depthwise_norm)
        result: Tensor = self.project(x)
        return result

    def _projected_in_parts(self, x: Tensor) -> Tensor:
        size = self.hidden // self.chunks
        parts = [slice(start, start + size) for start in range(0, self.hidden, size)]
        if not torch.is_grad_enabled():
            total = self._part(parts[0], x)
            for part in parts[1:]:
                total += self._part(part, x)
            return total
        summands = (checkpointed(functools.partial(self._part, part), x, within=self) for part in parts)
        summed: Tensor = functools.reduce(torch.add, summands)
        return summed

    def _part(self, part: slice, x: Tensor) -> Tensor:
        """What the hidden channels `part` add to the projection, (B, C, *spatial)."""
        x = pointwise_convolve(x, _weight(self.expand)[part])
        x = normalise_and_activate(x, self.expand_norm, part)
        x = depthwise_convolve(x, _weight(self.depthwise)[part])
        x = normalise_and_activate(x, self.depthwise_norm, part)
        return pointwise_convolve(x, _weight(self.project)[:, part])


def _weight(layer: nn.Module) -> Tensor:
    return cast(Tensor, layer.weight)
