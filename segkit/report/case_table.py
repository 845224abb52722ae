"""The table of all cases, which sorts and filters, and the pictures of each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from segkit.report.html import Child, Markup, element, joined
from segkit.report.sources import CaseFacts, Findings, mapping, number
from segkit.report.terms import MOST_ROWS, Section, digits_of, metric_name, section, shown_metrics, written

MEAN_OF_REGIONS = "mean"
MOST_METRICS = 12
_ABOUT_PLANES = "Planes are those that show most of all structures, with the patient\u2019s right on the left."
_OPEN = 3
"""Cases whose pictures are open when the page is."""


def cases_section(findings: Findings, cases: Sequence[CaseFacts], anchors: Mapping[str, str]) -> Section | None:
    """A row for each case and region, worst first; `anchors` leads to the pictures of a case."""
    if not cases:
        return None
    regions = list(dict.fromkeys(region for case in cases for region in case.regions))
    metrics = shown_metrics(findings, cases)[:MOST_METRICS]
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
    scroll = element("div", table, class_="scroll", tabindex="0", role="region", aria_label="Scores of each case")
    return section("Cases", "cases", _filters(views), scroll)


def pictures_section(
    cases: Sequence[CaseFacts],
    pictures: Mapping[str, Markup],
    anchors: Mapping[str, str],
    key: Markup,
    viewable: Mapping[str, str],
    *,
    has_planes: bool,
) -> Section | None:
    """The stills of each case, worst first, and a button for those that the viewer has (case id -> key)."""
    shown = [case for case in cases if case.id in pictures]
    if not shown:
        return None
    cards = [
        element(
            "details",
            element("summary", element("strong", case.id), " ", element("span", _short_scores(case), class_="muted")),
            pictures[case.id],
            element("button", "Open in the viewer", type="button", data_view=viewable[case.id], class_="needs-viewer")
            if case.id in viewable
            else None,
            id=anchors[case.id],
            class_="card",
            open=position < _OPEN,
        )
        for position, case in enumerate(shown)
    ]
    about = "A white line over the prediction is the border of the reference."
    if has_planes:
        about = f"{_ABOUT_PLANES} {about}"
    return section("Pictures", "pictures", element("p", about), key, element("div", *cards, class_="cards"))


def _heading(name: str, is_number: bool) -> Markup:
    """A heading that sorts; the rows come ordered by Dice."""
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


def _short_scores(case: CaseFacts) -> Markup:
    """The Dice of each region, none of which is broken across lines."""
    if case.reason is not None:
        return joined(["failed"])
    dice = {region: scores["dice"] for region, scores in case.regions.items() if "dice" in scores}
    return joined(element("span", f"{region} {value:.3f}", class_="score") for region, value in dice.items())
