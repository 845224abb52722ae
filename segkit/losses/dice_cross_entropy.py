"""Dice plus cross-entropy, for nested regions and for exclusive classes.

Both follow nnU-Net (Isensee et al., Nature Methods 2021, "Loss function"); regions with sigmoid outputs follow its
BraTS 2020 entry (Isensee et al., arXiv 2011.00848, section 2.1).
"""

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from segkit.config import Config
from segkit.labels import LabelScheme, Output, outputs_of
from segkit.losses.global_batch import batch_sum

_LABEL_VALUES = 256
"""Label maps are uint8, so a table of 256 entries covers every value."""


class LossConfig(Config):
    """How Dice and cross-entropy are combined."""

    batch_dice: bool = True
    """Sum Dice over the batch instead of per sample: steadier where a patch may lack a structure."""
    dice_weight: float = Field(default=1.0, ge=0)
    """Weight of the soft Dice term."""
    cross_entropy_weight: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy term (binary per region for sigmoid outputs)."""
    smooth: float = Field(default=1e-5, ge=0)
    """Smoothing term of the Dice fraction, in voxels."""


def soft_dice_loss(probabilities: Tensor, targets: Tensor, *, batch_dice: bool, smooth: float) -> Tensor:
    """One minus the soft Dice overlap, averaged over channels (and over samples unless `batch_dice`).

    For each channel, with p the probabilities, t the targets and s the smoothing term,

        loss = 1 - (2 sum(p t) + s) / (sum(p) + sum(t) + s),

    summed over the voxels of one sample, or of the whole batch with `batch_dice`, also if it is spread over processes.
    With the batch pooled, a single false positive voxel in a sample without the structure does not cost a loss near 1.

    `probabilities` and `targets` are (B, K, *spatial), in [0, 1], float32: half precision cannot hold the sums of a
    volume. With `smooth`, in voxels, an absent structure that is not predicted has loss 0.

    Sources: Milletari et al., V-Net, 3DV 2016, section 3 (there with squares in the denominator); Drozdzal et al.,
    DLMIA 2016 (without squares, as here); batch Dice: Isensee et al., arXiv 2011.00848, section 2.3.
    """
    axes = tuple(range(2, probabilities.ndim))
    if batch_dice:
        axes = (0, *axes)
    intersection = (probabilities * targets).sum(axes)
    cardinality = probabilities.sum(axes) + targets.sum(axes)
    if batch_dice:
        intersection, cardinality = batch_sum(intersection, cardinality)
    return 1 - ((2 * intersection + smooth) / (cardinality + smooth)).mean()


def region_loss(logits: Tensor, targets: Tensor, config: LossConfig, known: Tensor | None = None) -> Tensor:
    """Weighted soft Dice + binary cross-entropy of nested regions (sigmoid outputs), averaged over regions.

    `logits` (B, K, *spatial) of any floating type, `targets` (B, K, *spatial) float32 planes in [0, 1], which may
    overlap. Voxels that are not `known` (B, *spatial) have no part in it, and targets 0; None: all are. The loss is
    computed in float32 also under autocast.
    """
    logits = _of_known(logits.float(), known)
    probabilities = _of_known(logits.sigmoid(), known)
    dice = soft_dice_loss(probabilities, targets, batch_dice=config.batch_dice, smooth=config.smooth)
    if known is None:
        cross_entropy = F.binary_cross_entropy_with_logits(logits, targets)
    else:
        by_region = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        cross_entropy = _mean_of_known(by_region.mean(dim=1), known)
    return config.dice_weight * dice + config.cross_entropy_weight * cross_entropy


def _of_known(values: Tensor, known: Tensor | None) -> Tensor:
    """(B, K, *spatial) with 0 at voxels that are not known (B, *spatial), where the gradient is exactly 0."""
    return values if known is None else torch.where(known.unsqueeze(1), values, 0.0)


def _mean_of_known(values: Tensor, known: Tensor) -> Tensor:
    """Mean over the known voxels of the whole batch, also if it is spread over processes; 0 if there are none."""
    total, count = batch_sum(torch.where(known, values, 0.0).sum(), known.sum().to(values.dtype))
    return total / count.clamp(min=1)


def class_loss(logits: Tensor, classes: Tensor, config: LossConfig, known: Tensor | None = None) -> Tensor:
    """Weighted soft Dice + cross-entropy of exclusive classes (softmax outputs), background left out of Dice.

    `logits` (B, K, *spatial) of any floating type, channel 0 the background, `classes` (B, *spatial) int64 channel
    indices, 0 to K - 1, 0 where not `known` (see `region_loss`). The loss is computed in float32 also under autocast.
    """
    logits = _of_known(logits.float(), known)
    channels = torch.arange(1, logits.shape[1], device=logits.device, dtype=classes.dtype)
    planes = classes.unsqueeze(1) == channels.view(1, -1, *(1,) * (classes.ndim - 1))  # (B, K - 1, *spatial)
    foreground = _of_known(logits.softmax(dim=1)[:, 1:], known)
    dice = soft_dice_loss(foreground, planes.float(), batch_dice=config.batch_dice, smooth=config.smooth)
    if known is None:
        cross_entropy = F.cross_entropy(logits, classes)
    else:
        cross_entropy = _mean_of_known(F.cross_entropy(logits, classes, reduction="none"), known)
    return config.dice_weight * dice + config.cross_entropy_weight * cross_entropy


class SegmentationLoss(nn.Module):
    """Dice + cross-entropy of a network's logits against label maps, with deep supervision.

    Level i of the logits (0 = full resolution) has weight 2^-i, renormalised to sum to 1. Its target is the label map
    sampled at the voxel nearest to the centre of each coarse voxel: maximum pooling would inflate every structure by up
    to a coarse voxel; averaging needs a float plane per class at full resolution.
    """

    table: Tensor

    def __init__(
        self,
        activation: Literal["sigmoid", "softmax"],
        outputs: Sequence[Output],
        config: LossConfig | None = None,
        ignore: int | None = None,
    ) -> None:
        """`outputs` in channel order; with softmax the first is the background, which also takes unlisted values.

        Voxels with the label value `ignore` have no part in the loss.
        """
        super().__init__()
        self.activation, self.ignore = activation, ignore
        self.config = config or LossConfig()
        table = _planes_table(outputs) if activation == "sigmoid" else _classes_table(outputs)
        self.register_buffer("table", table, persistent=False)

    @classmethod
    def of_scheme(cls, scheme: LabelScheme, config: LossConfig | None = None) -> Self:
        """The loss of the outputs that a network has for a label scheme."""
        return cls("sigmoid" if scheme.has_regions else "softmax", outputs_of(scheme), config, scheme.ignore)

    def forward(self, logits: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss, a float32 scalar, of logits (B, K, *spatial), or one such tensor per level, full resolution first.

        `labels` are (B, *spatial) uint8 label values on the grid of the full-resolution logits.
        """
        levels = [logits] if isinstance(logits, Tensor) else list(logits)
        weights = deep_supervision_weights(len(levels))
        terms = [
            weight * self._level(level, nearest_labels(labels, level.shape[2:]))
            for weight, level in zip(weights, levels, strict=True)
        ]
        return torch.stack(terms).sum()

    def _level(self, logits: Tensor, labels: Tensor) -> Tensor:
        values, known = labels.reshape(-1).int(), None if self.ignore is None else labels != self.ignore
        if self.activation == "softmax":
            return class_loss(logits, self.table[values].view(labels.shape), self.config, known)
        planes = self.table.index_select(1, values).view(-1, *labels.shape).transpose(0, 1)  # (B, K, *spatial)
        return region_loss(logits, planes, self.config, known)


