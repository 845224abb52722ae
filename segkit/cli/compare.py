"""`segkit compare`: which of several models is better, and whether that is more than chance."""

from pathlib import Path
from typing import Annotated

import typer

from segkit.cli.options import (
    JsonOption,
    QuietOption,
    VerboseOption,
    print_json,
    print_stderr,
    print_table,
    set_verbosity,
)


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
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compare models on the same cases: differences with intervals and tests, and the BraTS ranking.

    Exit code 2 where they cannot be compared: other protocols, other references, no case in common.
    """
    from segkit.evaluation.comparison import compare_scores
    from segkit.evaluation.score_files import read_score_sets

    set_verbosity(is_quiet=quiet, is_verbose=verbose)
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
