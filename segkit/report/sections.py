"""The sections of the page: each is plain data for the macro of its key in `assets/sections.html`, or None if empty."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from segkit.errors import some
from segkit.metrics.registry import METRICS
from segkit.report import charts
from segkit.report.images import COLOURS
from segkit.report.pictures import DIFFERENCES, embedded_figure, viewer_licence
from segkit.report.sources import CaseFacts, Document, Findings, PathRedactor, Run, mapping, number
from segkit.report.templates import colour_class, digits_of, metric_name, written

MOST_ROWS = 1000
MOST_METRICS = 12
_MEAN_OF_REGIONS = "mean"
_MOST_HEADLINES = 7
_MOST_FIGURES = 6
_SPREADS = 2
_MOST_BARS = 30
_NAMED = 20
"""Cases that a note names."""
_OPEN = 3
"""Cases whose pictures are open at first."""
_RELIABILITY = {"whole": "All voxels", "box": "Around the reference"}
_ENVIRONMENT = ("python", "platform", "cores")


class Section(NamedTuple):
    """A part of the page: its key (the macro and the anchor), its heading and its data."""

    key: str
    title: str
    content: Mapping[str, Any]


def summary_section(findings: Findings, cases: Sequence[CaseFacts], redact: PathRedactor) -> Section:
    """Model, data and protocol, and a table of means and medians by region."""
    facts = _facts(findings, redact)
    failed = sum(case.reason is not None for case in cases)
    if cases:
        facts["Cases"] = f"{len(cases)}" + (f", of which {failed} failed" if failed else "")
    intervals = [scored.document.intervals for scored in findings.evaluations if scored.document.intervals]
    caption = f"Mean over cases{' with its 95 % interval' if intervals else ''}, median below it"
    scores = {region: metrics for region, metrics in findings.summary().items() if isinstance(metrics, dict)}
    wanted = findings.headline_metrics()
    shown = [metric for metric in wanted if any(metric in metrics for metrics in scores.values())][:_MOST_HEADLINES]
    rows = [
        {
            "region": region,
            "colour": colour_class(position),
            "cells": [_headline(mapping(metrics, metric), digits_of(metric)) for metric in shown],
            "count": max((int(number(mapping(metrics, metric).get("n")) or 0) for metric in metrics), default=0),
        }
        for position, (region, metrics) in enumerate(scores.items())
    ]
    columns = ["region", *map(metric_name, shown), "n"]
    table = {"caption": ". ".join([caption, *intervals]), "columns": columns, "rows": rows if shown else ()}
    return Section("summary", "Summary", {"facts": _known(facts), **table})


def _facts(findings: Findings, redact: PathRedactor) -> dict[str, object]:
    facts: dict[str, object] = {}
    if findings.runs:  # the folds of a cross-validation have all but their names in common
        run = next((run for run in findings.runs if run.card), findings.runs[0])
        minutes, memory = number(run.validation.get("minutes")), number(run.validation.get("peak_rss_mb"))
        facts |= {"Run": ", ".join(run.name for run in findings.runs)} | _card_facts(run.card, redact)
        facts["Steps"] = f"{run.step:,}" if run.rows else None
        facts["Training took"] = None if minutes is None else f"{minutes:.1f} minutes"
        facts["Peak memory of the training"] = None if memory is None else f"{memory:,.0f} MB"
    for output in findings.outputs:
        name, model = output.model_name, mapping(output.manifest, "model")
        facts |= {} if name in {run.name for run in findings.runs} else {"Model": name}
        facts |= _card_facts(output.card, redact) if output.card else {}
        facts["Network"] = _listed([model.get("family"), model.get("size")], " ")
        facts["Input"] = _listed(model.get("modalities"))
        facts["Computed by"] = _listed([model.get("backend"), "with mirrored inputs" if model.get("tta") else None])
        facts["Weights (SHA-256)"] = _listed(model.get("sha256"), write=lambda digest: str(digest)[:16])
    for document in (scored.document for scored in findings.evaluations):
        facts["Protocol"] = _listed([document.protocol, document.challenge], " \u00b7 ")
        facts["Label scheme"] = None if document.label_scheme is None else document.label_scheme.name
        facts["Region of interest"] = redact(document.roi or "")
    return facts


def _card_facts(card: Document, redact: PathRedactor) -> dict[str, object]:
    """The network of a model card and its training data."""
    network, trained = mapping(card, "network"), mapping(card, "training_data")
    count = number(trained.get("cases"))
    return {
        "Task": card.get("task"),
        "Network": _listed([network.get("family"), network.get("size")], " "),
        "Input": _listed(card.get("modalities")),
        "Trained on": redact(_listed([trained.get("identity"), f"{count:.0f} cases" if count else None])),
        "Licence of the data": trained.get("licence"),
        "Patch": _listed(card.get("patch_size"), " \u00d7 "),
        "Spacing (mm)": _listed(card.get("spacing_mm"), " \u00d7 ", lambda side: f"{number(side) or 0:g}"),
        "Weights (SHA-256)": str(card.get("sha256") or "")[:16],
    }


def _listed(values: object, joint: str = ", ", write: Callable[[object], str] = str) -> str:
    """The known values of a list; empty for anything else."""
    return joint.join(write(value) for value in values if value not in (None, "")) if isinstance(values, list) else ""


def _known(facts: Mapping[str, object]) -> dict[str, object]:
    return {term: fact for term, fact in facts.items() if fact not in (None, "")}


def _headline(entry: Document, digits: int) -> dict[str, str | None]:
    interval = entry.get("ci95")
    between = None
    if isinstance(interval, list | tuple) and len(interval) == 2 and all(number(end) is not None for end in interval):
        between = f"{written(interval[0], digits)} \u2013 {written(interval[1], digits)}"
    mean, median = (written(number(entry.get(name)), digits) for name in ("mean", "median"))
    return {"mean": mean, "interval": between, "median": median}


def state_of_runs(runs: Sequence[Run], redact: PathRedactor, *, is_live: bool) -> list[dict[str, str]]:
    """Runs in progress or stopped early, with the command that resumes them.

    A live page is updated again and again; its script warns if that has not happened for too long.
    """
    states = []
    for run in runs:
        common = {"name": run.name, "resume_command": run.resume_command}
        if is_live:
            times = {"written": f"{time.time():.0f}", "patience": f"{run.patience_s:.0f}"}
            states.append({"kind": "live", **common, **times})
        elif run.is_running:
            states.append({"kind": "running", **common})
        elif run.is_cut_off:
            reason = run.interruption.get("reason")
            why = " for an unknown reason" if reason is None else f": {redact(str(reason))}"
            states.append({"kind": "stopped", **common, "step": f"{run.step:,}", "reason": why})
    return states


def failures_section(cases: Sequence[CaseFacts], redact: PathRedactor) -> Section | None:
    """The cases that failed, each with its reason."""
    reasons = [(case.id, redact(case.reason)) for case in cases if case.reason is not None][:MOST_ROWS]
    return Section("failed", "Failed cases", {"reasons": reasons}) if reasons else None


def training_section(runs: Sequence[Run]) -> Section | None:
    """Loss, validation scores and learning rate of each training."""
    drawn = []
    for run in runs:
        panels = charts.training_curves(run.rows).items()
        own = [charts.line_chart(title.capitalize(), curves, overall="score") for title, curves in panels]
        drawn += [(run.name, own)] if own else []
    return Section("training", "Training", {"has_names": len(runs) > 1, "runs": drawn}) if drawn else None


def spread_section(findings: Findings, cases: Sequence[CaseFacts]) -> Section | None:
    """The distribution of scores over cases, by region."""
    drawn = []
    ranked = [metric for metric in findings.headline_metrics() if metric in METRICS and METRICS[metric].is_ranked]
    for metric in ranked[:_SPREADS]:
        values: dict[str, dict[str, float]] = {}
        for case in cases:
            for region, scores in case.regions.items():
                if math.isfinite(scores.get(metric, math.nan)):
                    values.setdefault(region, {})[case.id] = scores[metric]
        drawn += [charts.strip_chart(metric_name(metric), values)] if values else []
    return Section("spread", "Spread over cases", {"charts": drawn}) if drawn else None


def cases_section(findings: Findings, cases: Sequence[CaseFacts], anchors: Mapping[str, str]) -> Section | None:
    """A row for each case and region, worst first; `anchors` maps case ids to the anchors of their pictures."""
    if not cases:
        return None
    regions = list(dict.fromkeys(region for case in cases for region in case.regions))
    metrics = findings.shown_metrics(cases)[:MOST_METRICS]
    has_times = any("predict" in _seconds(case.record) for case in cases)
    views = [_MEAN_OF_REGIONS, *regions] if len(regions) > 1 else regions or [_MEAN_OF_REGIONS]
    names = [*map(metric_name, metrics), *(("seconds", "peak MB") if has_times else ())]
    rows = []
    for case in cases[:MOST_ROWS]:
        common = {
            "name": case.id,
            "anchor": anchors.get(case.id),
            "state": "failed" if case.reason is not None else "no prediction" if case.is_missing else None,
        }
        seconds, memory = sum(_seconds(case.record).values()), number(case.record.get("peak_rss_mb"))
        times = [_cell(seconds or None, 2), _cell(memory or None, 0)] if has_times else []
        for view in views:
            scores = [_cell(_score(case, view, metric), digits_of(metric)) for metric in metrics]
            rows.append({**common, "view": view, "is_hidden": view != views[0], "cells": scores + times})
    content = {"views": views, "columns": ["case", "region", *names], "sorted_by": metric_name("dice"), "rows": rows}
    return Section("cases", "Cases", content)


def _score(case: CaseFacts, view: str, metric: str) -> float | None:
    """The score of a region, or the mean over regions."""
    found = [scores[metric] for scores in case.regions.values() if metric in scores]
    if view == _MEAN_OF_REGIONS and found:
        return statistics.fmean(found)
    return case.regions.get(view, {}).get(metric)


def _cell(value: float | None, digits: int) -> tuple[str, str | None]:
    """A number as text, and as JavaScript reads it to sort by."""
    order = None if value is None else f"{value:.6g}" if math.isfinite(value) else "Infinity"
    return written(value, digits), order


def viewer_section(
    viewable: Mapping[str, str], labels: Iterable[tuple[str, str]], pictures: int, *, are_scored: bool
) -> Section | None:
    """The viewer of the cases with volumes (case id -> key); `pictures` is the number of cases with pictures."""
    if not viewable:
        return None
    which = "all" if len(viewable) >= pictures else "the worst" if are_scored else "the first"
    legends = {"labels": _legend(labels), "differences": _legend(DIFFERENCES.values())}
    content = {"which": which, "choices": list(viewable.items()), "licence": viewer_licence() or "", **legends}
    return Section("viewer", "Viewer", content)


def pictures_section(
    cases: Sequence[CaseFacts],
    pictures: Mapping[str, Markup],
    anchors: Mapping[str, str],
    labels: Iterable[tuple[str, str]],
    viewable: Mapping[str, str],
    *,
    has_planes: bool,
) -> Section | None:
    """The stills of each case, worst first, and a button for those in the viewer (`viewable`: case id -> key)."""
    cards = [
        {
            "name": case.id,
            "anchor": anchors[case.id],
            "is_open": position < _OPEN,
            "has_failed": case.reason is not None,
            "scores": [f"{name} {scores['dice']:.3f}" for name, scores in case.regions.items() if "dice" in scores],
            "picture": pictures[case.id],
            "view": viewable.get(case.id),
        }
        for position, case in enumerate(case for case in cases if case.id in pictures)
    ]
    content = {"has_planes": has_planes, "labels": _legend(labels), "cards": cards}
    return Section("pictures", "Pictures", content) if cards else None


def _legend(labels: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Names and colours -> names and the classes of the colours."""
    return [(name, colour_class(COLOURS.index(colour))) for name, colour in dict(labels).items()]