def deep_supervision_weights(levels: int) -> list[float]:
    """Weights 1, 1/2, 1/4 ... of the levels, divided by their sum."""
    weights = [2.0**-level for level in range(levels)]
    return [weight / sum(weights) for weight in weights]


def nearest_labels(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Labels (B, *spatial) at the voxels nearest to the centres of a coarser grid of `shape` over the same extent."""
    for axis, (size, coarse) in enumerate(zip(labels.shape[1:], shape, strict=True), start=1):
        if size != coarse:
            indices = ((2 * torch.arange(coarse, device=labels.device) + 1) * size) // (2 * coarse)
            labels = labels.index_select(axis, indices)
    return labels


def _planes_table(outputs: Sequence[Output]) -> Tensor:
    """(K, 256) float32: whether output k covers a label value."""
    table = torch.zeros(len(outputs), _LABEL_VALUES)
    for channel, output in enumerate(outputs):
        table[channel, list(output.members)] = 1
    return table


def _classes_table(outputs: Sequence[Output]) -> Tensor:
    """(256,) int64: the channel of a label value; values without a channel of their own are background, channel 0."""
    table = torch.zeros(_LABEL_VALUES, dtype=torch.int64)
    for channel, output in enumerate(outputs):
        table[list(output.members)] = channel
    return table
