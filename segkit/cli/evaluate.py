"""`segkit evaluate`: scores of masks against references."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from segkit.cli.options import (
    CasesOption,
    JsonOption,
    QuietOption,
    VerboseOption,
    print_json,
    print_stderr,
    print_table,
    set_verbosity,
)

if TYPE_CHECKING:
    from segkit.evaluation.scores import Evaluation


def evaluate(
    predictions: Annotated[Path, typer.Option("-p", "--predictions", help="Folder of masks <case>.nii.gz, or one.")],
    references: Annotated[Path, typer.Option("-r", "--references", help="Dataset, folder of masks, or one mask.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for scores.json, scores.csv, summary.md, pictures.")
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="How empty masks and lesions are counted: legacy, brats2023 or brats2026.")
    ] = "legacy",
    challenge: Annotated[
        str | None, typer.Option(help="gli, met, ped, men, men-rt, goat or ssa; default: inferred from case IDs.")
    ] = None,
    cases: CasesOption = None,
    missing: Annotated[
        Literal["skip", "zero"],
        typer.Option(help="References without a prediction: leave out, or give the worst scores."),
    ] = "skip",
    label_scheme: Annotated[
        str | None, typer.Option(help="Label scheme of the references; default: inferred; `classes` scores each value.")
    ] = None,
    prediction_scheme: Annotated[
        str | None, typer.Option(help="Label scheme of the predictions, where it differs and no manifest names it.")
    ] = None,
    roi: Annotated[
        str | None,
        typer.Option(
            help="Score only inside these: a folder of masks, or the ending of their names beside the references."
        ),
    ] = None,
    probabilities: Annotated[
        Path | None, typer.Option(help="Folder of probabilities as `segkit infer` saves them: adds AUC, ECE, Brier.")
    ] = None,
    figures: Annotated[int, typer.Option(min=0, help="Draw this many of the worst cases into OUTPUT/figures.")] = 0,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Score masks against references per case and region: Dice (F1), HD95, NSD, and lesion by lesion.

    Exit code 1 where a case could not be scored, 2 where the request is wrong.
    """
    from segkit.api.evaluate import evaluate as score_masks

    set_verbosity(is_quiet=quiet, is_verbose=verbose)
    evaluation = score_masks(
        predictions,
        references,
        output,
        protocol=protocol,
        challenge=challenge,
        cases=cases,
        missing=missing,
        label_scheme=label_scheme,
        prediction_scheme=prediction_scheme,
        roi=roi,
        probabilities=probabilities,
        figures=figures,
    )
    if json:
        print_json(evaluation.to_json())
    elif evaluation.cases:
        _print_summary(evaluation)
    if not quiet:
        for note in evaluation.notes():
            print_stderr(note, style="yellow")
    if evaluation.errors:
        raise typer.Exit(1)


def _print_summary(evaluation: Evaluation) -> None:
    from segkit.evaluation.score_files import summary_rows

    columns, rows = summary_rows(evaluation.summary, evaluation.headline())
    title = f"{len(evaluation.cases)} cases, protocol {evaluation.protocol}{evaluation.where()}; mean (median)"
    print_table(f"{title}; {evaluation.intervals()}", columns, rows)
