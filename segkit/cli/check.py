"""`segkit check`: contents and problems of a data folder, the needs of a training, and the next command."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from segkit.api.arguments import parse_gigabytes
from segkit.api.training import preset_for, suited_presets
from segkit.cli.options import (
    DataArgument,
    JsonOption,
    LayoutOption,
    MemoryOption,
    ModalitiesOption,
    PresetOption,
    QuietOption,
    SchemeOption,
    SetOption,
    VerboseOption,
    console,
    parse_settings,
    print_json,
    print_stderr,
    print_stdout,
    print_table,
    read_modalities,
    set_verbosity,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from segkit.errors import Problem
    from segkit.reading.case import Cohort
    from segkit.reading.checks import CaseReport
    from segkit.training.config import TrainConfig

FastOption = Annotated[bool, typer.Option("--fast", help="Headers only: no voxels are read.")]
EstimateOption = Annotated[bool, typer.Option("--estimate/--no-estimate", help="Memory and minutes of training.")]

_MOST_ROWS = 40
_MOST_PROBLEMS = 60
_MOST_LABELS = 8


def check(
    data: DataArgument,
    layout: LayoutOption = None,
    label_scheme: SchemeOption = None,
    modality: ModalitiesOption = None,
    fast: FastOption = False,
    estimate: EstimateOption = True,
    preset: PresetOption = None,
    settings: SetOption = None,
    memory: MemoryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Check a data folder: layout, labels, every problem at once, and the next command.

    Exit code 0: usable; 1: something cannot be used as it is; 2: nothing was recognised.
    """
    from segkit.errors import DataError, as_request
    from segkit.reading.checks import too_few_patients, usable_cases
    from segkit.reading.layouts.table import find_cases

    set_verbosity(is_quiet=quiet, is_verbose=verbose)
    preset = preset or _preset_of_this_machine()
    config = _training_config(preset, settings) if estimate else None
    try:
        cohort = find_cases(data, layout=layout, modalities=read_modalities(modality), label_scheme=label_scheme)
    except DataError as error:
        raise as_request(error) from error
    reports = _check_with_progress(cohort, read_voxels=not fast, is_quiet=quiet)
    usable = usable_cases(cohort, reports)
    needs = _estimate(usable, config, memory) if estimate and (json or not quiet) else None
    problems = [*cohort.problems, *too_few_patients(usable)]
    training = ["--preset", preset, *(word for setting in settings or () for word in ("--set", setting))]
    training += [] if memory is None else ["--memory", memory]
    command = next_command(cohort, reports, usable, data, _given_options(layout, label_scheme, modality), training)
    if json:
        print_json(
            {
                "layout": cohort.layout,
                "label_scheme": None if cohort.scheme is None else cohort.scheme.to_json(),
                "cases": [report.to_json() for report in reports],
                "problems": [asdict(problem) for problem in problems],
                "estimate": needs,
                "next_command": command,
            }
        )
    elif quiet:
        _print_problems([problem for problem in _all_problems(problems, reports) if problem.is_fatal])
    else:
        _print_report(cohort, problems, reports, needs, command)
    if not all(report.is_usable for report in reports) or any(problem.is_fatal for problem in cohort.problems):
        raise typer.Exit(1)


def next_command(
    cohort: Cohort,
    reports: Sequence[CaseReport],
    usable: Cohort,
    data: Path,
    reading: Sequence[str] = (),
    training: Sequence[str] = (),
) -> str:
    """The command line to run after a check, quoted for a POSIX shell.

    `reading` are the options for reading the folder, `training` those that only `train` has.
    """
    from segkit.reading.geometry import REPAIR_COMMAND
    from segkit.reading.layouts.brats import SYNTHESIS_LAYOUT

    fatal = [problem for report in reports for problem in report.problems if problem.is_fatal]
    labelled = [case for case in usable.cases if case.label is not None]
    offered = (re.search(r"--label-scheme ([a-z0-9-]+)", problem.remedy) for problem in cohort.problems)
    choice = next((match[1] for match in offered if match), None)
    path = str(data)
    if fatal and all(REPAIR_COMMAND in problem.remedy for problem in fatal):
        words = ["convert", "headers", path, "-o", f"{data.absolute().name}-repaired"]
    elif labelled and cohort.scheme is None and choice:
        words = ["check", path, "--label-scheme", choice, *reading]
    elif labelled and cohort.scheme is not None:
        words = ["train", path, "-o", "run", *training, *reading]
    elif usable.cases and cohort.layout == SYNTHESIS_LAYOUT:
        words = ["inpaint", "-m", "run", "-i", path, "-o", "filled"]
    elif usable.cases:
        words = ["infer", "-m", "run", "-i", path, "-o", "masks", *reading]
    else:
        words = ["check", path, *reading]
    return shlex.join(["segkit", *words])


