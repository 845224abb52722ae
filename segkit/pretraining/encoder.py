"""The encoder that is pre-trained, and a measure of how well its features identify images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from segkit.models.blocks import SegmentationNetwork
from segkit.training.task import Batch


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
    """Freeze all parameters outside the encoder."""
    prefix = cast(SegmentationNetwork, network).encoder_prefix
    for name, parameter in network.named_parameters():
        if not name.startswith(prefix):
            parameter.requires_grad_(False)


def to_device(batch: Batch, device: torch.device) -> Mapping[str, Tensor]:
    """The batch on that device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def retrieval_accuracy(first: NDArray[np.floating[Any]], second: NDArray[np.floating[Any]]) -> float:
    """Share of rows whose nearest row on the other side is their own, by cosine; mean of both directions, 0 to 1.

    If several rows of the other side are equally near, the own one among them counts as one over their number, so that
    features without information score chance, 1 / B. A row of zeros is equally far from all.

    Args:
        first: (B, F), finite, B >= 1; row i describes image i.
        second: (B, F), finite; row i describes another view of image i.

    Raises:
        ValueError: the shapes differ, are not of two axes, or there is no row.
    """
    if first.shape != second.shape or first.ndim != 2 or not len(first):
        raise ValueError(f"two arrays (B, F) of one shape are compared, not {first.shape} and {second.shape}")
    cosines = _unit_rows(first) @ _unit_rows(second).T  # (B, B), row i of `first` against all of `second`
    return (_share_of_own(cosines) + _share_of_own(cosines.T)) / 2


def _unit_rows(rows: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    unit: NDArray[np.float64] = rows / np.where(lengths > 0, lengths, 1.0)
    return unit


def _share_of_own(cosines: NDArray[np.float64]) -> float:
    """Mean over rows of 1 where the diagonal holds the largest cosine, divided by how many are as large."""
    # Equal rows may differ in the last digit, because sums are formed in another order.
    are_nearest = cosines >= cosines.max(axis=1, keepdims=True) - 1e-12
    return float(np.mean(np.diagonal(are_nearest) / are_nearest.sum(axis=1)))
