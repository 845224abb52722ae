"""A baseline for phantoms: the best Dice that a single intensity threshold can give.

A trained network must be well above it. The baseline is an upper bound: its threshold is chosen on the cases that it is
scored on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segkit.errors import RequestError
from segkit.shapes import Image, LabelMap

_CANDIDATES = 512
_MARGIN = 1e-3  # standard deviations


@dataclass(frozen=True)
class ThresholdScore:
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
    best: dict[str, ThresholdScore] = {}
    for channel, modality in enumerate(modalities):
        cases = [_standardised(image, reference, channel) for image, reference in zip(images, labels, strict=True)]
        pooled = np.concatenate([values for values, _ in cases])
        # From just below to just above, so that all and nothing are choices too.
        thresholds = np.linspace(pooled.min() - _MARGIN, pooled.max() + _MARGIN, _CANDIDATES)
        for name, members in regions.items():
            for direction in (">", "<"):
                sign = 1 if direction == ">" else -1
                dice = np.mean([_dice_curve(v, np.isin(r, members), thresholds, sign) for v, r in cases], axis=0)
                position = int(dice.argmax())
                score = ThresholdScore(name, modality, direction, float(thresholds[position]), float(dice[position]))
                if name not in best or score.dice > best[name].dice:
                    best[name] = score
    return best


def _standardised(image: Image, reference: LabelMap, channel: int) -> tuple[NDArray[np.float64], LabelMap]:
    """Intensities of one sequence in the brain (N,), mean 0 and deviation 1, and the label values there (N,)."""
    brain = (image != 0).any(axis=0)
    values = image[channel][brain].astype(np.float64)
    return (values - values.mean()) / (values.std() + 1e-8), reference[brain]


def _dice_curve(
    values: NDArray[np.float64], is_inside: NDArray[np.bool_], thresholds: NDArray[np.float64], sign: int
) -> NDArray[np.float64]:
    """Dice of `sign * values > sign * threshold` against `is_inside` for each threshold, (T,)."""
    chosen = _count_beyond(values, thresholds, sign)
    hits = _count_beyond(values[is_inside], thresholds, sign)
    total = chosen + int(is_inside.sum())
    return np.where(total == 0, 1.0, 2 * hits / np.maximum(total, 1))


def _count_beyond(values: NDArray[np.float64], thresholds: NDArray[np.float64], sign: int) -> NDArray[np.int64]:
    ordered = np.sort(sign * values)
    return len(ordered) - np.searchsorted(ordered, sign * thresholds, side="right")
