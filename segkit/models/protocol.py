"""What every network of the table promises besides computing: which of its tensors are for what."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class SegmentationNetwork(Protocol):
    """A network that `build_model` makes.

    Called with (B, in_channels, *spatial) it gives logits (B, out_channels, *spatial); while training a list of them,
    full resolution first. The names are those of its state dict, by which weights of other networks find their place.
    """

    divisor: tuple[int, ...]
    """Each axis of *spatial must be a multiple of its entry, in voxels."""
    input_weights: tuple[str, ...]
    """Names of the tensors whose axis 1 is the image channels."""
    head_prefixes: tuple[str, ...]
    """Beginnings of the names of the segmentation heads."""
    encoder_prefix: str
    """Beginning of the names of the encoder, such as "encoder."."""

    def __call__(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits of a batch of patches."""
        ...

    def encode(self, x: Tensor) -> list[Tensor]:
        """Feature maps of the encoder alone, (B, width, *spatial / stride) each, finest first, deepest last."""
        ...
