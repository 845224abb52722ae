"""The sections of a page, from what was found; each gives its HTML, or None where there is nothing to tell."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from segkit.errors import some
from segkit.metrics.registry import METRICS
from segkit.report.charts import line_chart, reliability_chart, strip_chart
from segkit.report.figures import curves_of
from segkit.report.html import Child, Markup, definitions, element, joined, plain_table
from segkit.report.sources import CaseFacts, Discretion, Document, Findings, Run, mapping, number
from segkit.report.terms import (
    MOST_ROWS,
    Section,
    digits_of,
    headline_metrics,
    metric_name,
    model_name,
    section,
    swatch,
    written,
)

_MOST_HEADLINES = 7
_SPREADS = 2
_RELIABILITY = {"whole": "All voxels", "box": "Around the reference"}
_NAMED = 20
"""Cases that a note names; the rest is a number."""
_ENVIRONMENT = ("python", "platform", "cores")


def summary_section(findings: Findings, cases: Sequence[CaseFacts], tell: Discretion) -> Section:
    """What was done with which model and data, and the scores in one table."""
    facts: dict[str, Child] = {}
    if findings.runs:  # the folds of a cross-validation have all but their names in common
        run = next((run for run in findings.runs if run.card), findings.runs[0])
        facts |= {"Run": ", ".join(run.name for run in findings.runs)} | _card_facts(run.card, tell) | _run_facts(run)
    for output in findings.outputs:
        name = model_name(output.manifest)
        facts |= {} if name in {run.name for run in findings.runs} else {"Model": name}
        if output.card:
            facts |= _card_facts(output.card, tell)
        facts |= _model_facts(mapping(output.manifest, "model"))
    for scored in findings.evaluations:
        document = scored.document
        facts["Protocol"] = _words(document.protocol, document.challenge, joint=" \u00b7 ")
        facts["Label scheme"] = None if document.label_scheme is None else document.label_scheme.name
        facts["Region of interest"] = tell(document.roi or "")
    failed = sum(case.reason is not None for case in cases)
    if cases:
        facts["Cases"] = f"{len(cases)}" + (f", of which {failed} failed" if failed else "")
    told = [scored.document.intervals for scored in findings.evaluations if scored.document.intervals]
    interval = " with its 95 % interval" if told else ""
    caption = ". ".join([f"Mean over cases{interval}, median below it", *told])
    return section("Summary", "summary", definitions(facts), _headlines(findings, caption))


def state_of_runs(runs: Sequence[Run], tell: Discretion, *, is_live: bool) -> Markup | None:
    """Which trainings still go on or have stopped too early, and what goes on with them.

    Of a live page, which is written again and again, the script says when that has not happened for too long.
    """
    parts = []
    for run in runs:
        go_on = joined(["Go on with the command that began it and --resume: ", element("code", run.resume_command)])
        if is_live:
            parts.append(element("p", "Training. This page is written anew as it goes on and loads itself.", id="live"))
            silent = joined(["No news for ", element("span", id="silent-minutes"), " minutes: it may have stopped. "])
            facts = {"data_written": f"{time.time():.0f}", "data_patience": f"{run.patience_s:.0f}"}
            parts.append(element("p", silent, go_on, id="silent", class_="alarm", hidden=True, **facts))
        elif run.is_running:
            parts.append(element("p", f"{run.name} was still training when this page was written."))
        elif run.is_cut_off:
            reason = run.interruption.get("reason")
            why = ", and nothing tells why" if reason is None else f": {tell(str(reason))}"
            told = f"{run.name} stopped after step {run.step:,}{why}. "
            parts.append(element("p", told, go_on, class_="alarm"))
    return element("div", *parts, class_="state", role="status") if parts else None


def failures_section(cases: Sequence[CaseFacts], tell: Discretion) -> Section | None:
    """The cases that failed, each with its reason."""
    failed = [case for case in cases if case.reason is not None][:MOST_ROWS]
    rows = (element("li", element("strong", case.id), " ", tell(str(case.reason))) for case in failed)
    return section("Failed cases", "failed", element("ul", *rows, class_="failures")) if failed else None


def spread_section(findings: Findings, cases: Sequence[CaseFacts]) -> Section | None:
    """How the scores lie, case by case and region by region."""
    charts = []
    ranked = [metric for metric in headline_metrics(findings) if metric in METRICS and METRICS[metric].is_ranked]
    for metric in ranked[:_SPREADS]:
        values: dict[str, dict[str, float]] = {}
        for case in cases:
            for region, scores in case.regions.items():
                if math.isfinite(scores.get(metric, math.nan)):
                    values.setdefault(region, {})[case.id] = scores[metric]
        if values:
            charts.append(strip_chart(metric_name(metric), values))
    if not charts:
        return None
    told = "Every dot is a case; the box holds the middle half of them, the line is the median."
    return section("Spread over cases", "spread", element("p", told), element("div", *charts, class_="charts"))


def curves_section(runs: Sequence[Run]) -> Section | None:
    """The course of each training: loss, validation, learning rate."""
    parts: list[Markup] = []
    for run in runs:
        panels = {title: curves for title, curves in curves_of(run.rows).items() if curves}
        charts = [line_chart(title.capitalize(), curves, overall="score") for title, curves in panels.items()]
        if charts:
            parts += [element("h3", run.name)] if len(runs) > 1 else []
            parts.append(element("div", *charts, class_="charts"))
    return section("Training", "training", *parts) if parts else None


def reliability_section(findings: Findings) -> Section | None:
    """How far probabilities can be believed, where the evaluation measured it.

    `reliability` of scores.json holds for each region "whole" and, of volumes with something to find, "box": the mean
    probability (`confidence`) and the share of voxels in the region (`frequency`) by bin, and `ece`, `ace`, `brier`.
    """
    tables = {
        (where, region): table
        for scored in findings.evaluations
        for region, parts in scored.document.reliability.items()
        for where, table in parts.items()
        if isinstance(table, dict)
    }
    charts, rows = [], []
    for where, title in _RELIABILITY.items():
        curves = {region: _reliability_points(table) for (part, region), table in tables.items() if part == where}
        charts += [reliability_chart(title, curves)] if any(curves.values()) else []
        for region in curves:
            measures = (number(tables[where, region].get(name)) for name in ("ece", "ace", "brier"))
            rows.append([f"{region}, {title.lower()}", *map(written, measures)])
    if not charts:
        return None
    told = "How many of the voxels that are given a probability belong to the region; on the diagonal the two agree."
    table = plain_table("Calibration errors", ["", "ECE", "ACE", "Brier score"], rows)
    return section("Reliability", "reliability", element("p", told), element("div", *charts, class_="charts"), table)


def settings_section(findings: Findings, tell: Discretion) -> Section | None:
    """The resolved configuration of each run with its comments, and the environments."""
    parts = []
    for run in findings.runs:
        if run.config:
            parts.append(
                element("details", element("summary", f"Configuration of {run.name}"), _yaml(tell(run.config)))
            )
    for name, versions in _environments(findings):
        rows = {key: str(versions[key]) for key in sorted(versions, key=lambda key: (key not in _ENVIRONMENT, key))}
        parts.append(element("details", element("summary", f"Environment of {name}"), definitions(rows)))
    return section("Configuration and environment", "settings", *parts) if parts else None


def notes_section(notes: Iterable[str], tell: Discretion) -> Section | None:
    """What a reader must know besides."""
    items = [element("li", tell(note)) for note in notes]
    return section("Notes", "notes", element("ul", *items)) if items else None


def evaluation_notes(findings: Findings, cases: Sequence[CaseFacts]) -> list[str]:
    """What the evaluation says of cases that are not in the scores, or in them with the worst ones."""
    notes = []
    missing = [case.id for case in cases if case.is_missing]
    if missing:
        notes.append(
            f"Without a usable prediction and given the worst scores ({len(missing)}): {some(missing, _NAMED)}."
        )
    for scored in findings.evaluations:
        for names, told in (
            (scored.document.unscored, "References without a prediction, which are not in these scores"),
            (scored.document.surplus, "Files that belong to no reference"),
        ):
            notes += [f"{told} ({len(names)}): {some(names, _NAMED)}."] if names else []
        notes += scored.document.notes
    return notes


def _card_facts(card: Document, tell: Discretion) -> dict[str, Child]:
    """What a model card says of the network and of what it has learnt from."""
    network, trained = mapping(card, "network"), mapping(card, "training_data")
    return {
        "Task": card.get("task"),
        "Network": _words(network.get("family"), network.get("size")),
        "Input": _words(*_listed(card.get("modalities")), joint=", "),
        "Trained on": tell(_words(trained.get("identity"), _count(trained.get("cases"), "cases"), joint=", ")),
        "Licence of the data": trained.get("licence"),
        "Patch": _words(*_listed(card.get("patch_size")), joint=" \u00d7 "),
        "Spacing (mm)": _words(
            *(f"{number(side) or 0:g}" for side in _listed(card.get("spacing_mm"))), joint=" \u00d7 "
        ),
        "Weights (SHA-256)": str(card.get("sha256") or "")[:16],
    }


def _run_facts(run: Run) -> dict[str, Child]:
    minutes, memory = number(run.validation.get("minutes")), number(run.validation.get("peak_rss_mb"))
    return {
        "Steps": f"{run.step:,}" if run.rows else None,
        "Training took": None if minutes is None else f"{minutes:.1f} minutes",
        "Peak memory of the training": None if memory is None else f"{memory:,.0f} MB",
    }


def _model_facts(model: Document) -> dict[str, Child]:
    return {
        "Network": _words(model.get("family"), model.get("size")),
        "Input": _words(*_listed(model.get("modalities")), joint=", "),
        "Computed by": _words(model.get("backend"), "with mirrored inputs" if model.get("tta") else None, joint=", "),
        "Weights (SHA-256)": _words(*(str(digest)[:16] for digest in _listed(model.get("sha256"))), joint=", "),
    }


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _headlines(findings: Findings, caption: str) -> Markup | None:
    """Region by region the mean (with its confidence interval) and median of the metrics that people compare."""
    found = {region: scores for region, scores in findings.summary().items() if isinstance(scores, dict)}
    wanted = headline_metrics(findings)
    shown = [metric for metric in wanted if any(metric in scores for scores in found.values())][:_MOST_HEADLINES]
    if not shown:
        return None
    rows = [
        [
            joined([swatch(position), region]),
            *(_headline(mapping(scores, metric), digits_of(metric)) for metric in shown),
            _most(scores),
        ]
        for position, (region, scores) in enumerate(found.items())
    ]
    return plain_table(caption, ["region", *(metric_name(metric) for metric in shown), "n"], rows)


def _headline(entry: Document, digits: int) -> Markup:
    mean, median = number(entry.get("mean")), number(entry.get("median"))
    interval = entry.get("ci95")
    if isinstance(interval, list | tuple) and len(interval) == 2 and all(number(end) is not None for end in interval):
        between = element("small", f"{written(interval[0], digits)} \u2013 {written(interval[1], digits)}")
    else:
        between = None
    return joined([element("b", written(mean, digits)), between, element("small", f"median {written(median, digits)}")])


def _most(scores: Document) -> str:
    return str(max((int(number(mapping(scores, metric).get("n")) or 0) for metric in scores), default=0))


def _reliability_points(table: Document) -> list[tuple[float, float]]:
    """(mean probability, observed share) of the bins that hold any voxels."""
    listed = [table.get(key) for key in ("confidence", "frequency")]
    pairs = zip(*(values if isinstance(values, list) else [] for values in listed), strict=False)
    points = [(number(confidence), number(frequency)) for confidence, frequency in pairs]
    return [(x, y) for x, y in points if x is not None and y is not None]


def _environments(findings: Findings) -> list[tuple[str, Mapping[str, Any]]]:
    named = [(run.name, mapping(run.card, "versions")) for run in findings.runs]
    named += [(output.name, mapping(output.manifest, "environment")) for output in findings.outputs]
    return [(name, versions) for name, versions in named if versions]


def _yaml(text: str) -> Markup:
    """Settings as they stand in the file, comments set apart."""
    lines = []
    for line in text.splitlines():
        setting, sign, comment = line.partition("# ")
        lines += [setting, element("span", f"# {comment}", class_="comment") if sign else None, "\n"]
    return element("pre", element("code", *lines), tabindex="0")


def _words(*words: object, joint: str = " ") -> str:
    return joint.join(str(word) for word in words if word not in (None, ""))


def _count(value: object, what: str) -> str | None:
    found = number(value)
    return f"{found:.0f} {what}" if found else None
