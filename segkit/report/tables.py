"""Scores as tables: one row per case and region for a spreadsheet, a summary for people."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

Scores = Mapping[str, Mapping[str, float]]
"""Region name -> metric name -> value of one case."""

Summary = dict[str, dict[str, dict[str, float | int | None]]]
"""Region name -> metric name -> mean and median over cases (None where there is no value) and their number n."""


def summarise(cases: Iterable[Scores]) -> Summary:
    """Mean, median and number of the finite values of each region and metric, in order of first appearance."""
    values: dict[str, dict[str, list[float]]] = {}
    for regions in cases:
        for region, metrics in regions.items():
            for metric, value in metrics.items():
                found = values.setdefault(region, {}).setdefault(metric, [])
                if math.isfinite(value):
                    found.append(value)
    return {
        region: {metric: _statistics(found) for metric, found in metrics.items()} for region, metrics in values.items()
    }


def scores_csv(cases: Mapping[str, Scores]) -> str:
    """Comma-separated text: case, region, then one column per metric; undefined values are empty cells."""
    metrics = list(dict.fromkeys(name for regions in cases.values() for scores in regions.values() for name in scores))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "region", *metrics])
    for case, regions in cases.items():
        for region, scores in regions.items():
            cells = (scores.get(metric, math.nan) for metric in metrics)
            writer.writerow([case, region, *(repr(cell) if math.isfinite(cell) else "" for cell in cells)])
    return text.getvalue()


def summary_rows(summary: Summary, metrics: Sequence[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """Column titles, and one row per region: "mean (median)" of each metric, and the number of cases."""
    shown = metrics or list(dict.fromkeys(name for scores in summary.values() for name in scores))
    rows = [
        [region, *(_cell(scores.get(metric)) for metric in shown), str(max(_count(scores, name) for name in shown))]
        for region, scores in summary.items()
    ]
    return ["region", *shown, "n"], rows


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in GitHub's Markdown, first column left, the others right."""
    lines = [list(columns), ["---", *("---:" for _ in columns[1:])], *(list(row) for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _statistics(values: Sequence[float]) -> dict[str, float | int | None]:
    if not values:
        return {"mean": None, "median": None, "n": 0}
    return {"mean": statistics.fmean(values), "median": statistics.median(values), "n": len(values)}


def _count(scores: Mapping[str, Mapping[str, float | int | None]], metric: str) -> int:
    return int(scores.get(metric, {}).get("n") or 0)


def _cell(entry: Mapping[str, float | int | None] | None) -> str:
    if entry is None or entry["mean"] is None or entry["median"] is None:
        return "-"
    return f"{entry['mean']:.3f} ({entry['median']:.3f})"