def figures_section(findings: Findings) -> Section | None:
    """The pictures in the folder of a training, other than its curves."""
    figures = []
    for run in findings.runs:
        paths = [path for path in sorted((run.folder / "figures").glob("*.png")) if path.stem != "curves"]
        for path in paths[:_MOST_FIGURES]:
            try:
                picture = embedded_figure(path)
            except (OSError, ValueError):  # the training may be writing it
                continue
            texts = {"title": path.stem.replace("_", " "), "alternative": f"{run.name}: {path.stem}"}
            figures.append(picture | texts)
    return Section("figures", "Figures", {"figures": figures}) if figures else None


def timing_section(findings: Findings) -> Section | None:
    """Seconds by stage and memory of each case, as expected and as measured."""
    records = [record for output in findings.outputs for record in output.records]
    timed = [(record, seconds) for record in records if sum((seconds := _seconds(record)).values()) > 0]
    if not timed:
        return None
    stages = list(dict.fromkeys(stage for _, seconds in timed for stage in seconds))
    longest = sorted(timed, key=lambda entry: -sum(entry[1].values()))[:_MOST_BARS]
    bars = {str(record["case"]): [seconds.get(stage, 0.0) for stage in stages] for record, seconds in longest}
    title = "Seconds by stage" + (f", the {_MOST_BARS} longest cases" if len(timed) > _MOST_BARS else "")
    rows = []
    for record, seconds in timed[:MOST_ROWS]:
        expected = mapping(record, "predicted")
        times = [*(seconds.get(stage, 0.0) for stage in stages), sum(seconds.values())]
        memory = [number(record.get("peak_rss_mb")), number(expected.get("peak_rss_mb"))]
        cells = [written(value, 2) for value in [*times, number(expected.get("seconds"))]]
        rows.append([str(record["case"]), *cells, *(written(value or None, 0) for value in memory)])
    columns = ["case", *stages, "total s", "expected s", "peak MB", "expected MB"]
    table = {"count": len(timed), "columns": columns, "rows": rows}
    chart = charts.bars_chart(title, stages, bars)
    return Section("time", "Time and memory", {"forecasts": _forecasts(timed), "chart": chart, **table})


