"""Scores as tables: one row per case and region for a spreadsheet, a summary for people."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from segkit.errors import on_one_line, printable
from segkit.metrics.bootstrap import mean_interval, median_interval

Scores = Mapping[str, Mapping[str, float]]
"""Region name -> metric name -> value of one case."""


class Statistics(TypedDict):
    """Mean and median over cases with their 95 % intervals, and the number of cases.

    An interval is its lower and upper end. None is what is not there: a mean of no values, an interval of one patient.
    """

    mean: float | None
    median: float | None
    n: int
    ci95: list[float] | None
    median_ci95: list[float] | None


Summary = dict[str, dict[str, Statistics]]
"""Region name -> metric name -> statistics over cases."""


_MARKUP = re.compile(r"[\\`*\[\]<>|]")
_FORMULA_SIGNS = ("=", "+", "-", "@")
"""OWASP, "CSV injection": what Excel and LibreOffice take for the beginning of a formula."""


def summarise(cases: Iterable[Scores], patients: Sequence[str] | None = None) -> Summary:
    """Statistics of the finite values of each region and metric, in order of first appearance.

    `patients` tells whose each case is; without it every case counts as a patient of its own. Intervals are those of
    `segkit.metrics.bootstrap`.
    """
    values: dict[str, dict[str, dict[int, float]]] = {}
    for position, regions in enumerate(cases):
        for region, metrics in regions.items():
            for metric, value in metrics.items():
                found = values.setdefault(region, {}).setdefault(metric, {})
                if math.isfinite(value):
                    found[position] = value
    return {
        region: {metric: _statistics(found, patients) for metric, found in metrics.items()}
        for region, metrics in values.items()
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
            values = (repr(cell) if math.isfinite(cell) else "" for cell in cells)
            writer.writerow([spreadsheet_text(case), spreadsheet_text(region), *values])
    return text.getvalue()


def summary_rows(summary: Summary, metrics: Sequence[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """Column titles, and for each region a row of "mean (median)" and one of the 95 % intervals of the means.

    The last column is the number of cases. A region without any interval has no row of them.
    """
    shown = metrics or list(dict.fromkeys(name for scores in summary.values() for name in scores))
    rows = []
    for region, scores in summary.items():
        count = max(scores[name]["n"] for name in shown if name in scores)
        rows.append([region, *(_cell(scores.get(metric)) for metric in shown), str(count)])
        intervals = [_interval(scores.get(metric)) for metric in shown]
        if any(intervals):
            rows.append(["95 % CI", *intervals, ""])
    return ["region", *shown, "n"], rows


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in GitHub's Markdown, first column left, the others right."""
    lines = [list(columns), *(list(row) for row in rows)]
    head, *body = (f"| {' | '.join(map(markdown_text, cells))} |\n" for cells in lines)
    return "".join([head, f"| {' | '.join(['---', *('---:' for _ in columns[1:])])} |\n", *body])


def markdown_text(text: str) -> str:
    """A text on one line in which nothing is markup: no cell ends at a name, no name becomes a link or a tag."""
    return printable(_MARKUP.sub(r"\\\g<0>", " ".join(text.split())))


def spreadsheet_text(name: str) -> str:
    """A name on one line; one that a spreadsheet would compute gets an apostrophe, by which it is taken for text."""
    shown = on_one_line(name)
    return f"'{shown}" if shown.startswith(_FORMULA_SIGNS) else shown


def _statistics(found: Mapping[int, float], patients: Sequence[str] | None) -> Statistics:
    """Of values by the position of their case."""
    values = list(found.values())
    if not values:
        return {"mean": None, "median": None, "n": 0, "ci95": None, "median_ci95": None}
    owners = None if patients is None else [patients[position] for position in found]
    mean, median = mean_interval(values, owners), median_interval(values, owners)
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "n": len(values),
        "ci95": list(mean) if mean else None,
        "median_ci95": list(median) if median else None,
    }


def _cell(entry: Statistics | None) -> str:
    if entry is None or entry["mean"] is None or entry["median"] is None:
        return "-"
    return f"{entry['mean']:.3f} ({entry['median']:.3f})"


def _interval(entry: Statistics | None) -> str:
    if entry is None or entry["ci95"] is None:
        return ""
    low, high = entry["ci95"]
    return f"{low:.3f} to {high:.3f}"
