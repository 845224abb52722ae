"""The encoder that is pre-trained, and a measure of how well its features identify images."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from segkit.models.blocks import SegmentationNetwork


def freeze_decoder(network: SegmentationNetwork, in_channels: int, dims: int) -> int:
    """Freeze all parameters outside the encoder; returns the channels of the encoder's deepest feature map."""
    for name, parameter in network.named_parameters():
        if not name.startswith(network.encoder_prefix):
            parameter.requires_grad_(False)
    was_training = network.training
    network.eval()
    with torch.no_grad():
        deepest = network.encode(torch.zeros(1, in_channels, *(2 * step for step in network.divisor[:dims])))[-1]
    network.train(was_training)
    return deepest.shape[1]


def retrieval_accuracy(first: NDArray[np.floating[Any]], second: NDArray[np.floating[Any]]) -> float:
    """Share of rows whose nearest row on the other side is their own, by cosine; mean of both directions, 0 to 1.

    Row i of `first` and of `second`, (B, F) and finite, describe two views of image i. The own row among several that
    are equally near counts as one over their number, so that features without information score chance, 1 / B. A row of
    zeros is equally far from all.

    Raises:
        ValueError: the shapes differ, are not of two axes, or there is no row.
    """
    if first.shape != second.shape or first.ndim != 2 or not len(first):
        raise ValueError(f"two arrays (B, F) of one shape are compared, not {first.shape} and {second.shape}")
    lengths = (np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True) for rows in (first, second))
    one, other = (rows / np.where(size > 0, size, 1.0) for rows, size in zip((first, second), lengths, strict=True))
    cosines = one @ other.T  # (B, B), row i of `first` against all of `second`
    return (_share_of_own(cosines) + _share_of_own(cosines.T)) / 2


def _share_of_own(cosines: NDArray[np.float64]) -> float:
    # Equal rows may differ in the last digit, because sums are formed in another order.
    are_nearest = cosines >= cosines.max(axis=1, keepdims=True) - 1e-12
    return float(np.mean(np.diagonal(are_nearest) / are_nearest.sum(axis=1)))
