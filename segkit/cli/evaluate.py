"""`segkit evaluate`: scores of masks against references; `segkit compare`: which of several models is better."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from segkit.api.evaluate import evaluate as score
from segkit.cli.options import JsonOption, print_json, print_stderr, print_table, verb

if TYPE_CHECKING:
    from segkit.evaluation.scores import Evaluation


@verb(
    score,
    predictions=Annotated[Path, typer.Option("-p", "--predictions", help="Folder of masks <case>.nii.gz, or one.")],
    references=Annotated[Path, typer.Option("-r", "--references", help="Dataset, folder of masks, or one mask.")],
    out=Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for scores.json, scores.csv, summary.md, pictures.")
    ],
    protocol=Annotated[
        str, typer.Option(help="How empty masks and lesions are counted: legacy, brats2023 or brats2026.")
    ],
    challenge=Annotated[
        str | None, typer.Option(help="gli, met, ped, men, men-rt, goat or ssa; default: inferred from case IDs.")
    ],
    missing=Annotated[
        Literal["skip", "zero"],
        typer.Option(help="References without a prediction: leave out, or give the worst scores."),
    ],
    label_scheme=Annotated[
        str | None, typer.Option(help="Label scheme of the references; default: inferred; `classes` scores each value.")
    ],
    prediction_scheme=Annotated[
        str | None, typer.Option(help="Label scheme of the predictions, where it differs and no manifest names it.")
    ],
    roi=Annotated[
        str | None,
        typer.Option(help="Score only inside: a folder of masks, or the ending of their names beside the references."),
    ],
    probabilities=Annotated[
        Path | None, typer.Option(help="Folder of probabilities as `segkit infer` saves them: adds AUC, ECE, Brier.")
    ],
    figures=Annotated[int, typer.Option(min=0, help="Draw this many of the worst cases into OUTPUT/figures.")],
)
def evaluate(json: JsonOption = False, quiet: bool = False, **options: Any) -> None:
    """Score masks against references per case and region: Dice (F1), HD95, NSD, and lesion by lesion.

    Exit code 1 where a case could not be scored, or files of the references belong to no case; 2 where the request is
    wrong.
    """
    evaluation = score(**options)
    if json:
        print_json(evaluation.to_json())
    elif evaluation.cases:
        _print_summary(evaluation)
    if not quiet:
        for note in evaluation.notes():
            print_stderr(note, style="yellow")
    if evaluation.errors or evaluation.pairing.left_out:
        raise typer.Exit(1)


def _print_summary(evaluation: Evaluation) -> None:
    from segkit.evaluation.score_files import summary_rows

    columns, rows = summary_rows(evaluation.summary, evaluation.headline())
    title = f"{len(evaluation.cases)} cases, protocol {evaluation.protocol}{evaluation.where()}; mean (median)"
    print_table(f"{title}; {evaluation.intervals()}", columns, rows)


@verb()
def compare(
    scores: Annotated[
        list[Path], typer.Argument(help="Two or more folders (or scores.json) of `segkit evaluate -o`; baseline first.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for comparison.json, comparison.csv, comparison.md.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Compare by these, e.g. dice,nsd; default: Dice and HD95, lesion-wise where scored so."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of bootstrap and permutations.")] = 0,
    json: JsonOption = False,
    quiet: bool = False,
) -> None:
    """Compare models on the same cases: differences with intervals and tests, and the BraTS ranking.

    Exit code 2 where they cannot be compared: other protocols, other references, no case in common.
    """
    from segkit.evaluation.comparison import compare_scores
    from segkit.evaluation.score_files import read_score_sets

    chosen = None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]
    comparison = compare_scores(read_score_sets(scores), chosen, seed=seed)
    if output is not None:
        comparison.write(output)
    if json:
        print_json(comparison.to_json())
    else:
        count = f"{len(comparison.cases)} cases, protocol {comparison.models[0].protocol}"
        print_table(f"{count}; BraTS ranking, p one-sided", *comparison.ranking_rows())
        print_table("model less baseline; Wilcoxon signed-rank test, Holm over all", *comparison.pair_rows())
    if not quiet:
        for note in comparison.notes:
            print_stderr(note, style="yellow")
