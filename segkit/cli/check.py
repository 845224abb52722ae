"""`segkit check`: contents and problems of a data folder, an estimate for training, and the next command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segkit.api.check import check as check_data
from segkit.cli.options import JsonOption, console, print_json, print_stdout, print_table, verb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from segkit.api.check import DataCheck
    from segkit.errors import Problem
    from segkit.reading.checks import CaseReport

_MOST_ROWS = 40
_MOST_PROBLEMS = 60
_MOST_LABELS = 8


@verb(
    check_data,
    fast=Annotated[bool, typer.Option("--fast", help="Headers only: no voxels are read.")],
    estimate=Annotated[bool, typer.Option("--estimate/--no-estimate", help="Memory and minutes of training.")],
)
def check(
    data: Path, estimate: bool, settings: dict[str, Any], json: JsonOption = False, quiet: bool = False, **options: Any
) -> None:
    """Check a data folder: layout, labels, every problem at once, and the next command.

    Exit code 0: usable; 1: some cases or the folder have errors; 2: nothing was recognised.
    """
    from rich.progress import Progress

    progress = Progress(console=console(), transient=True, disable=quiet)
    task = progress.add_task("Reading cases", total=None)

    def show(done: int, total: int) -> None:
        progress.start()  # not before there are cases
        progress.update(task, completed=done, total=total)

    try:
        with_estimate = estimate and (json or not quiet)
        found = check_data(data, estimate=with_estimate, on_progress=show, **options, **settings)
    finally:
        if progress.live.is_started:
            progress.stop()
    if json:
        print_json(found.to_json())
    elif quiet:
        _print_problems([problem for problem in found.all_problems() if problem.is_error])
    else:
        _print_report(found)
    if not found.is_usable:
        raise typer.Exit(1)


def _print_report(found: DataCheck) -> None:
    from segkit.reading.layouts.data_sets import data_set_of
    from segkit.reading.layouts.patients import patients_note
    from segkit.reading.layouts.table import LAYOUTS

    cohort, reports = found.cohort, found.cases
    print_stdout(f"Layout: {cohort.layout} - {LAYOUTS[cohort.layout].description}")
    if data_set := data_set_of(cohort):
        origin = "" if data_set.seen else ", by its description"
        print_stdout(f"Names: as in {data_set.name} ({data_set.source}{origin})")
    if cohort.scheme is None:
        print_stdout("Label scheme: none")
    else:
        labels = ", ".join(f"{value} {tissue}" for tissue, value in cohort.scheme.values.items())
        labels += "" if cohort.scheme.ignore is None else f"; {cohort.scheme.ignore} is ignored"
        print_stdout(f"Label scheme: {cohort.scheme.name} ({labels})")
    labelled = sum(case.label is not None for case in cohort.cases)
    print_stdout(f"Cases: {len(reports)}, {labelled} with a reference; modalities: {', '.join(cohort.modalities)}")
    print_stdout(f"Patients: {patients_note(cohort.cases)}; --patients FILE decides otherwise")
    shown = sorted(reports, key=lambda report: (report.is_usable, not report.problems))[:_MOST_ROWS]
    print_table(
        "Cases" if len(shown) == len(reports) else f"Cases (the {len(shown)} that need attention first)",
        ("case", "modalities", "shape", "spacing mm", "axes", "labels", "problems"),
        [_row(report) for report in sorted(shown, key=lambda report: report.case)],
    )
    _print_problems(found.all_problems())
    words = {"images": "images", "references": "references", "companions": "other images", "others": "other files"}
    counts = [f"{word} {cohort.files.get(name, 0)}" for name, word in words.items()]
    print_stdout(f"Files: {', '.join(counts)}, left out {len(cohort.left_out)}")
    if found.estimate is not None:
        needs = found.estimate
        print_stdout(f"Training needs about {needs['memory_gb']:g} GB and {needs['minutes']:g} minutes")
    print_stdout(f"Next: {found.next_command or 'correct the errors above'}")


def _print_problems(problems: Sequence[Problem]) -> None:
    for problem in problems[:_MOST_PROBLEMS]:
        print_stdout(f"{'ERROR' if problem.is_error else 'note '} {problem}")
    if len(problems) > _MOST_PROBLEMS:
        print_stdout(f"... and {len(problems) - _MOST_PROBLEMS} more; `--json` lists all of them")


def _row(report: CaseReport) -> tuple[str, ...]:
    return (
        report.case,
        " ".join(report.modalities),
        "x".join(str(length) for length in report.shape),
        "x".join(f"{length:.3g}" for length in report.spacing_mm),
        report.orientation,
        " ".join(str(value) for value in report.labels[:_MOST_LABELS])
        + (f" ... ({len(report.labels)})" if len(report.labels) > _MOST_LABELS else ""),
        str(len(report.problems) or ""),
    )
