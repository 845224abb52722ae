"""Files of scores: scores.json read, for pages and comparisons, and tables written as CSV and Markdown.

A table is its column titles and its rows.
"""

import csv
import io
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from segkit.errors import DataError, RequestError, as_request, on_one_line, printable
from segkit.metrics.lesions import Scores
from segkit.metrics.statistics import mean_interval, median_interval
from segkit.reading.files import read_json, written_atomically
from segkit.reading.layouts.schemes import patient_of

SCORES_NAME = "scores.json"

_REMEDY = "Give what `segkit evaluate -o FOLDER` wrote: the folder, or its scores.json"


def worst_first(cases: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Case ids by their mean Dice over regions, lowest first, then by id.

    A case whose Dice is undefined in all regions counts as perfect: it has nothing to segment.
    """

    def key(case_id: str) -> tuple[float, str]:
        dice = [scores.get("dice", math.nan) for scores in cases[case_id].values()]
        defined = [value for value in dice if not math.isnan(value)]
        return (sum(defined) / len(defined) if defined else 1.0, case_id)

    return sorted(cases, key=key)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class ScoredCase(_Strict):
    """An entry of "cases": a null score is infinite if `infinite` (region -> metrics) lists it, else undefined.

    A missing case had no usable prediction; `patient` is absent where it is the case id.
    """

    case: str
    regions: dict[str, dict[str, float | None]]
    infinite: dict[str, list[str]] = {}
    patient: str | None = None
    missing: bool = False

    def scores(self) -> dict[str, dict[str, float]]:
        """Region -> metric -> value, NaN where undefined."""
        return {
            region: {metric: self._value(region, metric, value) for metric, value in scores.items()}
            for region, scores in self.regions.items()
        }

    def _value(self, region: str, metric: str, value: float | None) -> float:
        if value is not None:
            return value
        return math.inf if metric in self.infinite.get(region, ()) else math.nan


class Failure(_Strict):
    """An entry of "errors"."""

    case: str
    error: str = "could not be scored"


class Scheme(_Strict):
    """The label scheme, as `LabelScheme.to_json` wrote it."""

    name: str
    labels: dict[str, int] = {}
    ignore: int | None = None


class ScoresDocument(_Strict):
    """scores.json; fields that earlier versions did not write, and that a comparison does not need, may be missing.

    `summary` and `reliability` are not validated. `predictions` and `references` are the paths to these from the folder
    of the document.
    """

    protocol: str
    challenge: str | None = None
    headline: list[str] = []
    label_scheme: Scheme | None = None
    roi: str | None = None
    cases: list[ScoredCase]
    summary: dict[str, dict[str, Any]] = {}
    intervals: str = ""
    reliability: dict[str, dict[str, Any]] = {}
    errors: list[Failure] = []
    unscored: list[str] = []
    surplus: list[str] = []
    notes: list[str] = []
    predictions: str | None = None
    references: str | None = None


def read_document(path: Path) -> ScoresDocument:
    """A scores.json as it was written.

    Raises:
        RequestError: the file is missing or damaged, or holds a case twice.
    """
    try:
        document = ScoresDocument.model_validate(read_json(path, remedy=_REMEDY, most_bytes=None))
    except DataError as error:
        raise as_request(error) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        reason, _, _ = first["msg"].partition(" or instance of ")  # without the name of a class
        raise RequestError(f"is not a valid scores.json ({place}: {reason})", where=path, remedy=_REMEDY) from error
    twice = [case for case, count in Counter(entry.case for entry in document.cases).items() if count > 1]
    if twice:
        raise RequestError(f"holds case {twice[0]} twice", where=path, remedy=_REMEDY)
    return document


@dataclass(frozen=True)
class ScoreSet:
    """The scores of one model, for comparisons.

    `cases` maps a case id to region, metric and value, which is NaN where undefined and may be infinite; `failed` are
    the cases that had a reference and got no scores; `patients` maps every case id to its patient.
    """

    name: str
    path: Path
    protocol: str
    challenge: str | None
    label_scheme: str | None
    roi: str | None
    cases: Mapping[str, Mapping[str, Mapping[str, float]]]
    failed: frozenset[str]
    patients: Mapping[str, str]

    @property
    def regions(self) -> list[str]:
        """The regions of any case, in order of first appearance."""
        return list(dict.fromkeys(region for regions in self.cases.values() for region in regions))

    @property
    def metrics(self) -> list[str]:
        """The metrics of any region, in order of first appearance."""
        scores = (metrics for regions in self.cases.values() for metrics in regions.values())
        return list(dict.fromkeys(metric for metrics in scores for metric in metrics))

    def value(self, case: str, region: str, metric: str) -> float:
        """One score, NaN where it is undefined or was not computed."""
        return self.cases.get(case, {}).get(region, {}).get(metric, math.nan)


def read_score_sets(paths: Sequence[Path]) -> list[ScoreSet]:
    """Several models, each named after its folder, or by the given path where folders share a name.

    Raises:
        RequestError: one is given twice, missing, damaged, or has no scores at all.
    """
    models = [read_scores(path) for path in paths]
    twice = [str(file) for file, count in Counter(model.path.resolve() for model in models).items() if count > 1]
    if twice:
        raise RequestError(f"{', '.join(twice)} is given more than once", remedy="Name each model once")
    named = Counter(model.name for model in models)
    pairs = zip(paths, models, strict=True)
    return [replace(model, name=str(path)) if named[model.name] > 1 else model for path, model in pairs]


def read_scores(path: Path) -> ScoreSet:
    """The scores of a folder with a scores.json, named after it, or of such a file under another name.

    Raises:
        RequestError: the file is missing, damaged or holds no scores.
    """
    path = path / SCORES_NAME if path.is_dir() else path
    document = read_document(path)
    if not document.cases:
        raise RequestError("holds no scored case", where=path, remedy=_REMEDY)
    failed = frozenset([*(failure.case for failure in document.errors), *document.unscored])
    given = {entry.case: entry.patient for entry in document.cases}
    return ScoreSet(
        name=path.resolve().parent.name if path.name == SCORES_NAME else path.stem,
        path=path,
        protocol=document.protocol,
        challenge=document.challenge,
        label_scheme=None if document.label_scheme is None else document.label_scheme.name,
        roi=document.roi,
        cases={entry.case: entry.scores() for entry in document.cases},
        failed=failed - given.keys(),
        patients={case: given.get(case) or patient_of(case) for case in (*given, *failed)},
    )


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
    `segkit.metrics.statistics`.
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
