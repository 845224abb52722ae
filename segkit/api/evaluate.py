"""`segkit.evaluate`: scores of masks against references."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from segkit.api.arguments import AnyPath, CaseIds, read_case_ids
from segkit.errors import RequestError

if TYPE_CHECKING:
    from segkit.evaluation.scores import Evaluation


def evaluate(
    predictions: AnyPath,
    references: AnyPath,
    out: AnyPath | None = None,
    *,
    protocol: str = "legacy",
    challenge: str | None = None,
    cases: CaseIds | None = None,
    missing: Literal["skip", "zero"] = "skip",
    label_scheme: str | None = None,
    prediction_scheme: str | None = None,
    roi: AnyPath | None = None,
    probabilities: AnyPath | None = None,
    figures: int = 0,
) -> Evaluation:
    """Score masks (a folder of `<case>.nii.gz`, or one file) against a dataset, a folder of masks, or one mask.

    `evaluation.summary[region][metric]` has `mean`, `median`, `n` and 95 % intervals over cases (Dice 0 to 1, distances
    in mm), `evaluation.cases` the scores of each case, `evaluation.errors` the cases that could not be scored. With
    `out`, scores.json, scores.csv and summary.md are written, and pictures of the `figures` worst cases. `protocol` is
    "legacy", "brats2023" or "brats2026". The other arguments are the options of `segkit evaluate`.

    Raises:
        RequestError: nothing can be paired, or an argument is wrong.
        DataError: `out` cannot be written.

    Example:
        >>> scores = segkit.evaluate("masks", "data")  # doctest: +SKIP
        >>> scores.summary["WT"]["dice"]["mean"]  # doctest: +SKIP
        0.91
    """
    from segkit.evaluation.score_folder import evaluate_folders

    if figures and out is None:
        raise RequestError("--figures needs a folder to write to", remedy="Add -o OUT")
    evaluation = evaluate_folders(
        Path(predictions),
        Path(references),
        protocol=protocol,
        challenge=challenge,
        case_ids=read_case_ids(cases),
        missing=missing,
        label_scheme=label_scheme,
        prediction_scheme=prediction_scheme,
        roi=None if roi is None else str(roi),
        probabilities=None if probabilities is None else Path(probabilities),
    )
    if out is not None:
        _write(evaluation, Path(out), figures)
    return evaluation


def _write(evaluation: Evaluation, folder: Path, figures: int) -> None:
    from segkit.report.figures import draw_worst_cases, drawing, reliability_figure

    evaluation.write(folder)
    if evaluation.reliability:
        path = folder / "figures" / "reliability.png"
        with drawing(path):
            reliability_figure(path, evaluation.reliability)
    if figures:
        draw_worst_cases(evaluation, folder / "figures", figures)
