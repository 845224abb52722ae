"""Charts as inline SVG: curves of a training, spread of scores over cases, reliability, seconds by stage.

They take their colours from the style sheet (classes `c0` to `c6` are the palette of the regions), so that they follow
light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from segkit.report.curves import FEW_POINTS, Points, thinned
from segkit.report.html import Markup, colour_class, element, legend

_WIDTH, _HEIGHT = 420.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 12.0, 30.0
_ROW = 44.0
_BAR = 15.0
_GOLDEN = 0.618
"""Spreads dots across their row so that neighbours in order do not lie on each other."""
_FAR = 3.0
"""Lengths of the box beyond its end from which on a case is an outlier."""


def line_chart(
    title: str, curves: Mapping[str, Points], x_label: str = "step", *, overall: str | None = None
) -> Markup:
    """Curves (name -> points) over one axis, with a legend where there are several.

    The curve called `overall` is of no region and has the colour of text; the others have those of the regions.
    """
    curves = dict(sorted(curves.items(), key=lambda curve: curve[0] == overall))
    classes = ["ink" if name == overall else colour_class(position) for position, name in enumerate(curves)]
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points]
    across, up = _scale(xs, _LEFT, _WIDTH - _RIGHT, is_snug=True), _scale(ys, _HEIGHT - _BOTTOM, _TOP)
    parts = [*_y_axis(up), *_x_axis(across, _HEIGHT - _BOTTOM, x_label)]
    for class_, points in zip(classes, curves.values(), strict=True):
        parts += _curve(thinned(points), across, up, class_, "2.4" if len(points) < FEW_POINTS else None)
    description = "; ".join(f"{name} ends at {points[-1][1]:.4g}" for name, points in curves.items())
    key = legend(dict(zip(curves, classes, strict=True))) if len(curves) > 1 else None
    return _figure(title, f"{title} by {x_label}: {description}", parts, _HEIGHT, key)


def strip_chart(title: str, values: Mapping[str, Mapping[str, float]]) -> Markup:
    """One row for each region: every case as a dot, the middle half as a box, the median as a line.

    Args:
        title: What is measured.
        values: Region -> case id -> value.
    """
    limit = _without_outliers(values)
    shown = [min(value, limit) for cases in values.values() for value in cases.values()]
    beyond = sum(value > limit for cases in values.values() for value in cases.values())
    height = _TOP + _ROW * len(values) + _BOTTOM
    across = _scale(shown, 96.0, _WIDTH - 14.0)
    parts = _x_axis(across, height - _BOTTOM, title)
    for row, (region, cases) in enumerate(values.items()):
        middle = _TOP + _ROW * (row + 0.5)
        parts.append(element("text", region, x="88", y=_r(middle + 4), class_="end"))
        quartiles = np.percentile(list(cases.values()), (25, 50, 75))
        lower, median, upper = (across.place(min(float(value), across.high)) for value in quartiles)
        box = {"x": _r(lower), "y": _r(middle - 13), "width": _r(max(upper - lower, 0.5)), "height": "26", "rx": "3"}
        dots = [
            element(
                "circle",
                element("title", f"{case_id}: {value:.3f}"),
                cx=_r(across.place(min(value, across.high))),
                cy=_r(middle + (index * _GOLDEN % 1 - 0.5) * 18),
                r="2.6",
                class_="beyond" if value > across.high else None,
            )
            for index, (case_id, value) in enumerate(cases.items())
        ]
        parts += [
            element("rect", **box, class_=f"box {colour_class(row)}"),
            element("g", *dots, class_=f"dot {colour_class(row)}"),
            element("path", d=f"M{median:.1f} {middle - 15:.1f}v30", class_="median"),
        ]
    medians = (f"{name} median {np.median(list(cases.values())):.3g} of {len(cases)}" for name, cases in values.items())
    description = f"{title} of every case: {'; '.join(medians)}"
    heading = f"{title}, {beyond} hollow dots lie further right" if beyond else title
    return _figure(heading, description, parts, height)


def _without_outliers(values: Mapping[str, Mapping[str, float]]) -> float:
    """The upper end of the axis: the largest value, or less where a few outliers would squeeze all other cases."""
    largest, limit = -math.inf, -math.inf
    for cases in values.values():
        lower, upper = np.percentile(list(cases.values()), (25, 75))
        largest = max(largest, *cases.values())
        limit = max(limit, float(upper + _FAR * (upper - lower)))
    return limit if 0 < 2 * limit < largest else largest


def reliability_chart(title: str, curves: Mapping[str, Points]) -> Markup:
    """How often a voxel belongs to a region against how probable the model called it; the diagonal is perfect."""
    side = 260.0
    across, up = _Scale(0.0, 1.0, _LEFT, _LEFT + side, 0.2), _Scale(0.0, 1.0, _TOP + side, _TOP, 0.2)
    parts = [*_y_axis(up, _LEFT + side), *_x_axis(across, _TOP + side, "predicted probability")]
    parts.append(element("path", d=f"M{_LEFT} {_TOP + side}L{_LEFT + side} {_TOP}", class_="diagonal"))
    for position, points in enumerate(curves.values()):
        parts += _curve(points, across, up, colour_class(position), "3") if points else []
    description = f"{title}: observed share against predicted probability"
    key = legend({name: colour_class(position) for position, name in enumerate(curves)})
    return _figure(title, description, parts, _TOP + side + _BOTTOM, key)


def bars_chart(title: str, stages: Sequence[str], rows: Mapping[str, Sequence[float]]) -> Markup:
    """Stacked horizontal bars: seconds of each stage, one bar a case."""
    height = _TOP + (_BAR + 5) * len(rows) + _BOTTOM
    across = _scale([0.0, *(sum(values) for values in rows.values())], 150.0, _WIDTH - 14.0)
    parts = _x_axis(across, height - _BOTTOM, "seconds")
    for row, (case_id, values) in enumerate(rows.items()):
        top = _TOP + (_BAR + 5) * row
        name = case_id if len(case_id) <= 20 else f"\u2026{case_id[-19:]}"
        parts.append(element("text", name, x="142", y=_r(top + 11), class_="end small"))
        begin = 0.0
        for stage, value in enumerate(values):
            left, right = across.place(begin), across.place(begin + value)
            tip = element("title", f"{case_id}: {stages[stage]} {value:.3g} s")
            bar = {"x": _r(left), "y": _r(top), "width": _r(max(right - left, 0.0)), "height": str(_BAR)}
            parts.append(element("rect", tip, **bar, class_=f"s{stage}"))
            begin += value
    longest = max(rows.items(), key=lambda item: sum(item[1]))
    description = f"seconds of each stage by case; the longest is {longest[0]} with {sum(longest[1]):.3g} s"
    key = legend({stage: f"s{position}" for position, stage in enumerate(stages)})
    return _figure(title, description, parts, height, key)


class _Scale:
    """Values to places along an axis, with ticks at round values."""

    def __init__(self, low: float, high: float, begin: float, end: float, tick: float) -> None:
        self.low, self.high, self.begin, self.end, self.tick = low, high, begin, end, tick

    def place(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self) -> list[tuple[float, str]]:
        """Values with how they are written."""
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


def _curve(points: Points, across: _Scale, up: _Scale, class_: str, dot_radius: str | None) -> list[Markup]:
    """A line with a casing that sets it off from others, and a dot at each point where `dot_radius` is given."""
    places = [(f"{across.place(x):.1f}", f"{up.place(y):.1f}") for x, y in points]
    path = "M" + "L".join(f"{x} {y}" for x, y in places)
    parts = [element("path", d=path, class_=f"{kind} {class_}") for kind in ("casing", "line")]
    if dot_radius is not None:
        dots = (element("circle", cx=x, cy=y, r=dot_radius) for x, y in places)
        parts.append(element("g", *dots, class_=f"dot {class_}"))
    return parts


def _y_axis(scale: _Scale, right: float = _WIDTH - _RIGHT) -> list[Markup]:
    parts = []
    for value, text in scale.ticks():
        y = scale.place(value)
        parts.append(element("path", d=f"M{_LEFT} {y:.1f}H{right}", class_="grid"))
        parts.append(element("text", text, x=_r(_LEFT - 6), y=_r(y + 3.5), class_="end"))
    return parts


def _x_axis(scale: _Scale, y: float, label: str) -> list[Markup]:
    parts = [element("path", d=f"M{scale.begin} {y}H{scale.end}", class_="axis")]
    for value, text in scale.ticks():
        x = scale.place(value)
        parts.append(element("path", d=f"M{x:.1f} {y}v4", class_="axis"))
        parts.append(element("text", text, x=_r(x), y=_r(y + 15), class_="middle"))
    parts.append(element("text", label, x=_r(scale.end), y=_r(y + 27), class_="end label"))
    return parts


def _figure(title: str, description: str, parts: Sequence[Markup], height: float, key: Markup | None = None) -> Markup:
    box = f"0 0 {_WIDTH:g} {height + 4:g}"
    picture = element("svg", *parts, viewBox=box, role="img", aria_label=description, class_="chart")
    return element("figure", element("figcaption", title), picture, key)


def _r(value: float) -> str:
    return f"{value:.1f}"
