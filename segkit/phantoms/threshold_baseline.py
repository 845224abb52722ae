"""A baseline for phantoms: the best Dice of a single intensity threshold.

A trained network must be well above it, although the threshold is chosen on the cases that it is scored on.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from segkit.errors import RequestError
from segkit.shapes import Image, LabelMap

_CANDIDATES = 512
_MARGIN = 1e-3  # standard deviations


class ThresholdScore(NamedTuple):
    """The best rule for a region: voxels of the brain whose intensity is above (">") or below ("<") `threshold`.

    `threshold` is in standard deviations from the mean of the brain; `dice` is the mean over cases, 0 to 1.
    """

    region: str
    modality: str
    direction: str
    threshold: float
    dice: float


def best_single_thresholds(
    images: Sequence[Image],
    labels: Sequence[LabelMap],
    *,
    modalities: Sequence[str],
    regions: Mapping[str, Sequence[int]],
) -> dict[str, ThresholdScore]:
    """For each region the one threshold on one sequence, in either direction, with the best mean Dice over all cases.

    Each image (C, D, H, W) is z-scored per sequence within its brain (voxels where any sequence is not 0); voxels
    outside the brain are never chosen. `regions` gives the label values of each region. Dice is 1 where both the
    region and the choice are empty.

    Raises:
        RequestError: no cases, or not as many images as label maps.
    """
    if not images or len(images) != len(labels):
        raise RequestError(
            f"{len(images)} images and {len(labels)} label maps cannot be compared",
            expected="as many of each, not none",
        )
    brains = [(image != 0).any(axis=0) for image in images]
    inside = [reference[brain] for reference, brain in zip(labels, brains, strict=True)]
    best: dict[str, ThresholdScore] = {}
    for channel, modality in enumerate(modalities):
        cases = [image[channel][brain].astype(np.float64) for image, brain in zip(images, brains, strict=True)]
        cases = [(values - values.mean()) / (values.std() + 1e-8) for values in cases]
        pooled = np.concatenate(cases)
        # The candidates include all voxels and none.
        thresholds = np.linspace(pooled.min() - _MARGIN, pooled.max() + _MARGIN, _CANDIDATES)
        for name, members in regions.items():
            targets = [np.isin(reference, members) for reference in inside]
            for direction, sign in ((">", 1), ("<", -1)):
                curves = [_dice_curve(v, t, thresholds, sign) for v, t in zip(cases, targets, strict=True)]
                dice = np.mean(curves, axis=0)
                place = int(dice.argmax())
                if name not in best or dice[place] > best[name].dice:
                    score = float(thresholds[place]), float(dice[place])
                    best[name] = ThresholdScore(name, modality, direction, *score)
    return best


def _dice_curve(
    values: NDArray[np.float64], target: NDArray[np.bool_], thresholds: NDArray[np.float64], sign: int
) -> NDArray[np.float64]:
    """Dice of `sign * values > sign * threshold` against `target` (N,) for each threshold, (T,)."""
    chosen, hits = (
        len(some) - np.searchsorted(np.sort(sign * some), sign * thresholds, side="right")
        for some in (values, values[target])
    )
    total = chosen + int(target.sum())
    return np.where(total == 0, 1.0, 2 * hits / np.maximum(total, 1))
