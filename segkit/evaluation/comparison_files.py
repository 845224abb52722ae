"""A comparison as a document, a table for a spreadsheet, and a page to read."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from segkit.evaluation.comparison import Comparison, PairedComparison
from segkit.evaluation.tables import markdown_table, markdown_text, spreadsheet_text
from segkit.metrics.bootstrap import RESAMPLES, Interval
from segkit.metrics.brats_ranking import EXCHANGES
from segkit.metrics.registry import METRICS
from segkit.reading.files import written_atomically

_COLUMNS = (
    *("model", "baseline", "region", "metric", "cases", "model_mean", "baseline_mean", "difference", "low", "high"),
    *("better", "equal", "worse", "p", "p_holm", "effect", "method", "zeros"),
)

_METHODS = f"""\
Difference is model less baseline, mean over cases, with its 95 % interval (expanded percentile bootstrap, {RESAMPLES}
resamples). Better, equal and worse count cases. p is of the two-sided Wilcoxon signed-rank test, Holm's correction goes
over all tests of this table, and effect is the matched-pairs rank-biserial correlation, from -1 to 1, positive where
the model is better. The rank score is that of BraTS (arXiv 1811.02629): the mean over cases of a case's mean rank over
regions and metrics. p of the ranking is one-sided: how often random exchanges of the two models' ranks, case by case
({EXCHANGES} or all there are), set their scores as far apart.
"""


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """The document of `segkit compare --json`, strict JSON: what is undefined is null."""
    first = comparison.models[0]
    return {
        "models": [{"name": model.name, "scores": str(model.path)} for model in comparison.models],
        "protocol": first.protocol,
        "challenge": first.challenge,
        "regions": list(comparison.regions),
        "metrics": list(comparison.metrics),
        "cases": list(comparison.cases),
        "patients": comparison.patients,
        "ranking": [
            {"model": own.model, "place": own.place, "score": own.score, "ci95": _ends(own.interval)}
            for own in comparison.ranking
        ],
        "exchanges": [
            {"model": own.model, "baseline": own.baseline, "difference": own.difference, "p": own.p}
            for own in comparison.exchanges
        ],
        "pairs": [_pair_json(pair) for pair in comparison.pairs],
        "notes": list(comparison.notes),
    }


def ranking_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Column titles, and a row for each model: place, rank score, interval, and p against each model behind it."""
    p_of = {(own.model, own.baseline): own.p for own in comparison.exchanges}
    names = [ranked.model for ranked in comparison.ranking]
    rows = [
        [
            own.model,
            str(own.place),
            f"{own.score:.3f}",
            _interval(own.interval),
            *(_p(p_of[own.model, other]) if (own.model, other) in p_of else "" for other in names[1:]),
        ]
        for own in comparison.ranking
    ]
    return ["model", "place", "rank score", "95 % CI", *(f"p against {name}" for name in names[1:])], rows


def pair_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Column titles, and a row for each pair of models, region and metric."""
    columns = ["model - baseline", "region", "metric", "difference", "95 % CI", "better/equal/worse", "p", "p (Holm)"]
    rows = [
        [
            f"{pair.model} - {pair.baseline}",
            pair.region,
            METRICS[pair.metric].title,
            f"{pair.difference:+.4f}",
            _interval(pair.interval, "+.4f"),
            f"{pair.better}/{pair.equal}/{pair.worse}",
            ("~" if pair.test.method == "asymptotic" else "") + _p(pair.test.p),
            _p(pair.p_holm),
            f"{pair.test.effect:+.2f}",
        ]
        for pair in comparison.pairs
    ]
    return [*columns, "effect"], rows


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write comparison.json, comparison.csv (a row for each pair, region and metric) and comparison.md into `folder`.

    Raises:
        DataError: the folder cannot be written.
    """
    document = json.dumps(comparison_json(comparison), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    for name, text in (
        ("comparison.json", document),
        ("comparison.csv", _csv(comparison)),
        ("comparison.md", _markdown(comparison)),
    ):
        with written_atomically(folder / name) as temporary:
            # File names that are not UTF-8 reach Python as lone surrogates.
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _markdown(comparison: Comparison) -> str:
    notes = "".join(f"- {markdown_text(note)}\n" for note in comparison.notes)
    return (
        f"Protocol {comparison.models[0].protocol}, {len(comparison.cases)} cases, {comparison.patients} patients.\n\n"
        f"## Ranking\n\n{markdown_table(*ranking_rows(comparison))}\n"
        f"## Differences\n\n{markdown_table(*pair_rows(comparison))}\n{_METHODS}" + (f"\n{notes}" if notes else "")
    )


def _csv(comparison: Comparison) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for pair in comparison.pairs:
        low, high = pair.interval or (None, None)
        names = {name: spreadsheet_text(getattr(pair, name)) for name in ("model", "baseline", "region")}
        writer.writerow(_pair_json(pair) | names | {"low": low, "high": high})
    return text.getvalue()


def _pair_json(pair: PairedComparison) -> dict[str, Any]:
    return {
        "model": pair.model,
        "baseline": pair.baseline,
        "region": pair.region,
        "metric": pair.metric,
        "cases": pair.cases,
        "model_mean": _defined(pair.model_mean),
        "baseline_mean": _defined(pair.baseline_mean),
        "difference": _defined(pair.difference),
        "ci95": _ends(pair.interval),
        "better": pair.better,
        "equal": pair.equal,
        "worse": pair.worse,
        "p": _defined(pair.test.p),
        "p_holm": _defined(pair.p_holm),
        "effect": pair.test.effect,
        "method": pair.test.method,
        "zeros": pair.test.zeros,
        "ties": pair.test.has_ties,
    }


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _interval(interval: Interval | None, style: str = ".3f") -> str:
    return "-" if interval is None else f"{interval[0]:{style}} to {interval[1]:{style}}"


def _p(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.1e}" if value < 0.001 else f"{value:.3f}"
