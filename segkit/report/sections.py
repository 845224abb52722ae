"""The parts of a page about models and trainings, and its notes: each is HTML, or None where it is empty."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from segkit.report.charts import line_chart, reliability_chart
from segkit.report.curves import calibration_points, number, training_curves
from segkit.report.html import (
    Child,
    Markup,
    Section,
    colour_class,
    definitions,
    details,
    digits_of,
    element,
    joined,
    metric_name,
    plain_table,
    section,
    swatch,
    written,
)
from segkit.report.pictures import embedded_figure
from segkit.report.sources import CaseFacts, Document, Findings, PathRedactor, Run, mapping

_MOST_HEADLINES = 7
_MOST_FIGURES = 6
_RELIABILITY = {"whole": "All voxels", "box": "Around the reference"}
_ENVIRONMENT = ("python", "platform", "cores")


def summary_section(findings: Findings, cases: Sequence[CaseFacts], redact: PathRedactor) -> Section:
    """Model, data and protocol, and the scores in one table."""
    facts: dict[str, Child] = {}
    if findings.runs:  # the folds of a cross-validation have all but their names in common
        run = next((run for run in findings.runs if run.card), findings.runs[0])
        facts |= {"Run": ", ".join(run.name for run in findings.runs)} | _card_facts(run.card, redact) | _run_facts(run)
    for output in findings.outputs:
        name = output.model_name
        facts |= {} if name in {run.name for run in findings.runs} else {"Model": name}
        if output.card:
            facts |= _card_facts(output.card, redact)
        facts |= _model_facts(mapping(output.manifest, "model"))
    for scored in findings.evaluations:
        document = scored.document
        facts["Protocol"] = _listed([document.protocol, document.challenge], " \u00b7 ")
        facts["Label scheme"] = None if document.label_scheme is None else document.label_scheme.name
        facts["Region of interest"] = redact(document.roi or "")
    failed = sum(case.reason is not None for case in cases)
    if cases:
        facts["Cases"] = f"{len(cases)}" + (f", of which {failed} failed" if failed else "")
    intervals = [scored.document.intervals for scored in findings.evaluations if scored.document.intervals]
    caption = f"Mean over cases{' with its 95 % interval' if intervals else ''}, median below it"
    caption = ". ".join([caption, *intervals])
    return section("Summary", "summary", definitions(facts), _headlines(findings, caption))


def state_of_runs(runs: Sequence[Run], redact: PathRedactor, *, is_live: bool) -> Markup | None:
    """Trainings that are running or stopped early, and the command that resumes them.

    A live page is written again and again; its script warns when that has not happened for too long.
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
            why = ", and nothing tells why" if reason is None else f": {redact(str(reason))}"
            parts.append(element("p", f"{run.name} stopped after step {run.step:,}{why}. ", go_on, class_="alarm"))
    return element("div", *parts, class_="state", role="status") if parts else None


def curves_section(runs: Sequence[Run]) -> Section | None:
    """Loss, validation scores and learning rate of each training."""
    parts: list[Markup] = []
    for run in runs:
        panels = training_curves(run.rows).items()
        charts = [line_chart(title.capitalize(), curves, overall="score") for title, curves in panels]
        if charts:
            parts += [element("h3", run.name)] if len(runs) > 1 else []
            parts.append(element("div", *charts, class_="charts"))
    return section("Training", "training", *parts) if parts else None


def figures_section(findings: Findings) -> Section | None:
    """The pictures in the folder of a training, other than its curves."""
    figures = []
    for run in findings.runs:
        paths = [path for path in sorted((run.folder / "figures").glob("*.png")) if path.stem != "curves"]
        for path in paths[:_MOST_FIGURES]:
            try:
                picture = embedded_figure(path, f"{run.name}: {path.stem}")
            except (OSError, ValueError):  # the training may be writing it
                continue
            figures.append(element("figure", element("figcaption", path.stem.replace("_", " ")), picture))
    return section("Figures", "figures", element("div", *figures, class_="figures")) if figures else None


def reliability_section(findings: Findings) -> Section | None:
    """Calibration of probabilities, where the evaluation measured it; see `reliability_tables` for the tables."""
    tables = {
        (where, region): table
        for scored in findings.evaluations
        for region, parts in scored.document.reliability.items()
        for where, table in parts.items()
        if isinstance(table, dict)
    }
    charts, rows = [], []
    for where, title in _RELIABILITY.items():
        curves = {region: calibration_points(table) for (part, region), table in tables.items() if part == where}
        charts += [reliability_chart(title, curves)] if any(curves.values()) else []
        for region in curves:
            measures = (number(tables[where, region].get(name)) for name in ("ece", "ace", "brier"))
            rows.append([f"{region}, {title.lower()}", *map(written, measures)])
    if not charts:
        return None
    about = "How many of the voxels that are given a probability belong to the region; on the diagonal the two agree."
    table = plain_table("Calibration errors", ["", "ECE", "ACE", "Brier score"], rows)
    return section("Reliability", "reliability", element("p", about), element("div", *charts, class_="charts"), table)


