"""Scores as text."""

from __future__ import annotations

import math

from segkit.evaluation.score_files import markdown_table, scores_csv, summarise, summary_rows

CASES = {
    "a": {"WT": {"dice": 0.25, "hd95_mm": 2.0}},
    "b": {"WT": {"dice": 1.0, "hd95_mm": math.nan}, "ET": {"dice": 0.0}},
    "c": {"WT": {"dice": 1.0, "hd95_mm": math.inf}},
}


def test_summary_leaves_out_what_is_undefined():
    summary = summarise(CASES.values())
    no_intervals = {"ci95": None, "median_ci95": None}
    # The lowest case three times, one resample of 27, is more than 2.5 %; so is the highest.
    ends = [0.25, 1.0]
    assert summary["WT"]["dice"] == {"mean": 0.75, "median": 1.0, "n": 3, "ci95": ends, "median_ci95": ends}
    assert summary["WT"]["hd95_mm"] == {"mean": 2.0, "median": 2.0, "n": 1} | no_intervals
    assert summary["ET"] == {"dice": {"mean": 0.0, "median": 0.0, "n": 1} | no_intervals}
    nothing = summarise([{"WT": {"dice": math.nan}}])["WT"]["dice"]
    assert nothing == {"mean": None, "median": None, "n": 0} | no_intervals


def test_patients_are_those_of_the_cases_that_have_a_value():
    cases = [{"WT": {"dice": value}} for value in (0.25, math.nan, 0.25, 1.0)]
    summary = summarise(cases, ["a", "a", "a", "b"])
    # a twice, both, b twice: means 0.25, 0.5 and 1.
    assert summary["WT"]["dice"]["ci95"] == [0.25, 1.0]
    assert summarise(cases, ["a", "b", "a", "a"])["WT"]["dice"]["ci95"] is None


def test_csv_has_a_row_per_case_and_region():
    assert scores_csv(CASES).splitlines() == [
        "case,region,dice,hd95_mm",
        "a,WT,0.25,2.0",
        "b,WT,1.0,",
        "b,ET,0.0,",
        "c,WT,1.0,",
    ]


def test_summary_as_markdown():
    columns, rows = summary_rows(summarise(CASES.values()), ["dice", "hd95_mm"])
    assert markdown_table(columns, rows) == (
        "| region | dice | hd95_mm | n |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| WT | 0.750 (1.000) | 2.000 (2.000) | 3 |\n"
        "| 95 % CI | 0.250 to 1.000 |  |  |\n"
        "| ET | 0.000 (0.000) | - | 1 |\n"
    )
