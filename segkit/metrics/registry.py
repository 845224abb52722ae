"""Every metric of the protocols in `segkit.metrics.protocols`: title, unit, direction, worst value.

Code that sorts, colours or compares scores uses this table instead of the name of a metric.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class MetricFacts:
    """One metric: its `title` for a heading, with its `unit` ("mm", "voxels", "ml", "lesions", "" for a share).

    `higher_is_better` is None where there is no direction, as for a volume. `worst` is the worst possible value;
    infinite for distances, for which each protocol has a value. Cases and models are compared by ranked metrics, not by
    deviations, volumes and plain counts.
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


def _distance(title: str, unit: str = "mm") -> MetricFacts:
    return MetricFacts(f"{title} ({unit})", unit, higher_is_better=False, worst=math.inf)


def _spread(title: str, unit: str = "") -> MetricFacts:
    heading = f"{title} ({unit})" if unit else title
    return MetricFacts(heading, unit, higher_is_better=False, worst=math.inf, is_ranked=False)


def _calibration(title: str) -> MetricFacts:
    return MetricFacts(title, higher_is_better=False, worst=1.0)


def _volume(title: str) -> MetricFacts:
    return MetricFacts(f"{title} (ml)", "ml", higher_is_better=None, worst=math.nan, is_ranked=False)


def _measured(prefix: str, title: str, inner: str) -> dict[str, MetricFacts]:
    """Mean and deviation over lesions; `inner` is the title within a sentence."""
    return {
        f"{prefix}_dice": MetricFacts(f"{title} Dice"),
        f"{prefix}_dice_std": _spread(f"Deviation of {inner} Dice"),
        f"{prefix}_hd95_mm": _distance(f"{title} HD95"),
        f"{prefix}_hd95_mm_std": _spread(f"Deviation of {inner} HD95", "mm"),
        f"{prefix}_nsd": MetricFacts(f"{title} NSD"),
        f"{prefix}_nsd_std": _spread(f"Deviation of {inner} NSD"),
    }


def _counted(prefix: str, name: str, false_positives: str) -> dict[str, MetricFacts]:
    """Lesions found and missed, and what follows from their numbers."""

    def mistakes(title: str) -> MetricFacts:
        return MetricFacts(title, "lesions", higher_is_better=False, worst=math.inf, is_ranked=False)

    return {
        f"{prefix}_tp": MetricFacts(f"{name}s found", "lesions", is_ranked=False),
        f"{prefix}_fp": mistakes(false_positives),
        f"{prefix}_fn": mistakes(f"{name}s missed"),
        f"{prefix}_precision": MetricFacts(f"{name} precision"),
        f"{prefix}_recall": MetricFacts(f"{name} recall"),
        f"{prefix}_f1": MetricFacts(f"{name} F1"),
    }


METRICS: dict[str, MetricFacts] = {
    "dice": MetricFacts("Dice"),
    "hd95_mm": _distance("HD95"),
    "nsd": MetricFacts("NSD"),
    "sensitivity": MetricFacts("Sensitivity"),
    "precision": MetricFacts("Precision"),
    "specificity": MetricFacts("Specificity"),
    "auc": MetricFacts("AUC"),
    "ece": _calibration("ECE"),
    "ace": _calibration("ACE"),
    "brier": _calibration("Brier score"),
    "ece_box": _calibration("ECE around the reference"),
    "brier_box": _calibration("Brier score around the reference"),
    "prediction_ml": _volume("Predicted volume"),
    "reference_ml": _volume("Reference volume"),
    "hd95_voxels": _distance("HD95", "voxels"),
    "nsd_half_voxel": MetricFacts("NSD at half a voxel"),
    **_measured("lesionwise", "Lesion-wise", "lesion-wise"),
    **_measured("sq", "SQ", "SQ"),
    "pq_dice": MetricFacts("PQ Dice"),
    **_counted("lesion", "Lesion", "False-positive lesions"),
    **_counted("large_lesion", "Large lesion", "False-positive lesions, counted as large"),
    **_counted("small_lesion", "Small lesion", "False-positive lesions, counted as small"),
}
"""Every metric by name, in the order in which tables show them."""
