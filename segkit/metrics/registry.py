"""Every metric of the protocols in `segkit.metrics.protocols`: title, unit, direction, worst value.

Code that sorts, colours or compares scores uses this table instead of the name of a metric.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class MetricFacts:
    """One metric.

    Attributes:
        title: The name for a heading, with its unit.
        unit: "mm", "voxels", "ml", "lesions", or "" for a share or quotient.
        higher_is_better: None where there is no direction, as for a volume.
        worst: The worst possible value; infinite for distances, for which each protocol has a value.
        is_ranked: Whether cases and models are compared by it; not by deviations, volumes and plain counts.
    """

    title: str
    unit: str = ""
    higher_is_better: bool | None = True
    worst: float = 0.0
    is_ranked: bool = True

    @property
    def is_distance(self) -> bool:
        """Whether it is a distance, in mm or voxels."""
        return self.unit in ("mm", "voxels") and self.is_ranked


def _share(title: str) -> MetricFacts:
    return MetricFacts(title)


def _distance(title: str, unit: str = "mm") -> MetricFacts:
    return MetricFacts(f"{title} ({unit})", unit, higher_is_better=False, worst=math.inf)


def _spread(title: str, unit: str = "") -> MetricFacts:
    heading = f"{title} ({unit})" if unit else title
    return MetricFacts(heading, unit, higher_is_better=False, worst=math.inf, is_ranked=False)


def _calibration(title: str) -> MetricFacts:
    return MetricFacts(title, higher_is_better=False, worst=1.0)


def _volume(title: str) -> MetricFacts:
    return MetricFacts(f"{title} (ml)", "ml", higher_is_better=None, worst=math.nan, is_ranked=False)


def _found(title: str) -> MetricFacts:
    return MetricFacts(title, "lesions", is_ranked=False)


def _mistaken(title: str) -> MetricFacts:
    return MetricFacts(title, "lesions", higher_is_better=False, worst=math.inf, is_ranked=False)


METRICS: dict[str, MetricFacts] = {
    "dice": _share("Dice"),
    "hd95_mm": _distance("HD95"),
    "nsd": _share("NSD"),
    "sensitivity": _share("Sensitivity"),
    "precision": _share("Precision"),
    "specificity": _share("Specificity"),
    "auc": _share("AUC"),
    "ece": _calibration("ECE"),
    "ace": _calibration("ACE"),
    "brier": _calibration("Brier score"),
    "ece_box": _calibration("ECE around the reference"),
    "brier_box": _calibration("Brier score around the reference"),
    "prediction_ml": _volume("Predicted volume"),
    "reference_ml": _volume("Reference volume"),
    "hd95_voxels": _distance("HD95", "voxels"),
    "nsd_half_voxel": _share("NSD at half a voxel"),
    "lesionwise_dice": _share("Lesion-wise Dice"),
    "lesionwise_dice_std": _spread("Deviation of lesion-wise Dice"),
    "lesionwise_hd95_mm": _distance("Lesion-wise HD95"),
    "lesionwise_hd95_mm_std": _spread("Deviation of lesion-wise HD95", "mm"),
    "lesionwise_nsd": _share("Lesion-wise NSD"),
    "lesionwise_nsd_std": _spread("Deviation of lesion-wise NSD"),
    "sq_dice": _share("SQ Dice"),
    "sq_dice_std": _spread("Deviation of SQ Dice"),
    "sq_hd95_mm": _distance("SQ HD95"),
    "sq_hd95_mm_std": _spread("Deviation of SQ HD95", "mm"),
    "sq_nsd": _share("SQ NSD"),
    "sq_nsd_std": _spread("Deviation of SQ NSD"),
    "pq_dice": _share("PQ Dice"),
    "lesion_tp": _found("Lesions found"),
    "lesion_fp": _mistaken("Lesions made up"),
    "lesion_fn": _mistaken("Lesions missed"),
    "lesion_precision": _share("Lesion precision"),
    "lesion_recall": _share("Lesion recall"),
    "lesion_f1": _share("Lesion F1"),
    "large_lesion_tp": _found("Large lesions found"),
    "large_lesion_fp": _mistaken("Lesions made up, counted as large"),
    "large_lesion_fn": _mistaken("Large lesions missed"),
    "large_lesion_precision": _share("Large lesion precision"),
    "large_lesion_recall": _share("Large lesion recall"),
    "large_lesion_f1": _share("Large lesion F1"),
    "small_lesion_tp": _found("Small lesions found"),
    "small_lesion_fp": _mistaken("Lesions made up, counted as small"),
    "small_lesion_fn": _mistaken("Small lesions missed"),
    "small_lesion_precision": _share("Small lesion precision"),
    "small_lesion_recall": _share("Small lesion recall"),
    "small_lesion_f1": _share("Small lesion F1"),
}
"""Every metric by name, in the order in which tables show them."""
