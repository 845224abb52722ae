"""The soft Dice loss."""

from __future__ import annotations

from torch import Tensor

from segkit.losses.global_batch import batch_sum


def soft_dice_loss(probabilities: Tensor, targets: Tensor, *, batch_dice: bool, smooth: float) -> Tensor:
    """One minus the soft Dice overlap, averaged over channels (and over samples unless `batch_dice`).

    For each channel, with p the probabilities, t the targets and s the smoothing term,

        loss = 1 - (2 sum(p t) + s) / (sum(p) + sum(t) + s),

    summed over the voxels of one sample, or of the whole batch with `batch_dice`, also if it is spread over processes
    (`segkit.losses.global_batch`). With the batch pooled, a single false positive voxel in a sample without the
    structure does not cost a loss near 1.

    Sources: Milletari et al., V-Net, 3DV 2016, section 3 (there with squares in the denominator); Drozdzal et al.,
    DLMIA 2016 (without squares, as here); batch Dice: Isensee et al., arXiv 2011.00848, section 2.3.

    Args:
        probabilities: (B, K, *spatial), in [0, 1], float32: half precision cannot hold the sums of a volume.
        targets: (B, K, *spatial), in [0, 1], of the same floating type.
        batch_dice: Whether the batch counts as one large volume.
        smooth: Added to numerator and denominator, in voxels: an absent structure that is not predicted has loss 0.

    Returns:
        A scalar in [0, 1].
    """
    axes = tuple(range(2, probabilities.ndim))
    if batch_dice:
        axes = (0, *axes)
    intersection = (probabilities * targets).sum(axes)
    cardinality = probabilities.sum(axes) + targets.sum(axes)
    if batch_dice:
        intersection, cardinality = batch_sum(intersection, cardinality)
    return 1 - ((2 * intersection + smooth) / (cardinality + smooth)).mean()
