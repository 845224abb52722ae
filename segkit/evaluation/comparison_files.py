"""A comparison as a JSON document, a table for a spreadsheet, and Markdown to read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from segkit.evaluation.comparison import Comparison, PairedComparison
from segkit.evaluation.tables import csv_table, interval_text, markdown_list, markdown_table, write_documents
from segkit.metrics.bootstrap import RESAMPLES, Interval
from segkit.metrics.registry import METRICS
from segkit.metrics.significance import EXCHANGES

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
        "exchanges": [asdict(own) for own in comparison.exchanges],
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
            interval_text(own.interval),
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
            interval_text(pair.interval, "+.4f"),
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
    counts = f"{len(comparison.cases)} cases, {comparison.patients} patients"
    text = [
        f"Protocol {comparison.models[0].protocol}, {counts}.\n\n## Ranking\n\n",
        markdown_table(*ranking_rows(comparison)),
        "\n## Differences\n\n",
        markdown_table(*pair_rows(comparison)),
        f"\n{_METHODS}{markdown_list(comparison.notes)}",
    ]
    rows = []
    for pair in comparison.pairs:
        low, high = pair.interval or (None, None)
        document = _pair_json(pair) | {"low": low, "high": high}
        rows.append([document[column] for column in _COLUMNS])
    documents: dict[str, str | Mapping[str, Any]] = {
        "comparison.json": comparison_json(comparison),
        "comparison.csv": csv_table(_COLUMNS, rows),
        "comparison.md": "".join(text),
    }
    write_documents(folder, documents)


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


def _p(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.1e}" if value < 0.001 else f"{value:.3f}"
