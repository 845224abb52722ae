"""Pre-training by masked reconstruction: blocks of an image are hidden, and the network fills them from the rest.

After He et al. 2022 (arXiv 2111.06377), on convolutional networks as in Wald et al. 2025 (arXiv 2410.23132): hidden
voxels are 0, in every layer of the encoder (`sparse.py`), and the whole network, decoder included, is trained by the
squared error on them alone. Heads on coarser levels are compared with the image averaged to their resolution.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from segkit.config import Config
from segkit.errors import RequestError
from segkit.losses.dice_cross_entropy import deep_supervision_weights
from segkit.losses.global_batch import batch_rand, batch_sum
from segkit.models.blocks import SegmentationNetwork, Slicewise
from segkit.models.sample_processes import SampleProcesses
from segkit.pretraining.sparse import SparseMasking
from segkit.runtime import exact_type
from segkit.training.task import Batch

_FEWEST_BLOCKS = 4  # fewest blocks along an axis, if no block is given
_SMALLEST_BLOCK = 4
"""Smallest side of a block in voxels, for any divisor: single voxels could be guessed from their neighbours."""
_MEASURED_AT_ONCE = 8  # held-out images that are computed together, so that memory does not grow with their number


class MaskedConfig(Config):
    """Settings of the hidden blocks."""

    share: float = Field(default=0.6, gt=0, lt=1)
    """Part of the blocks of an image that is hidden."""
    block: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Sides of a block in voxels, one for each axis; None is the divisor of the network, 4 or more, halved until four
    blocks fit along the axis."""
    sparse: bool = True
    """Whether hidden voxels are masked in every layer of the encoder (SparK), or in the image alone. Networks for
    images that are applied to volumes (dims=3) have the image alone."""


