"""What the cases of a page took: seconds by stage and memory, as expected and as measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from segkit.report.page.charts import bars_chart
from segkit.report.page.html import Child, Markup, element, plain_table
from segkit.report.page.sources import Document, Findings, mapping, number, records_of
from segkit.report.page.terms import MOST_ROWS, Section, section, written

_MOST_BARS = 30


def timing_section(findings: Findings) -> Section | None:
    """Seconds by stage and memory of each case, as expected and as measured."""
    records = [record for output in findings.outputs for record in records_of(output.manifest)]
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
    details = element("details", element("summary", f"All {len(timed)} cases"), table)
    return section("Time and memory", "time", _forecasts(timed), bars_chart(title, stages, rows), details)


def _forecasts(records: Sequence[Document]) -> Markup | None:
    """How what was expected compares with what was measured, over all cases."""
    told = []
    for what, name in (("seconds", "time"), ("peak_rss_mb", "memory")):
        pairs = [(number(mapping(record, "predicted").get(what)), _measured(record, what)) for record in records]
        ratios = [measured / expected for expected, measured in pairs if expected and measured]
        if ratios:
            range_ = f"(from {min(ratios):.2f} to {max(ratios):.2f})"
            told.append(f"{name} {statistics.median(ratios):.2f} of what was expected {range_}")
    return element("p", f"Measured, in the median over cases: {'; '.join(told)}.") if told else None


def _measured(record: Document, what: str) -> float | None:
    return _total(record) if what == "seconds" else number(record.get(what))


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