def settings_section(findings: Findings, redact: PathRedactor) -> Section | None:
    """The resolved configuration of each run with its comments, and the environments."""
    parts = [details(f"Configuration of {run.name}", _yaml(redact(run.config))) for run in findings.runs if run.config]
    environments = [(run.name, mapping(run.card, "versions")) for run in findings.runs]
    environments += [(output.name, mapping(output.manifest, "environment")) for output in findings.outputs]
    for name, versions in environments:
        rows = {key: str(versions[key]) for key in sorted(versions, key=lambda key: (key not in _ENVIRONMENT, key))}
        parts += [details(f"Environment of {name}", definitions(rows))] if rows else []
    return section("Configuration and environment", "settings", *parts) if parts else None


def notes_section(notes: Iterable[str], redact: PathRedactor) -> Section | None:
    """What a reader must know."""
    items = [element("li", redact(note)) for note in notes]
    return section("Notes", "notes", element("ul", *items)) if items else None


def _card_facts(card: Document, redact: PathRedactor) -> dict[str, Child]:
    """The network of a model card and its training data."""
    network, trained = mapping(card, "network"), mapping(card, "training_data")
    count, spacing_mm = number(trained.get("cases")), card.get("spacing_mm")
    trained_on = [trained.get("identity"), f"{count:.0f} cases" if count else None]
    return {
        "Task": card.get("task"),
        "Network": _listed([network.get("family"), network.get("size")], " "),
        "Input": _listed(card.get("modalities")),
        "Trained on": redact(_listed(trained_on)),
        "Licence of the data": trained.get("licence"),
        "Patch": _listed(card.get("patch_size"), " \u00d7 "),
        "Spacing (mm)": _listed(spacing_mm, " \u00d7 ", lambda side: f"{number(side) or 0:g}"),
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
        "Network": _listed([model.get("family"), model.get("size")], " "),
        "Input": _listed(model.get("modalities")),
        "Computed by": _listed([model.get("backend"), "with mirrored inputs" if model.get("tta") else None]),
        "Weights (SHA-256)": _listed(model.get("sha256"), write=lambda digest: str(digest)[:16]),
    }


def _listed(values: object, joint: str = ", ", write: Callable[[object], str] = str) -> str:
    """The known values of a list; empty for anything else."""
    return joint.join(write(value) for value in values if value not in (None, "")) if isinstance(values, list) else ""


def _headlines(findings: Findings, caption: str) -> Markup | None:
    """Mean (with its confidence interval) and median of the headline metrics, by region."""
    found = {region: scores for region, scores in findings.summary().items() if isinstance(scores, dict)}
    wanted = findings.headline_metrics()
    shown = [metric for metric in wanted if any(metric in scores for scores in found.values())][:_MOST_HEADLINES]
    rows: list[list[Child]] = []
    for position, (region, scores) in enumerate(found.items()):
        count = max((int(number(mapping(scores, metric).get("n")) or 0) for metric in scores), default=0)
        cells = (_headline(mapping(scores, metric), digits_of(metric)) for metric in shown)
        rows.append([joined([swatch(colour_class(position)), region]), *cells, str(count)])
    return plain_table(caption, ["region", *map(metric_name, shown), "n"], rows) if shown else None


def _headline(entry: Document, digits: int) -> Markup:
    mean, median = number(entry.get("mean")), number(entry.get("median"))
    interval = entry.get("ci95")
    between = None
    if isinstance(interval, list | tuple) and len(interval) == 2 and all(number(end) is not None for end in interval):
        between = element("small", f"{written(interval[0], digits)} \u2013 {written(interval[1], digits)}")
    return joined([element("b", written(mean, digits)), between, element("small", f"median {written(median, digits)}")])


def _yaml(text: str) -> Markup:
    """The text of a configuration with its comments marked."""
    lines = []
    for line in text.splitlines():
        setting, sign, comment = line.partition("# ")
        lines += [setting, element("span", f"# {comment}", class_="comment") if sign else None, "\n"]
    return element("pre", element("code", *lines), tabindex="0")