class MaskedReconstruction(nn.Module):
    """The whole network, with as many outputs as image channels, and the error of the hidden voxels."""

    views = 1
    score = "explained"
    keeps_decoder = True

    def __init__(self, network: SegmentationNetwork, config: MaskedConfig | None = None) -> None:
        super().__init__()
        self.network = network
        self.config = config or MaskedConfig()
        self._processes = SampleProcesses()
        self._is_sparse = self.config.sparse and bool(network.encoder_prefix) and not isinstance(network, Slicewise)
        if self._is_sparse:
            SparseMasking(network)

    def loss(self, batch: Batch) -> Tensor:
        """Squared error of the hidden voxels of "first" (B, C, *patch), mean over voxels, channels and images."""
        image = batch["first"]
        sides = self._sides(image.shape[2:])
        numbers = batch_rand(len(image), *block_grid(image.shape[2:], sides))
        hidden = hidden_voxels(numbers, image.shape[2:], sides, self.config.share).to(image.device)
        found: Tensor | list[Tensor] = self._found(image, hidden)
        return reconstruction_loss(found, image, hidden)

    @torch.no_grad()
    def measures(self, batch: Batch) -> dict[str, float]:
        """`error`: mean squared error of the hidden voxels; `explained`: 1 minus its share of their variance.

        1 is perfect, 0 as good as the mean of each channel. Channels with constant hidden voxels are left out; if all
        are, it is 0. The hidden blocks of an image depend on the image alone ("stack" and "place"), not on its batch.
        """
        images, hidden = batch["first"], self._hidden_by_image(batch)
        pieces = (torch.split(tensor, _MEASURED_AT_ONCE) for tensor in (images, hidden))
        parts = [self._moments(*piece) for piece in zip(*pieces, strict=True)]
        count, error, total, squares = (torch.stack(each).sum(0) for each in zip(*parts, strict=True))
        error, mean, squares = error / count, total / count, squares / count
        variance = squares - mean**2
        varies = variance > 1e-9 * squares
        explained = 1 - error[varies] / variance[varies]
        return {"explained": float(explained.mean()) if len(explained) else 0.0, "error": float(error.mean())}

    def _found(self, image: Tensor, hidden: Tensor) -> Any:
        """What the network makes of the visible voxels."""
        return self._processes(self.network, image.masked_fill(hidden, math.nan if self._is_sparse else 0.0))

    def _sides(self, patch: Sequence[int]) -> tuple[int, ...]:
        block = self.config.block
        if block is None:
            return block_sides(patch, self.network.divisor)
        if len(block) != len(patch):
            expected = f"{len(patch)}, one for each axis of the images"
            raise RequestError(f"masked.block has {len(block)} sides", expected=expected)
        return block

    def _hidden_by_image(self, batch: Batch) -> Tensor:
        """Hidden voxels (B, 1, *patch), for each image from a seed of its own."""
        patch = batch["first"].shape[2:]
        sides = self._sides(patch)
        grid = block_grid(patch, sides)
        which = zip(batch["stack"].tolist(), batch["place"].tolist(), strict=True)
        seeds = [1_000_003 * int(stack) + round(1000 * place) for stack, place in which]
        numbers = torch.stack([torch.rand(grid, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        return hidden_voxels(numbers, patch, sides, self.config.share).to(batch["first"].device)

    def _moments(self, image: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of hidden voxels, in `exact_type`: number, and by channel sums of squared errors, values, squared values."""
        found = self._found(image, hidden)
        exact = exact_type(image.device)
        output = (found if isinstance(found, Tensor) else found[0]).to(exact)
        _require_like(output, image)
        axes, values = (0, *range(2, image.dim())), image.to(exact)
        each = (output - image).square(), values, values.square()
        error, total, squares = ((plane * hidden).sum(axes) for plane in each)
        return hidden.sum().to(exact), error, total, squares


def block_sides(patch: Sequence[int], divisor: Sequence[int]) -> tuple[int, ...]:
    """Sides of a block in voxels: the divisor or 4, whichever is larger, halved until four fit along the axis."""
    sides = []
    for length, step in zip(patch, divisor, strict=True):
        side = max(step, _SMALLEST_BLOCK)
        while side > 1 and length < _FEWEST_BLOCKS * side:
            side //= 2
        sides.append(side)
    return tuple(sides)


def block_grid(patch: Sequence[int], sides: Sequence[int]) -> tuple[int, ...]:
    """Blocks along each axis; the last may extend beyond the patch."""
    return tuple(math.ceil(length / side) for length, side in zip(patch, sides, strict=True))


def hidden_voxels(numbers: Tensor, patch: Sequence[int], sides: Sequence[int], share: float) -> Tensor:
    """Hidden voxels, boolean (B, 1, *patch): in each image the same number of blocks, those of the lowest numbers.

    `numbers` (B, *grid) has a random number for each block of `block_grid`. At least one block is hidden, one is left.

    Raises:
        ValueError: the patch is a single block.
    """
    blocks = math.prod(numbers.shape[1:])
    if blocks < 2:
        raise ValueError(f"a block of {tuple(sides)} voxels covers the whole patch of {tuple(patch)}")
    count = min(max(round(share * blocks), 1), blocks - 1)
    ranks = numbers.flatten(1).argsort(dim=1).argsort(dim=1)
    hidden = (ranks < count).view(numbers.shape)
    for axis, (length, side) in enumerate(zip(patch, sides, strict=True), start=1):
        hidden = hidden.repeat_interleave(side, dim=axis).narrow(axis, 0, length)
    return hidden.unsqueeze(1)  # (B, 1, *patch)


def reconstruction_loss(found: Tensor | Sequence[Tensor], image: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error of hidden voxels, a float32 scalar; weights of the levels as in `SegmentationLoss`.

    `found` and `image` are (B, C, *patch), `found` possibly one tensor per level, full resolution first; `hidden` is
    (B, 1, *patch), boolean. A coarse voxel is compared with the mean of the image in it, and counts by the part of it
    that is hidden.

    Raises:
        ValueError: the outputs are not as many as the channels of the image.
    """
    levels = [found] if isinstance(found, Tensor) else list(found)
    terms = []
    for weight, level in zip(deep_supervision_weights(len(levels)), levels, strict=True):
        # "area" is the mean in a coarse voxel, in two and in three dimensions.
        planes, size = (image.float(), hidden.float()), list(level.shape[2:])
        target, part = (functional.interpolate(plane, size=size, mode="area") for plane in planes)
        _require_like(level, target)
        error, voxels = batch_sum(((level.float() - target).square() * part).sum(), part.sum())
        terms.append(weight * error / (voxels * image.shape[1]))
    return torch.stack(terms).sum()


def _require_like(output: Tensor, image: Tensor) -> None:
    if output.shape != image.shape:
        raise ValueError(f"images {tuple(image.shape)} are reconstructed as {tuple(output.shape)}")
