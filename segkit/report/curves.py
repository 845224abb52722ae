"""The points of curves that are drawn twice: as PNG in output folders and as SVG on the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Points = Sequence[tuple[float, float]]

FEW_POINTS = 30
"""A curve with fewer points has a marker at each."""

_MOST_BUCKETS = 200
_LOSS, _VALIDATION, _RATE = "loss", "validation", "learning rate"
_PANEL_OF = {"dice": _VALIDATION, "measures": _VALIDATION, "score": _VALIDATION, "lr": _RATE}


def training_curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Panel -> curve name -> points (step, value), without empty panels.

    Args:
        rows: The lines of `metrics.jsonl`: `step`, and any of: keys with `loss` in their name, `dice` and `measures`
            (name -> value, or one value), `score` and `lr`. Missing and undefined values are left out.
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {_LOSS: {}, _VALIDATION: {}, _RATE: {}}
    for position, row in enumerate(rows):
        for key, entry in row.items():
            panel = _PANEL_OF.get(key, _LOSS if "loss" in key else None)
            if panel is None:
                continue
            for name, value in (entry if isinstance(entry, Mapping) else {key: entry}).items():
                if value is not None and math.isfinite(value):
                    panels[panel].setdefault(name, []).append((row.get("step", position), value))
    return {panel: curves for panel, curves in panels.items() if curves}


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most 601 points of a curve: the first, smallest and largest of each of 200 stretches, in their order."""
    if len(points) <= 3 * _MOST_BUCKETS:
        return list(points)
    kept: list[tuple[float, float]] = []
    for stretch in np.array_split(np.arange(len(points)), _MOST_BUCKETS):
        values = [points[index][1] for index in stretch]
        chosen = {0, int(np.argmin(values)), int(np.argmax(values))}
        kept += [points[int(stretch[offset])] for offset in sorted(chosen)]
    return [*kept, points[-1]] if kept[-1] != points[-1] else kept


def calibration_points(table: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(mean probability, observed share) of the bins of a reliability table that hold any voxels."""
    columns = [table.get(key) for key in ("confidence", "frequency")]
    pairs = zip(*(column if isinstance(column, list) else [] for column in columns), strict=False)
    return [(x, y) for x, y in ((number(x), number(y)) for x, y in pairs) if x is not None and y is not None]


def number(value: object) -> float | None:
    """A finite number, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