def _check_with_progress(cohort: Cohort, *, read_voxels: bool, is_quiet: bool) -> list[CaseReport]:
    from rich.progress import Progress

    from segkit.reading.checks import check_cohort
    from segkit.runtime import available_cores

    with Progress(console=console(), transient=True, disable=is_quiet) as progress:
        task = progress.add_task("Reading cases", total=len(cohort.cases))
        return check_cohort(
            cohort, read_voxels=read_voxels, workers=min(4, available_cores()), on_case=lambda: progress.advance(task)
        )


def _preset_of_this_machine() -> str:
    """The preset for this machine's device; torch is loaded only where there is an NVIDIA driver."""
    from segkit.runtime import pick_device

    if shutil.which("nvidia-smi") is None:
        return preset_for("cpu")
    return preset_for(pick_device().type)


def _training_config(preset: str, settings: list[str] | None) -> TrainConfig:
    """The settings to estimate for, which are checked before any data are read."""
    from segkit.config import build_config, preset_layers
    from segkit.training.config import TrainConfig

    layers = [("--set", parse_settings(settings))]
    return build_config(TrainConfig, [*suited_presets(preset_layers(preset), layers), *layers])


def _estimate(cohort: Cohort, config: TrainConfig | None, memory: str | None) -> dict[str, float] | None:
    """Memory and minutes of training, by planning; None where nothing can be trained."""
    labelled = replace(cohort, cases=tuple(case for case in cohort.cases if case.label is not None))
    if config is None or labelled.scheme is None or not labelled.cases:
        return None
    from segkit.errors import SegkitError
    from segkit.runtime import pick_device
    from segkit.training.segmentation_plan import estimate_training, memory_to_plan_for

    device = pick_device()
    memory_gb = memory_to_plan_for(None if memory is None else parse_gigabytes(memory), device)
    try:
        needs = estimate_training(labelled, labelled.scheme, config, memory_gb, device)
    except SegkitError as error:
        print_stderr(f"No estimate: {error}", style="yellow")
        return None
    return {"memory_gb": round(needs.memory_gb, 2), "minutes": round(needs.minutes, 1)}


def _given_options(layout: str | None, scheme: str | None, modality: Sequence[str] | None) -> list[str]:
    options = [] if layout is None else ["--layout", layout]
    options += [] if scheme is None else ["--label-scheme", scheme]
    for pair in modality or ():
        options += ["--modality", pair]
    return options


def _print_report(
    cohort: Cohort,
    problems: Sequence[Problem],
    reports: Sequence[CaseReport],
    needs: Mapping[str, float] | None,
    command: str,
) -> None:
    from segkit.reading.layouts.table import LAYOUTS

    print_stdout(f"Layout: {cohort.layout} - {LAYOUTS[cohort.layout].description}")
    if cohort.scheme is None:
        print_stdout("Label scheme: none")
    else:
        labels = ", ".join(f"{value} {tissue}" for tissue, value in cohort.scheme.values.items())
        print_stdout(f"Label scheme: {cohort.scheme.name} ({labels})")
    labelled = sum(case.label is not None for case in cohort.cases)
    print_stdout(f"Cases: {len(reports)}, {labelled} with a reference; modalities: {', '.join(cohort.modalities)}")
    shown = sorted(reports, key=lambda report: (report.is_usable, not report.problems))[:_MOST_ROWS]
    print_table(
        "Cases" if len(shown) == len(reports) else f"Cases (the {len(shown)} that need attention first)",
        ("case", "modalities", "shape", "spacing mm", "axes", "labels", "problems"),
        [_row(report) for report in sorted(shown, key=lambda report: report.case)],
    )
    _print_problems(_all_problems(problems, reports))
    if needs is not None:
        print_stdout(f"Training needs about {needs['memory_gb']:g} GB and {needs['minutes']:g} minutes")
    print_stdout(f"Next: {command}")


def _all_problems(problems: Sequence[Problem], reports: Sequence[CaseReport]) -> list[Problem]:
    """Those of the folder and of its cases, fatal ones first."""
    found = [*problems, *(problem for report in reports for problem in report.problems)]
    return sorted(found, key=lambda problem: not problem.is_fatal)


def _print_problems(problems: Sequence[Problem]) -> None:
    for problem in problems[:_MOST_PROBLEMS]:
        print_stdout(f"{'ERROR' if problem.is_fatal else 'note '} {problem}")
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