def _seconds(record: Document) -> dict[str, float]:
    found = {str(stage): number(value) for stage, value in mapping(record, "seconds").items()}
    return {stage: max(value, 0.0) for stage, value in found.items() if value is not None}


def _forecasts(timed: Sequence[tuple[Document, Mapping[str, float]]]) -> str:
    """Measured divided by expected, over all cases."""
    found = []
    for key, name in (("seconds", "time"), ("peak_rss_mb", "memory")):
        ratios = []
        for record, seconds in timed:
            measured = sum(seconds.values()) if key == "seconds" else number(record.get(key))
            expected = number(mapping(record, "predicted").get(key))
            ratios += [measured / expected] if measured and expected else []
        if ratios:
            range_ = f"(from {min(ratios):.2f} to {max(ratios):.2f})"
            found.append(f"{name} {statistics.median(ratios):.2f} of what was expected {range_}")
    return "; ".join(found)


def reliability_section(findings: Findings) -> Section | None:
    """Calibration of probabilities, where the evaluation measured it; see `reliability_tables` for the tables."""
    found = [entry for scored in findings.evaluations for entry in scored.document.reliability.items()]
    tables = {(where, region): mapping(parts, where) for region, parts in found for where in parts}
    drawn, rows = [], []
    for where, title in _RELIABILITY.items():
        curves = {region: charts.calibration_points(table) for (part, region), table in tables.items() if part == where}
        drawn += [charts.reliability_chart(title, curves)] if any(curves.values()) else []
        for region in curves:
            measures = (number(tables[where, region].get(name)) for name in ("ece", "ace", "brier"))
            rows.append([f"{region}, {title.lower()}", *map(written, measures)])
    return Section("reliability", "Reliability", {"charts": drawn, "rows": rows}) if drawn else None


