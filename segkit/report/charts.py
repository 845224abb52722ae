"""Charts as inline SVG: curves of a training, spread of scores over cases, reliability, seconds by stage.

The functions compute places in the coordinates of the SVG; `assets/chart.html` draws them. `figures` draws the same
points of curves as PNG.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from segkit.report.sources import number
from segkit.report.templates import colour_class, render

Points = Sequence[tuple[float, float]]

FEW_POINTS = 30
"""A curve with fewer points has a marker at each."""

_MOST_BUCKETS = 200
_LOSS, _VALIDATION, _RATE = "loss", "validation", "learning rate"
_PANEL_OF = {"dice": _VALIDATION, "measures": _VALIDATION, "score": _VALIDATION, "lr": _RATE}
_WIDTH, _HEIGHT = 420.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 12.0, 30.0
_SIDE = 260.0
"""Width and height of the square of a reliability diagram."""
_STRIP, _BAR = 44.0, 20.0
"""Heights of the rows of strip and bar charts."""
_GOLDEN = 0.618
"""Spreads dots across their row so that neighbours in order do not lie on each other."""
_FAR = 3.0
"""A case further beyond the box than this multiple of its length is an outlier."""


def training_curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Panel -> curve name -> points (step, value), without empty panels.

    `rows` are the lines of `metrics.jsonl`: `step`, and any of: keys with `loss` in their name, `dice` and `measures`
    (name -> value, or one value), `score` and `lr`. Missing and undefined values are left out.
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {_LOSS: {}, _VALIDATION: {}, _RATE: {}}
    for position, row in enumerate(rows):
        for key, entry in row.items():
            panel = _PANEL_OF.get(key, _LOSS if "loss" in key else None)
            if panel is None:
                continue
            for name, value in (entry if isinstance(entry, Mapping) else {key: entry}).items():
                if value is not None and math.isfinite(value):
                    panels[panel].setdefault(name, []).append((row.get("step", position), value))
    return {panel: curves for panel, curves in panels.items() if curves}


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most 601 points of a curve: the first, smallest and largest of each of 200 stretches, in their order."""
    if len(points) <= 3 * _MOST_BUCKETS:
        return list(points)
    kept: list[tuple[float, float]] = []
    for stretch in np.array_split(np.arange(len(points)), _MOST_BUCKETS):
        values = [points[index][1] for index in stretch]
        chosen = {0, int(np.argmin(values)), int(np.argmax(values))}
        kept += [points[int(stretch[offset])] for offset in sorted(chosen)]
    return [*kept, points[-1]] if kept[-1] != points[-1] else kept


