"""Two-dimensional networks on volumes: every slice is an image, and the segmented slices are stacked again.

The wrapper has the parts of the 2D network as its own children, so that a checkpoint of one loads into the other.

With `neighbours` = n a slice has the n slices on each side as further channels ("2.5D"): first all channels of slice
z - n, then of z - n + 1, up to z + n. Beyond the border the outermost slice is repeated. One channel with one neighbour
on each side gives three channels, as encoders pre-trained on colour pictures have.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from segkit.config import Config
from segkit.models.blocks import SegmentationNetwork


class SlicewiseConfig(Config):
    """How a 2D network is applied to volumes; without effect for images."""

    slice_axis: int | None = Field(default=None, ge=0, le=2)
    """Spatial axis across which volumes are sliced, 0 is the first after the channels; None is 0 or planned."""
    neighbours: int = Field(default=0, ge=0)
    """Slices on each side that a slice sees as further channels."""
    slices_at_once: int = Field(default=16, ge=1)
    """Slices that are computed together in evaluation; training computes all of a patch together."""

    def image_channels(self, in_channels: int, dims: int) -> int:
        """Image channels of the 2D network, for data of `in_channels` and `dims` axes.

        Raises:
            ValueError: slices are set, but the data have two axes.
        """
        if dims == 2 and (self.neighbours or self.slice_axis is not None):
            raise ValueError("slice_axis and neighbours need data of three axes")
        return in_channels * (2 * self.neighbours + 1)

    def applied_to(self, network: SegmentationNetwork, dims: int) -> SegmentationNetwork:
        """`network` itself for images, its slice-wise form for volumes."""
        if dims == 2:
            return network
        return Slicewise(network, self.slice_axis or 0, self.neighbours, self.slices_at_once)


class Slicewise(SegmentationNetwork):
    """A 2D network of (B, C * (2 * neighbours + 1), H, W), applied to each slice of (B, C, *spatial) across an axis."""

    def __init__(
        self, network: SegmentationNetwork, axis: int = 0, neighbours: int = 0, slices_at_once: int = 16
    ) -> None:
        super().__init__()
        for name, part in network.named_children():
            self.add_module(name, part)
        # In a tuple, because a registered module would add its name to the names of the weights.
        self._network = (network,)
        self.axis = axis
        self.neighbours = neighbours
        self.slices_at_once = slices_at_once
        self.divisor = (*network.divisor[:axis], 1, *network.divisor[axis:])
        self.input_weights = network.input_weights
        self.head_prefixes = network.head_prefixes
        self.encoder_prefix = network.encoder_prefix

    def train(self, mode: bool = True) -> Slicewise:
        """Set training or evaluation mode, also of the 2D network itself."""
        super().train(mode)
        self._network[0].train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(B, C, *spatial) to logits of the same spatial size; in training a list of them."""
        (network,) = self._network
        slices = x.movedim(2 + self.axis, 1)  # (B, S, C, H, W)
        if self.training:
            return [self._volume(level, len(x)) for level in network(self._images(slices, 0, slices.shape[1]))]
        if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():  # of which the batch is not known
            return self._volume(network(self._images(slices, 0, slices.shape[1])), x.shape[0])
        step = max(1, self.slices_at_once // len(x))
        parts = [
            self._volume(network(self._images(slices, start, min(start + step, slices.shape[1]))), len(x))
            for start in range(0, slices.shape[1], step)
        ]
        return torch.cat(parts, dim=2 + self.axis)

    def encode(self, x: Tensor) -> list[Tensor]:
        """(B, C, *spatial) to the feature maps of its slices, stacked again; the slice axis keeps its length."""
        slices = x.movedim(2 + self.axis, 1)  # (B, S, C, H, W)
        levels = self._network[0].encode(self._images(slices, 0, slices.shape[1]))
        return [self._volume(level, len(x)) for level in levels]

    def _images(self, slices: Tensor, start: int, stop: int) -> Tensor:
        """Slices start to stop of (B, S, C, H, W), each with its neighbours, as (B * (stop - start), C', H, W)."""
        if self.neighbours == 0:
            return slices[:, start:stop].flatten(0, 1)
        positions = torch.arange(start, stop, device=slices.device)
        offsets = torch.arange(-self.neighbours, self.neighbours + 1, device=slices.device)
        index = (positions[:, None] + offsets).clamp(0, slices.shape[1] - 1)
        return slices[:, index].flatten(2, 3).flatten(0, 1)  # (B, S', 2n + 1, C, H, W) before

    def _volume(self, images: Tensor, batch: int) -> Tensor:
        """(B * S', K, H, W) to (B, K, *spatial), S' long on the slice axis."""
        return images.view(batch, -1, *images.shape[1:]).movedim(1, 2 + self.axis)
