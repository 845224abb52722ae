"""What each missing modality costs: mean Dice of a trained network on every set of modalities that a scan may have.

Run with `python benchmarks/missing_modalities.py RUN DATA [--cases FILE] [-d cpu]`. DATA holds cases with references
that the network was not trained on, complete ones; FILE names those to use, one case id a line (for the validation
cases of a run see its split.json). Modalities are removed from each case before it is read, as `segkit infer
--allow-missing` finds it. Prints a Markdown table; an output that is neither in mask nor reference counts as 1, as
BraTS counts it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from segkit import Predictor
from segkit.metrics.overlap import dice_by_region
from segkit.preparing.preprocessing import load_case
from segkit.reading.case import Case
from segkit.reading.layouts.table import find_cases


def main() -> None:
    """Read the arguments, score every set of modalities, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="run folder of segkit train")
    parser.add_argument("data", type=Path, help="cases with references")
    parser.add_argument("--cases", type=Path, help="text file with the ids of the cases to use")
    parser.add_argument("-d", "--device", default="cpu")
    arguments = parser.parse_args()
    predictor = Predictor.load(arguments.run, device=arguments.device)
    cases = find_cases(arguments.data, require_labels=True).cases
    if arguments.cases:
        wanted = arguments.cases.read_text(encoding="utf-8").split()
        cases = tuple(case for case in cases if case.id in wanted)
    modalities = predictor.card.modalities
    complete = [case for case in cases if set(modalities) <= set(case.images)]
    if not complete:
        parser.error(f"{arguments.data} has no case with all of {', '.join(modalities)}")
    dropout = predictor.segmentation.modality_dropout
    print(f"Mean Dice of {len(complete)} cases; modality dropout in training: {dropout:g}\n")
    names = [output.name for output in predictor.card.outputs if output.label]
    print_row((*modalities, *names))
    print_row((*(":---:",) * len(modalities), *("---:",) * len(names)))
    for available in sets_of(modalities):
        dice = np.mean([score(predictor, case, available) for case in complete], axis=0)
        print_row((*("x" if name in available else "" for name in modalities), *(f"{value:.3f}" for value in dice)))


def sets_of(modalities: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every set with at least one modality, small ones first."""
    for count in range(1, len(modalities) + 1):
        yield from itertools.combinations(modalities, count)


def score(predictor: Predictor, case: Case, available: Sequence[str]) -> list[float]:
    """Dice of each output of one case of which only these modalities are there."""
    images = {name: file for name, file in case.images.items() if name in available}
    loaded = load_case(
        dataclasses.replace(case, images=images), predictor.card.modalities, predictor.scheme, allow_missing=True
    )
    if loaded.labels is None:
        raise ValueError(f"{case.id} has no reference")
    regions = {output.name: output.members for output in predictor.card.outputs if output.label}
    found = dice_by_region(predictor.predict_loaded(loaded).labels, loaded.labels, regions)
    return [1.0 if math.isnan(value) else value for value in found.values()]


def print_row(cells: Sequence[str]) -> None:
    """One row of a Markdown table, at once: a table takes a while."""
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
