"""Reliability tables and diagrams: what probabilities say against what is there, pooled over cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segkit.evaluation.companions import RegionReliability
from segkit.metrics.calibration import Reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Pooled = dict[str, dict[str, Reliability]]
"""Region name -> "whole" or "box" -> the voxels of all cases; see `segkit.metrics.calibration`."""

_SHOWN = {"whole": ("all voxels", "#56B4E9", 6.0), "box": ("around the reference", "#D55E00", 3.0)}
"""What a curve is called, its colour (Okabe & Ito's sky blue and vermilion) and the size of its markers: where the two
agree, both can be seen."""


def pool(cases: Iterable[Mapping[str, RegionReliability]]) -> Pooled:
    """The voxels of all cases together, each voxel counting once; a large lesion counts more than a small one."""
    found: dict[str, dict[str, list[Reliability]]] = {}
    for regions in cases:
        for region, own in regions.items():
            parts = found.setdefault(region, {})
            parts.setdefault("whole", []).append(own.whole)
            if own.box is not None:
                parts.setdefault("box", []).append(own.box)
    return {region: {where: reduce(add, each) for where, each in parts.items()} for region, parts in found.items()}


def reliability_json(pooled: Pooled) -> dict[str, Any]:
    """The tables as strict JSON: the mean probability and the frequency of an empty bin are null."""
    return {region: {where: _table(own) for where, own in parts.items()} for region, parts in pooled.items()}


def reliability_figure(path: Path, pooled: Pooled) -> None:
    """Draw a reliability diagram of each region, with the number of voxels of each bin below.

    Args:
        path: The picture to write.
        pooled: What is to be drawn; at least one region.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(pooled), 4.8), layout="constrained")
    panels = figure.subplots(2, len(pooled), squeeze=False, sharex=True, height_ratios=(3, 1))
    for column, (region, parts) in enumerate(pooled.items()):
        _draw(panels[0, column], panels[1, column], parts)
        panels[0, column].set_title(region, parse_math=False)
        panels[1, column].set_xlabel("probability")
    panels[0, 0].set_ylabel("share in the region")
    panels[1, 0].set_ylabel("voxels")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw(diagram: Axes, counts: Axes, parts: Mapping[str, Reliability]) -> None:
    diagram.plot((0, 1), (0, 1), color="black", linewidth=0.8, linestyle="--")
    for where, (name, colour, size) in _SHOWN.items():
        if where in parts:
            own = parts[where]
            filled = own.count > 0
            label = f"{name}: ECE {own.calibration_error():.3f}, ACE {own.average_calibration_error():.3f}"
            line: dict[str, Any] = {"color": colour, "marker": "o", "markersize": size, "linewidth": size / 2}
            diagram.plot(own.confidence[filled], own.frequency[filled], label=label, **line)
            counts.stairs(own.count, own.edges, color=colour)
    diagram.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    diagram.grid(alpha=0.3)
    diagram.legend(loc="upper left", fontsize=7)
    counts.set_yscale("log")
    counts.set_ylim(bottom=0.5)
    counts.grid(alpha=0.3)


def _table(own: Reliability) -> dict[str, Any]:
    return {
        "edges": own.edges.tolist(),
        "count": own.count.tolist(),
        "confidence": _defined(own.confidence),
        "frequency": _defined(own.frequency),
        "ece": own.calibration_error(),
        "ace": own.average_calibration_error(),
        "brier": own.brier_score(),
    }


def _defined(values: Iterable[np.float64]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
