"""Tables of scores as Markdown and CSV: a row per case for a spreadsheet, means over cases for readers.

A table is its column titles and its rows.
"""

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from segkit.errors import on_one_line, printable
from segkit.metrics.bootstrap import mean_interval, median_interval
from segkit.metrics.lesions import Scores
from segkit.reading.files import written_atomically

_MARKUP = re.compile(r"[\\`*\[\]<>|]")
_FORMULA_SIGNS = ("=", "+", "-", "@")
"""OWASP, "CSV injection": what Excel and LibreOffice take for the beginning of a formula."""

Summary = dict[str, dict[str, dict[str, Any]]]
"""Region name -> metric name -> statistics over cases.

They are `mean` and `median` with their 95 % intervals `ci95` and `median_ci95` (lower and upper end), and `n`, the
number of cases. None is what is undefined: the mean of no values, the interval of a single patient.
"""


def summarise(cases: Iterable[Mapping[str, Scores]], patients: Sequence[str] | None = None) -> Summary:
    """Statistics of the finite values of each region and metric, in order of first appearance.

    `patients` names the patient of each case; without it every case is a patient of its own. Intervals are those of
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


def _statistics(found: Mapping[int, float], patients: Sequence[str] | None) -> dict[str, Any]:
    """Statistics of values by the position of their case."""
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


def summary_rows(summary: Summary, metrics: Sequence[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """Column titles, and for each region a row of "mean (median)" and one of the 95 % intervals of the means.

    The last column is the number of cases. A region without any interval has no row of them.
    """
    shown = metrics or list(dict.fromkeys(name for scores in summary.values() for name in scores))
    rows = []
    for region, scores in summary.items():
        count = max(scores[name]["n"] for name in shown if name in scores)
        entries = [scores.get(metric, {"mean": None, "ci95": None}) for metric in shown]
        means = ["-" if own["mean"] is None else f"{own['mean']:.3f} ({own['median']:.3f})" for own in entries]
        rows.append([region, *means, str(count)])
        intervals = [interval_text(own["ci95"], absent="") for own in entries]
        if any(intervals):
            rows.append(["95 % CI", *intervals, ""])
    return ["region", *shown, "n"], rows


def interval_text(interval: Sequence[float] | None, form: str = ".3f", absent: str = "-") -> str:
    """An interval as "low to high"."""
    return absent if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def scores_csv(cases: Mapping[str, Mapping[str, Scores]]) -> str:
    """Comma-separated text: case, region, then one column per metric; undefined values are empty cells."""
    metrics = list(dict.fromkeys(name for regions in cases.values() for scores in regions.values() for name in scores))
    rows = [
        [case, region, *(value if math.isfinite(value := scores.get(name, math.nan)) else None for name in metrics)]
        for case, regions in cases.items()
        for region, scores in regions.items()
    ]
    return csv_table(["case", "region", *metrics], rows)


def csv_table(columns: Sequence[str], rows: Iterable[Iterable[str | float | None]]) -> str:
    """Comma-separated text; texts stay on one line, and one that a spreadsheet would compute gets an apostrophe."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_spreadsheet_cell(cell) for cell in row] for row in rows)
    return text.getvalue()


def _spreadsheet_cell(cell: str | float | None) -> str | float | None:
    shown = on_one_line(cell) if isinstance(cell, str) else cell
    return f"'{shown}" if isinstance(shown, str) and shown.startswith(_FORMULA_SIGNS) else shown


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in GitHub's Markdown, first column left, the others right."""
    head, *body = (f"| {' | '.join(map(markdown_text, cells))} |\n" for cells in (columns, *rows))
    return "".join([head, f"| {' | '.join(['---', *('---:' for _ in columns[1:])])} |\n", *body])


def markdown_list(notes: Sequence[str]) -> str:
    """Notes as a list in Markdown, after an empty line; nothing where there are none."""
    return "".join(["\n", *(f"- {markdown_text(note)}\n" for note in notes)]) if notes else ""


def markdown_text(text: str) -> str:
    """A text on one line with all markup escaped: a name cannot end a cell or become a link or a tag."""
    return printable(_MARKUP.sub(r"\\\g<0>", " ".join(text.split())))


def write_documents(folder: Path, documents: Mapping[str, str | Mapping[str, Any]]) -> None:
    """Write files atomically into `folder`: file name -> its text, or a mapping that is written as strict JSON.

    Raises:
        DataError: the folder cannot be written.
    """
    for name, content in documents.items():
        if not isinstance(content, str):
            content = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        with written_atomically(folder / name) as temporary:
            # File names that are not UTF-8 reach Python as lone surrogates, which JSON too escapes as `\udce9`.
            temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
