"""Reading scores.json, for pages and comparisons; no metric is computed here."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from segkit.errors import DataError, RequestError, as_request
from segkit.reading.files import read_json
from segkit.reading.layouts.schemes import patient_of

SCORES_NAME = "scores.json"

_REMEDY = "Give what `segkit evaluate -o FOLDER` wrote: the folder, or its scores.json"


def worst_first(cases: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Case ids by their mean Dice over regions, lowest first, then by id.

    A case whose Dice is undefined in all regions counts as perfect: it has nothing to segment.
    """

    def key(case_id: str) -> tuple[float, str]:
        dice = [scores.get("dice", math.nan) for scores in cases[case_id].values()]
        defined = [value for value in dice if not math.isnan(value)]
        return (sum(defined) / len(defined) if defined else 1.0, case_id)

    return sorted(cases, key=key)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class ScoredCase(_Strict):
    """An entry of "cases": a null score is infinite if `infinite` (region -> metrics) lists it, else undefined.

    A missing case had no usable prediction; `patient` is absent where it is the case id.
    """

    case: str
    regions: dict[str, dict[str, float | None]]
    infinite: dict[str, list[str]] = {}
    patient: str | None = None
    missing: bool = False

    def scores(self) -> dict[str, dict[str, float]]:
        """Region -> metric -> value, NaN where undefined."""
        return {
            region: {metric: self._value(region, metric, value) for metric, value in scores.items()}
            for region, scores in self.regions.items()
        }

    def _value(self, region: str, metric: str, value: float | None) -> float:
        if value is not None:
            return value
        return math.inf if metric in self.infinite.get(region, ()) else math.nan


class Failure(_Strict):
    """An entry of "errors"."""

    case: str
    error: str = "could not be scored"


class Scheme(_Strict):
    """The label scheme, as `LabelScheme.to_json` wrote it."""

    name: str
    labels: dict[str, int] = {}


class ScoresDocument(_Strict):
    """scores.json; fields that earlier versions did not write, and that a comparison does not need, may be missing.

    `summary` and `reliability` are not validated. `predictions` and `references` are the paths to these from the folder
    of the document.
    """

    protocol: str
    challenge: str | None = None
    headline: list[str] = []
    label_scheme: Scheme | None = None
    roi: str | None = None
    cases: list[ScoredCase]
    summary: dict[str, dict[str, Any]] = {}
    intervals: str = ""
    reliability: dict[str, dict[str, Any]] = {}
    errors: list[Failure] = []
    unscored: list[str] = []
    surplus: list[str] = []
    notes: list[str] = []
    predictions: str | None = None
    references: str | None = None


def read_document(path: Path) -> ScoresDocument:
    """A scores.json as it was written.

    Raises:
        RequestError: the file is missing or damaged, or holds a case twice.
    """
    try:
        document = ScoresDocument.model_validate(read_json(path, remedy=_REMEDY, most_bytes=None))
    except DataError as error:
        raise as_request(error) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        reason, _, _ = first["msg"].partition(" or instance of ")  # without the name of a class
        raise RequestError(f"is not a valid scores.json ({place}: {reason})", where=path, remedy=_REMEDY) from error
    twice = [case for case, count in Counter(entry.case for entry in document.cases).items() if count > 1]
    if twice:
        raise RequestError(f"holds case {twice[0]} twice", where=path, remedy=_REMEDY)
    return document


@dataclass(frozen=True)
class ScoreSet:
    """The scores of one model, for comparisons.

    `cases` maps a case id to region, metric and value, which is NaN where undefined and may be infinite; `failed` are
    the cases that had a reference and got no scores; `patients` maps every case id to its patient.
    """

    name: str
    path: Path
    protocol: str
    challenge: str | None
    label_scheme: str | None
    roi: str | None
    cases: Mapping[str, Mapping[str, Mapping[str, float]]]
    failed: frozenset[str]
    patients: Mapping[str, str]

    @property
    def regions(self) -> list[str]:
        """The regions of any case, in order of first appearance."""
        return list(dict.fromkeys(region for regions in self.cases.values() for region in regions))

    @property
    def metrics(self) -> list[str]:
        """The metrics of any region, in order of first appearance."""
        scores = (metrics for regions in self.cases.values() for metrics in regions.values())
        return list(dict.fromkeys(metric for metrics in scores for metric in metrics))

    def value(self, case: str, region: str, metric: str) -> float:
        """One score, NaN where it is undefined or was not computed."""
        return self.cases.get(case, {}).get(region, {}).get(metric, math.nan)


def read_score_sets(paths: Sequence[Path]) -> list[ScoreSet]:
    """Several models, each named after its folder, or by the given path where folders share a name.

    Raises:
        RequestError: one is given twice, missing, damaged, or has no scores at all.
    """
    models = [read_scores(path) for path in paths]
    twice = [str(file) for file, count in Counter(model.path.resolve() for model in models).items() if count > 1]
    if twice:
        raise RequestError(f"{', '.join(twice)} is given more than once", remedy="Name each model once")
    named = Counter(model.name for model in models)
    pairs = zip(paths, models, strict=True)
    return [replace(model, name=str(path)) if named[model.name] > 1 else model for path, model in pairs]


def read_scores(path: Path) -> ScoreSet:
    """The scores of a folder with a scores.json, named after it, or of such a file under another name.

    Raises:
        RequestError: the file is missing, damaged or holds no scores.
    """
    path = path / SCORES_NAME if path.is_dir() else path
    document = read_document(path)
    if not document.cases:
        raise RequestError("holds no scored case", where=path, remedy=_REMEDY)
    failed = frozenset([*(failure.case for failure in document.errors), *document.unscored])
    given = {entry.case: entry.patient for entry in document.cases}
    return ScoreSet(
        name=path.resolve().parent.name if path.name == SCORES_NAME else path.stem,
        path=path,
        protocol=document.protocol,
        challenge=document.challenge,
        label_scheme=None if document.label_scheme is None else document.label_scheme.name,
        roi=document.roi,
        cases={entry.case: entry.scores() for entry in document.cases},
        failed=failed - given.keys(),
        patients={case: given.get(case) or patient_of(case) for case in (*given, *failed)},
    )
