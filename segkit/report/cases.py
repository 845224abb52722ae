"""The parts of a page about its cases: failures, spread of scores, table, viewer, pictures, seconds and memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from segkit.errors import some
from segkit.metrics.registry import METRICS
from segkit.report.charts import bars_chart, strip_chart
from segkit.report.curves import number
from segkit.report.html import (
    Child,
    Markup,
    Section,
    asset,
    details,
    digits_of,
    element,
    label_legend,
    metric_name,
    plain_table,
    scrolling,
    section,
    written,
)
from segkit.report.sources import CaseFacts, Document, Findings, PathRedactor, mapping
from segkit.report.viewer import DIFFERENCES, viewer_licence

MOST_ROWS = 1000
"""Cases that a table has at most."""
MEAN_OF_REGIONS = "mean"
MOST_METRICS = 12
_SPREADS = 2
_MOST_BARS = 30
_NAMED = 20
"""Cases that a note names."""
_ABOUT_PLANES = "Planes are those that show most of all structures, with the patient\u2019s right on the left."
_OPEN = 3
"""Cases whose pictures are open at first."""


def failures_section(cases: Sequence[CaseFacts], redact: PathRedactor) -> Section | None:
    """The cases that failed, each with its reason."""
    failed = [case for case in cases if case.reason is not None][:MOST_ROWS]
    rows = (element("li", element("strong", case.id), " ", redact(str(case.reason))) for case in failed)
    return section("Failed cases", "failed", element("ul", *rows, class_="failures")) if failed else None


def spread_section(findings: Findings, cases: Sequence[CaseFacts]) -> Section | None:
    """The distribution of scores over cases, by region."""
    charts = []
    ranked = [metric for metric in findings.headline_metrics() if metric in METRICS and METRICS[metric].is_ranked]
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
    about = "Every dot is a case; the box holds the middle half of them, the line is the median."
    return section("Spread over cases", "spread", element("p", about), element("div", *charts, class_="charts"))


def cases_section(findings: Findings, cases: Sequence[CaseFacts], anchors: Mapping[str, str]) -> Section | None:
    """A row for each case and region, worst first; `anchors` maps case ids to the anchors of their pictures."""
    if not cases:
        return None
    regions = list(dict.fromkeys(region for case in cases for region in case.regions))
    metrics = findings.shown_metrics(cases)[:MOST_METRICS]
    has_times = any(number(mapping(case.record, "seconds").get("predict")) is not None for case in cases)
    views = [MEAN_OF_REGIONS, *regions] if len(regions) > 1 else regions or [MEAN_OF_REGIONS]
    columns = [("case", False), ("region", False), *((metric_name(metric), True) for metric in metrics)]
    columns += [("seconds", True), ("peak MB", True)] if has_times else []
    head = element("tr", *(_heading(name, is_number) for name, is_number in columns))
    rows = [
        _row(case, view, metrics, anchors.get(case.id), has_times=has_times, is_hidden=view != views[0])
        for case in cases[:MOST_ROWS]
        for view in views
    ]
    table = element(
        "table",
        element("caption", "Scores of each case; the headings sort", class_="hidden"),
        element("thead", head),
        element("tbody", *rows),
        class_="numbers sortable",
        id="case-table",
    )
    return section("Cases", "cases", _filters(views), scrolling(table, "Scores of each case"))


def pictures_section(
    cases: Sequence[CaseFacts],
    pictures: Mapping[str, Markup],
    anchors: Mapping[str, str],
    key: Markup,
    viewable: Mapping[str, str],
    *,
    has_planes: bool,
) -> Section | None:
    """The stills of each case, worst first, and a button for those in the viewer (`viewable`: case id -> key)."""
    shown = [case for case in cases if case.id in pictures]
    if not shown:
        return None
    cards = []
    for position, case in enumerate(shown):
        dice = {region: scores["dice"] for region, scores in case.regions.items() if "dice" in scores}
        scores = [element("span", f"{region} {value:.3f}", class_="score") for region, value in dice.items()]
        brief = element("span", *(scores if case.reason is None else ["failed"]), class_="muted")
        heading = element("summary", element("strong", case.id), " ", brief)
        button = None
        if case.id in viewable:
            name = viewable[case.id]
            button = element("button", "Open in the viewer", type="button", data_view=name, class_="needs-viewer")
        card = element(
            "details", heading, pictures[case.id], button, id=anchors[case.id], class_="card", open=position < _OPEN
        )
        cards.append(card)
    about = "A white line over the prediction is the border of the reference."
    if has_planes:
        about = f"{_ABOUT_PLANES} {about}"
    return section("Pictures", "pictures", element("p", about), key, element("div", *cards, class_="cards"))


def viewer_section(viewable: Mapping[str, str], key: Markup, drawn: int, *, are_scored: bool) -> Section | None:
    """The viewer of the cases with volumes (case id -> key); `drawn` is the number of cases with pictures."""
    if not viewable:
        return None
    choices = (element("option", case_id, value=name) for case_id, name in viewable.items())
    picker = element("label", "Case ", element("select", *choices, id="viewer-case"))
    which = "all" if len(viewable) >= drawn else "the worst" if are_scored else "the first"
    shown = f"Here are {which} {len(viewable)} cases" if len(viewable) > 1 else "The case"
    about = element("p", f"{shown}, cropped to what matters, with the intensities of the scan.")
    keys = [key, label_legend(DIFFERENCES.values(), "difference:")]
    terms = details("Licence of NiiVue, the viewer", element("pre", viewer_licence()))
    filters = element("div", picker, class_="filters")
    return section("Viewer", "viewer", about, filters, asset("viewer.html"), *keys, terms)


def _heading(name: str, is_number: bool) -> Markup:
    """A heading that sorts; the rows are sorted by Dice at first."""
    order = "ascending" if name == metric_name("dice") else "none"
    kind = "number" if is_number else "text"
    return element("th", element("button", name, type="button"), scope="col", aria_sort=order, data_kind=kind)


def _filters(views: Sequence[str]) -> Markup:
    search = element("input", type="search", id="case-search", autocomplete="off", spellcheck="false")
    choices = (element("option", view, value=view) for view in views)
    parts: list[Child] = [element("label", "Find ", search)]
    if len(views) > 1:
        parts.append(element("label", "Region ", element("select", *choices, id="case-region")))
    parts.append(element("output", id="case-count", for_="case-search", class_="muted"))
    return element("div", *parts, class_="filters")


def _row(
    case: CaseFacts, view: str, metrics: Sequence[str], anchor: str | None, *, has_times: bool, is_hidden: bool
) -> Markup:
    name = element("a", case.id, href=f"#{anchor}") if anchor else case.id
    state = "failed" if case.reason is not None else "no prediction" if case.is_missing else None
    cells: list[Child] = [
        element("th", name, element("span", state, class_="badge") if state else None, scope="row"),
        element("td", view, class_="text"),
    ]
    for metric in metrics:
        found = [scores[metric] for scores in case.regions.values() if metric in scores]
        value = case.regions.get(view, {}).get(metric)
        if view == MEAN_OF_REGIONS and found:
            value = statistics.fmean(found)
        cells.append(_number_cell(value, digits_of(metric)))
    if has_times:
        seconds = [number(value) or 0.0 for value in mapping(case.record, "seconds").values()]
        cells.append(_number_cell(sum(seconds) or None, 2))
        cells.append(_number_cell(number(case.record.get("peak_rss_mb")) or None, 0))
    return element("tr", *cells, data_region=view, hidden=is_hidden)


def _number_cell(value: float | None, digits: int) -> Markup:
    """A cell with the value by which it is sorted, as JavaScript reads it."""
    sorted_by = None if value is None else f"{value:.6g}" if math.isfinite(value) else "Infinity"
    return element("td", written(value, digits), data_value=sorted_by)


def timing_section(findings: Findings) -> Section | None:
    """Seconds by stage and memory of each case, as expected and as measured."""
    records = [record for output in findings.outputs for record in output.records]
    timed = [record for record in records if sum(_seconds(record).values()) > 0]
    if not timed:
        return None
    stages = list(dict.fromkeys(stage for record in timed for stage in _seconds(record)))
    longest = sorted(timed, key=lambda record: -sum(_seconds(record).values()))[:_MOST_BARS]
    rows = {str(record["case"]): [_seconds(record).get(stage, 0.0) for stage in stages] for record in longest}
    title = "Seconds by stage" + (f", the {_MOST_BARS} longest cases" if len(timed) > _MOST_BARS else "")
    table = plain_table(
        "Seconds and memory of each case",
        ["case", *stages, "total s", "expected s", "peak MB", "expected MB"],
        (_timing_row(record, stages) for record in timed[:MOST_ROWS]),
    )
    every = details(f"All {len(timed)} cases", table)
    return section("Time and memory", "time", _forecasts(timed), bars_chart(title, stages, rows), every)


def _forecasts(records: Sequence[Document]) -> Markup | None:
    """Measured divided by expected, over all cases."""
    found = []
    for what, name in (("seconds", "time"), ("peak_rss_mb", "memory")):
        measured = [_total(record) if name == "time" else number(record.get(what)) for record in records]
        expected = [number(mapping(record, "predicted").get(what)) for record in records]
        ratios = [own / forecast for own, forecast in zip(measured, expected, strict=True) if own and forecast]
        if ratios:
            range_ = f"(from {min(ratios):.2f} to {max(ratios):.2f})"
            found.append(f"{name} {statistics.median(ratios):.2f} of what was expected {range_}")
    return element("p", f"Measured, in the median over cases: {'; '.join(found)}.") if found else None


def _timing_row(record: Document, stages: Sequence[str]) -> list[Child]:
    seconds, predicted = _seconds(record), mapping(record, "predicted")
    times = [seconds.get(stage, 0.0) for stage in stages] + [_total(record)]
    memory = [number(record.get("peak_rss_mb")), number(predicted.get("peak_rss_mb"))]
    return [
        str(record["case"]),
        *(written(value, 2) for value in [*times, number(predicted.get("seconds"))]),
        *(written(value or None, 0) for value in memory),
    ]


def _seconds(record: Document) -> dict[str, float]:
    found = {str(stage): number(value) for stage, value in mapping(record, "seconds").items()}
    return {stage: max(value, 0.0) for stage, value in found.items() if value is not None}


def _total(record: Document) -> float:
    return sum(_seconds(record).values())


def evaluation_notes(findings: Findings, cases: Sequence[CaseFacts]) -> list[str]:
    """Cases that are not in the scores, or in them with the worst ones, and the notes of the evaluations."""
    notes = []
    missing = [case.id for case in cases if case.is_missing]
    if missing:
        notes.append(
            f"Without a usable prediction and given the worst scores ({len(missing)}): {some(missing, _NAMED)}."
        )
    for scored in findings.evaluations:
        for names, what in (
            (scored.document.unscored, "References without a prediction, which are not in these scores"),
            (scored.document.surplus, "Files that belong to no reference"),
        ):
            notes += [f"{what} ({len(names)}): {some(names, _NAMED)}."] if names else []
        notes += scored.document.notes
    return notes


def table_notes(findings: Findings, cases: Sequence[CaseFacts]) -> list[str]:
    """Scores that the table does not show."""
    notes = []
    if len(cases) > MOST_ROWS:
        notes.append(f"Tables have the first {MOST_ROWS} of {len(cases)} cases, the worst of them.")
    more = findings.shown_metrics(cases)[MOST_METRICS:]
    if more:
        names = ", ".join(map(metric_name, more))
        notes.append(f"Metrics that are in scores.csv and not in the table: {names}.")
    return notes
