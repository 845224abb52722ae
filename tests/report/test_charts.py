"""Charts: places, ticks and colours, read from the SVG; points of curves: panels, thinning, bins of reliability."""

from __future__ import annotations

import re

import pytest

from segkit.report.charts import (
    bars_chart,
    calibration_points,
    line_chart,
    reliability_chart,
    strip_chart,
    thinned,
    training_curves,
)


def numbers(svg: str, attribute: str) -> list[float]:
    return [float(found) for found in re.findall(rf' {attribute}="([-\d.]+)"', svg)]


def test_a_short_curve_is_drawn_as_it_is():
    points = [(0.0, 1.0), (10.0, 0.5)]
    assert thinned(points) == points
    svg = line_chart("Loss", {"loss": points})
    path = re.search(r'd="M([-\d. L]+)" class="line c0"', svg)[1]
    (left, top), (right, bottom) = (tuple(map(float, point.split())) for point in path.split("L"))
    assert left < right
    assert top < bottom  # 1.0 lies above 0.5
    assert (left, right) == (46.0, 410.0)


def test_regions_keep_their_colours_beside_the_overall_score():
    svg = line_chart("Validation", {"score": [(0, 0.5)], "WT": [(0, 0.6)], "TC": [(0, 0.4)]}, overall="score")
    assert re.findall(r'swatch (\w+)" aria-hidden="true"></span>(\w+)', svg) == [
        ("c0", "WT"),
        ("c1", "TC"),
        ("ink", "score"),
    ]


def test_ticks_are_round():
    svg = line_chart("Loss", {"loss": [(0, 0.03), (1000, 0.97)]})
    written = re.findall(r">([\d.]+)</text>", svg)
    assert written == ["0.0", "0.5", "1.0", "0", "500", "1000"]


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-9])
def test_a_curve_that_does_not_move_has_an_axis(value):
    assert "nan" not in line_chart("Loss", {"loss": [(0, value), (1, value)]})


def test_strips_show_every_case_and_the_median():
    svg = strip_chart("Dice", {"WT": {"a": 0.0, "b": 0.5, "c": 1.0}})
    assert re.findall(r"<title>([^<]*)</title>", svg) == ["a: 0.000", "b: 0.500", "c: 1.000"]
    left, middle, right = numbers(svg, "cx")
    assert (left, middle, right) == (96.0, 251.0, 406.0)
    assert 'd="M251.0 19.0v30" class="median"' in svg
    assert 'aria-label="Dice of every case: WT median 0.5 of 3"' in svg


def test_outliers_do_not_squeeze_the_others():
    cases = {f"case {index}": 1.0 + index / 10 for index in range(20)} | {"far": 374.0}
    svg = strip_chart("HD95 (mm)", {"WT": cases})
    assert "HD95 (mm), 1 hollow dots lie further right" in svg
    assert svg.count('class="beyond"') == 1
    assert "far: 374.000" in svg
    assert re.findall(r">(\d+)</text>", svg) == ["0", "2", "4", "6"]  # up to 2.5 + 3 boxes of 1, not to 374


def test_bars_are_as_long_as_their_stages():
    svg = bars_chart("Seconds", ["read", "predict"], {"a": [1.0, 3.0], "b": [2.0, 0.0]})
    widths = numbers(svg, "width")
    assert widths == pytest.approx([64.0, 192.0, 128.0, 0.0])
    assert "the longest is a with 4 s" in svg


def test_reliability_is_drawn_on_equal_axes():
    svg = reliability_chart("All voxels", {"WT": [(0.0, 0.0), (1.0, 1.0)]})
    path = re.search(r'd="M([-\d. L]+)" class="line c0"', svg)[1]
    (left, bottom), (right, top) = (tuple(map(float, point.split())) for point in path.split("L"))
    assert right - left == bottom - top == 260.0


def test_a_long_curve_keeps_its_spikes_and_its_ends():
    points = [(float(step), 1.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    points[54_322] = (54_322.0, -9.0)
    kept = thinned(points)
    assert len(kept) <= 601
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert {points[54_321], points[54_322]} <= set(kept)
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)


def test_curves_are_sorted_into_panels():
    rows = [
        {"step": 10, "epoch": 1, "loss": 1.0, "lr": 0.1, "seconds": 3.0},
        {"step": 20, "loss": float("nan"), "lr": 0.05, "score": 0.5, "dice": {"WT": 0.8, "ET": None}},
    ]
    assert training_curves(rows) == {
        "loss": {"loss": [(10, 1.0)]},
        "validation": {"score": [(20, 0.5)], "WT": [(20, 0.8)]},
        "learning rate": {"lr": [(10, 0.1), (20, 0.05)]},
    }


def test_bins_without_voxels_are_no_points():
    assert calibration_points({"confidence": [0.25, None, 0.75], "frequency": [0.2, None, 0.9]}) == [
        (0.25, 0.2),
        (0.75, 0.9),
    ]
    assert calibration_points({"confidence": None, "frequency": [0.5]}) == []
