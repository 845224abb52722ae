"""How a run ended, in numbers: what `segkit train --json` prints and validation.json keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segkit.runtime import peak_rss_mb

CaseDice = Mapping[str, Mapping[str, float]]
"""Case id -> output -> Dice; an output that is neither in the prediction nor in the reference is left out."""


@dataclass(frozen=True)
class RunSummary:
    """How a run ended: mean validation Dice per output, per case, and what it cost.

    `postprocessed` is the Dice with the post-processing that was chosen on these very cases, which flatters it a
    little; None where none was chosen.
    """

    run: Path
    cases: CaseDice
    steps: int
    minutes: float
    peak_rss_mb: float
    skipped: Mapping[str, str]
    postprocessed: CaseDice | None = None

    @property
    def dice(self) -> dict[str, float]:
        """Mean Dice per output, without post-processing."""
        return _mean_by_output(self.cases)

    def to_json(self) -> dict[str, Any]:
        """The document printed by `segkit train --json` and kept as validation.json."""
        return {
            "run": str(self.run),
            "dice": self.dice,
            "cases": _plain(self.cases),
            "postprocessed": None
            if self.postprocessed is None
            else {"dice": _mean_by_output(self.postprocessed), "cases": _plain(self.postprocessed)},
            "steps": self.steps,
            "minutes": round(self.minutes, 2),
            "peak_rss_mb": round(self.peak_rss_mb),
            "skipped": dict(self.skipped),
        }


def summarise_folds(run: Path, folds: Sequence[Mapping[str, Any]], minutes: float) -> RunSummary:
    """One summary from those of the folds of a cross-validation, each as `RunSummary.to_json` gives it.

    A fold that chose no post-processing has the same scores with it as without.
    """
    cases: dict[str, Mapping[str, float]] = {}
    postprocessed: dict[str, Mapping[str, float]] = {}
    skipped: dict[str, str] = {}
    for fold in folds:
        cases |= fold["cases"]
        skipped |= fold["skipped"]
        postprocessed |= (fold.get("postprocessed") or fold)["cases"]
    is_any = any(fold.get("postprocessed") for fold in folds)
    steps = sum(fold["steps"] for fold in folds)
    return RunSummary(run, cases, steps, minutes, peak_rss_mb(), skipped, postprocessed if is_any else None)


def without_undefined(dice: CaseDice) -> dict[str, dict[str, float]]:
    """The scores without those that are NaN: outputs that are neither in the prediction nor in the reference."""
    return {
        case_id: {name: value for name, value in found.items() if not math.isnan(value)}
        for case_id, found in dice.items()
    }


def _plain(dice: CaseDice) -> dict[str, dict[str, float]]:
    return {case_id: dict(found) for case_id, found in dice.items()}


def _mean_by_output(dice: CaseDice) -> dict[str, float]:
    """Mean Dice per output over the cases where it is defined."""
    names = list(dict.fromkeys(name for found in dice.values() for name in found))
    values = {name: [found[name] for found in dice.values() if name in found] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}