def settings_section(findings: Findings, redact: PathRedactor) -> Section | None:
    """The resolved configuration of each run with its comments, and the environments."""
    configurations = []
    for run in findings.runs:
        parts = (line.partition("# ") for line in redact(run.config).splitlines())
        lines = [(setting, comment if sign else None) for setting, sign, comment in parts]
        configurations += [(run.name, lines)] if run.config else []
    environments = []
    documents = [(run.name, mapping(run.card, "versions")) for run in findings.runs]
    documents += [(output.name, mapping(output.manifest, "environment")) for output in findings.outputs]
    for name, versions in documents:
        order = sorted(versions, key=lambda key: (key not in _ENVIRONMENT, key))
        environments += [(name, _known({key: str(versions[key]) for key in order}))] if versions else []
    content = {"configurations": configurations, "environments": environments}
    return Section("settings", "Configuration and environment", content) if any(content.values()) else None


def evaluation_notes(findings: Findings, cases: Sequence[CaseFacts]) -> list[str]:
    """Cases that are not in the scores, or in them with the worst ones, and the notes of the evaluations."""
    missing = [case.id for case in cases if case.is_missing]
    notes = _naming("Without a usable prediction and given the worst scores", missing)
    for document in (scored.document for scored in findings.evaluations):
        notes += _naming("References without a prediction, which are not in these scores", document.unscored)
        notes += _naming("Files that belong to no reference", document.surplus)
        notes += document.notes
    return notes


def _naming(what: str, names: Sequence[str]) -> list[str]:
    return [f"{what} ({len(names)}): {some(names, _NAMED)}."] if names else []


def table_notes(findings: Findings, cases: Sequence[CaseFacts]) -> list[str]:
    """Scores that the table does not show."""
    rows = f"Tables have the first {MOST_ROWS} of {len(cases)} cases, the worst of them."
    more = ", ".join(map(metric_name, findings.shown_metrics(cases)[MOST_METRICS:]))
    columns = f"Metrics that are in scores.csv and not in the table: {more}."
    return [rows] * (len(cases) > MOST_ROWS) + [columns] * bool(more)