def calibration_points(table: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(mean probability, observed share) of the bins of a reliability table that hold any voxels."""
    columns = [table.get(key) for key in ("confidence", "frequency")]
    pairs = zip(*(column if isinstance(column, list) else [] for column in columns), strict=False)
    return [(x, y) for x, y in ((number(x), number(y)) for x, y in pairs) if x is not None and y is not None]


def line_chart(title: str, curves: Mapping[str, Points], *, overall: str | None = None) -> Markup:
    """Curves (name -> points) over the steps, with a legend if there are several.

    The curve called `overall` belongs to no region and has the colour of text; the others have those of the regions.
    """
    curves = dict(sorted(curves.items(), key=lambda curve: curve[0] == overall))
    colours = ["ink" if name == overall else colour_class(position) for position, name in enumerate(curves)]
    across = _scale([x for points in curves.values() for x, _ in points], _LEFT, _WIDTH - _RIGHT, is_snug=True)
    up = _scale([y for points in curves.values() for _, y in points], _HEIGHT - _BOTTOM, _TOP)
    drawn = [
        _curve(thinned(points), across, up, colour, "2.4" if len(points) < FEW_POINTS else None)
        for colour, points in zip(colours, curves.values(), strict=True)
    ]
    ends = "; ".join(f"{name} ends at {points[-1][1]:.4g}" for name, points in curves.items())
    entries = list(zip(curves, colours, strict=True)) if len(curves) > 1 else []
    return _chart(title, f"{title} by step: {ends}", _HEIGHT, across, "step", up=up, curves=drawn, entries=entries)


def strip_chart(title: str, values: Mapping[str, Mapping[str, float]]) -> Markup:
    """A row for each region (-> case id -> value): cases as dots, the middle half as a box, the median as a line."""
    limit = _limit_without_outliers(values)
    shown = [min(value, limit) for cases in values.values() for value in cases.values()]
    beyond = sum(value > limit for cases in values.values() for value in cases.values())
    across = _scale(shown, 96.0, _WIDTH - 14.0)
    strips = []
    for row, (region, cases) in enumerate(values.items()):
        y = _TOP + _STRIP * (row + 0.5)
        quartiles = np.percentile(list(cases.values()), (25, 50, 75))
        lower, median, upper = (across.place(min(float(value), across.high)) for value in quartiles)
        dots = [
            {
                "title": f"{case_id}: {value:.3f}",
                "x": across.place(min(value, across.high)),
                "y": y + (index * _GOLDEN % 1 - 0.5) * 18,
                "is_beyond": value > across.high,
            }
            for index, (case_id, value) in enumerate(cases.items())
        ]
        box = {"lower": lower, "median": median, "upper": upper}
        strips.append({"name": region, "y": y, "colour": colour_class(row), "dots": dots, **box})
    medians = (f"{name} median {np.median(list(cases.values())):.3g} of {len(cases)}" for name, cases in values.items())
    heading = f"{title}, {beyond} hollow dots lie further right" if beyond else title
    description = f"{title} of every case: {'; '.join(medians)}"
    return _chart(heading, description, _TOP + _STRIP * len(values) + _BOTTOM, across, title, strips=strips)


def _limit_without_outliers(values: Mapping[str, Mapping[str, float]]) -> float:
    """The upper end of the axis: the largest value, or less where a few outliers would squeeze all other cases."""
    largest, limit = -math.inf, -math.inf
    for cases in values.values():
        lower, upper = np.percentile(list(cases.values()), (25, 75))
        largest = max(largest, *cases.values())
        limit = max(limit, float(upper + _FAR * (upper - lower)))
    return limit if 0 < 2 * limit < largest else largest


def reliability_chart(title: str, curves: Mapping[str, Points]) -> Markup:
    """The share of voxels in a region against their predicted probability; the diagonal is perfect."""
    across, up = _Scale(0.0, 1.0, _LEFT, _LEFT + _SIDE, 0.2), _Scale(0.0, 1.0, _TOP + _SIDE, _TOP, 0.2)
    entries = [(name, colour_class(position)) for position, name in enumerate(curves)]
    coloured = zip(entries, curves.values(), strict=True)
    drawn = [_curve(points, across, up, colour, "3") for (_, colour), points in coloured if points]
    description = f"{title}: observed share against predicted probability"
    parts = {"up": up, "curves": drawn, "has_diagonal": True, "entries": entries}
    return _chart(title, description, _TOP + _SIDE + _BOTTOM, across, "predicted probability", **parts)


def bars_chart(title: str, stages: Sequence[str], rows: Mapping[str, Sequence[float]]) -> Markup:
    """Stacked horizontal bars: seconds of each stage, one bar for each case."""
    across = _scale([0.0, *(sum(values) for values in rows.values())], 150.0, _WIDTH - 14.0)
    bars = []
    for row, (case_id, values) in enumerate(rows.items()):
        ends = np.cumsum([0.0, *values]).tolist()
        parts = [
            {
                "title": f"{case_id}: {stages[stage]} {value:.3g} s",
                "left": across.place(ends[stage]),
                "width": max(across.place(ends[stage] + value) - across.place(ends[stage]), 0.0),
                "colour": f"s{stage}",
            }
            for stage, value in enumerate(values)
        ]
        name = case_id if len(case_id) <= 20 else f"\u2026{case_id[-19:]}"
        bars.append({"name": name, "top": _TOP + _BAR * row, "parts": parts})
    longest = max(rows.items(), key=lambda item: sum(item[1]))
    description = f"seconds of each stage by case; the longest is {longest[0]} with {sum(longest[1]):.3g} s"
    entries = [(stage, f"s{position}") for position, stage in enumerate(stages)]
    height = _TOP + _BAR * len(rows) + _BOTTOM
    return _chart(title, description, height, across, "seconds", bars=bars, entries=entries)


class _Scale:
    """Values to places along an axis, with ticks at round values."""

    def __init__(self, low: float, high: float, begin: float, end: float, tick: float) -> None:
        self.low, self.high, self.begin, self.end, self.tick = low, high, begin, end, tick

    def place(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self) -> list[tuple[float, str]]:
        """Values and their text."""
        first, last = math.ceil(self.low / self.tick - 1e-6), math.floor(self.high / self.tick + 1e-6)
        digits = max(0, -math.floor(math.log10(self.tick) + 1e-9))
        form = ".3g" if digits > 3 or self.high >= 1e5 else f".{digits}f"
        return [(index * self.tick, f"{index * self.tick:{form}}") for index in range(first, last + 1)]


def _scale(values: Sequence[float], begin: float, end: float, *, is_snug: bool = False) -> _Scale:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        low, high = (low - abs(low) * 0.5, high + abs(high) * 0.5) if high else (0.0, 1.0)
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    tick = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= (high - low) / 4 * 0.999)
    if not is_snug:
        low, high = math.floor(low / tick + 1e-9) * tick, math.ceil(high / tick - 1e-9) * tick
    return _Scale(low, high, begin, end, tick)


def _curve(points: Points, across: _Scale, up: _Scale, colour: str, radius: str | None) -> dict[str, object]:
    """A line, with a dot of this radius at each point, or none."""
    places = [(f"{across.place(x):.1f}", f"{up.place(y):.1f}") for x, y in points]
    path = "M" + "L".join(f"{x} {y}" for x, y in places)
    return {"path": path, "places": places, "colour": colour, "radius": radius}


def _chart(title: str, description: str, height: float, across: _Scale, x_label: str, **parts: object) -> Markup:
    empty = {"up": None, "curves": (), "strips": (), "bars": (), "entries": (), "has_diagonal": False}
    size = {"width": f"{_WIDTH:g}", "height": f"{height + 4:g}", "bottom": height - _BOTTOM}
    common = {"title": title, "description": description, "across": across, "x_label": x_label}
    return render("chart.html", **{**empty, **parts}, **size, **common)
