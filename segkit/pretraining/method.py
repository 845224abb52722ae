"""What a pre-training method adds to a network: a loss without labels, and what is measured on held-out images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from segkit.models.table import SegmentationNetwork
from segkit.training.task import Batch


class Method(Protocol):
    """A module with the network that it trains; it is what the training loop optimises.

    A batch has B images: "first" and, where `views` is 2, "second" (B, C, *patch) float32, with "first_frame" and
    "second_frame" (B, dims, dims + 1) that lead from voxel indices of a view to mm in the image it was cut from.
    """

    network: nn.Module
    """A network of `segkit.models.table`."""
    views: int
    """Views of each image that it wants, 1 or 2."""
    score: str
    """Which of its measures chooses the best checkpoint; higher is better."""

    def loss(self, batch: Batch) -> Tensor:
        """The loss, a scalar; whatever is drawn comes from torch's global generator of the CPU."""

    def measures(self, batch: Batch) -> dict[str, float]:
        """What this batch of held-out images shows, in evaluation mode, always the same for the same weights."""


def encode(network: nn.Module, image: Tensor) -> list[Tensor]:
    """The encoder's feature maps of (B, C, *patch), finest first."""
    return cast(SegmentationNetwork, network).encode(image)


def encoder_width(network: nn.Module, in_channels: int, dims: int) -> int:
    """Channels of the deepest feature map."""
    divisor = cast(SegmentationNetwork, network).divisor
    was_training = network.training
    network.eval()
    with torch.no_grad():
        deepest = encode(network, torch.zeros(1, in_channels, *(2 * step for step in divisor[:dims])))[-1]
    network.train(was_training)
    return deepest.shape[1]


def train_encoder_only(network: nn.Module) -> None:
    """Let no gradient reach what lies behind the encoder, and no optimiser touch it."""
    prefix = cast(SegmentationNetwork, network).encoder_prefix
    for name, parameter in network.named_parameters():
        if not name.startswith(prefix):
            parameter.requires_grad_(False)


def to_device(batch: Batch, device: torch.device) -> Mapping[str, Tensor]:
    """The batch on that device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
