"""The scores of an evaluation, case by case, and the files they are written to and read back from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from segkit.errors import DataError, RequestError, as_request, some
from segkit.evaluation.probabilities import RegionReliability, reliability_tables
from segkit.evaluation.tables import (
    Summary,
    markdown_list,
    markdown_table,
    markdown_text,
    scores_csv,
    summarise,
    summary_rows,
    write_documents,
)
from segkit.metrics.lesions import Lesion, Scores
from segkit.metrics.protocols import rules_of
from segkit.reading.files import read_json, way_to
from segkit.reading.layouts.schemes import patient_of

if TYPE_CHECKING:
    from segkit.evaluation.pairing import Pairing

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


@dataclass(frozen=True)
class CaseScores:
    """Scores of one case: region name -> metric name -> value, NaN where undefined.

    A missing case has no usable prediction and the worst scores. `lesions` are those of the reference by region, where
    the protocol scores single ones. `patient` is shared by the time points, or the eyes, of a person. `reliability` has
    an entry for each region with probabilities.
    """

    case: str
    regions: dict[str, Scores]
    is_missing: bool = False
    lesions: Mapping[str, tuple[Lesion, ...]] = field(default_factory=dict)
    patient: str = ""
    reliability: Mapping[str, RegionReliability] = field(default_factory=dict, repr=False)

    @property
    def infinite(self) -> dict[str, list[str]]:
        """Region -> its infinite metrics, for the regions that have any."""
        found = {
            region: [name for name, value in scores.items() if math.isinf(value)]
            for region, scores in self.regions.items()
        }
        return {region: names for region, names in found.items() if names}

    def to_json(self) -> dict[str, Any]:
        """The entry of "cases" in scores.json, see `ScoredCase`: undefined and infinite values are null."""
        regions = {
            region: {metric: value if math.isfinite(value) else None for metric, value in scores.items()}
            for region, scores in self.regions.items()
        }
        optional = {
            "infinite": self.infinite,
            "lesions": {region: [lesion.to_json() for lesion in lesions] for region, lesions in self.lesions.items()},
            "patient": self.patient if self.patient != self.case else "",
            "missing": self.is_missing,
        }
        return {"case": self.case, "regions": regions} | {key: value for key, value in optional.items() if value}


@dataclass(frozen=True)
class Evaluation:
    """The scores of the pairs of two folders.

    `errors` maps a case id to a sentence; `unscored` are references without a prediction that were left out. `roi`
    names the regions of interest that scores were restricted to, None is the whole image.
    """

    pairing: Pairing
    protocol: str
    cases: tuple[CaseScores, ...]
    errors: dict[str, str]
    unscored: tuple[str, ...] = ()
    roi: str | None = None

    @cached_property
    def _patients(self) -> list[str]:
        return [case.patient or case.case for case in self.cases]

    @cached_property
    def summary(self) -> Summary:
        """Region name -> metric name -> statistics over the scored cases; undefined values are left out."""
        return summarise((case.regions for case in self.cases), self._patients)

    @cached_property
    def reliability(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Calibration tables of the regions with probabilities, see `reliability_tables`."""
        return reliability_tables(case.reliability for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """The document of `segkit evaluate --json`, strict JSON, see `ScoresDocument`."""
        return {
            "protocol": self.protocol,
            "challenge": self.pairing.challenge,
            "headline": self.headline(),
            "label_scheme": self.pairing.scheme.to_json(),
            "roi": self.roi,
            "cases": [case.to_json() for case in self.cases],
            "summary": self.summary,
            "intervals": self.intervals(),
            "reliability": self.reliability,
            "errors": [{"case": case, "error": error} for case, error in self.errors.items()],
            "unscored": list(self.unscored),
            "surplus": [path.name for path in self.pairing.surplus],
            "notes": list(self.pairing.notes),
        }

    def headline(self) -> list[str]:
        """The metrics of printed tables: those of the protocol, and those of probabilities if there are any."""
        present = {metric for case in self.cases for scores in case.regions.values() for metric in scores}
        wanted = (*rules_of(self.protocol, self.pairing.challenge).headline, "auc", "ece_box")
        return [metric for metric in wanted if metric in present]

    def where(self) -> str:
        """The restriction to regions of interest, for a heading; empty without one."""
        return "" if self.roi is None else f", inside the regions of interest {self.roi}"

    def intervals(self) -> str:
        """How the intervals of the summary were computed, for a heading."""
        patients = len(set(self._patients))
        drawn = f"patient ({patients})" if patients < len(self.cases) else "case"
        return f"95 % CI of the mean: bootstrap by {drawn}"

    def notes(self) -> list[str]:
        """What a reader of the scores must know: cases that are not in them, and why."""
        notes = [f"{case}: {error}" for case, error in self.errors.items()]
        missing = [case.case for case in self.cases if case.is_missing]
        if missing:
            notes.append(f"{len(missing)} cases without a usable prediction have the worst scores: {some(missing)}")
        if self.unscored:
            notes.append(
                f"{len(self.unscored)} references have no prediction and are NOT in these scores: "
                f"{some(self.unscored)}. Give them the worst scores with --missing zero"
            )
        if self.pairing.surplus:
            names = some(path.name for path in self.pairing.surplus)
            notes.append(f"{len(self.pairing.surplus)} files belong to no reference and are not scored: {names}")
        infinite = [(region, metrics) for case in self.cases for region, metrics in case.infinite.items()]
        counts = Counter(f"{region} {metric}" for region, metrics in infinite for metric in metrics)
        if counts:
            listed = ", ".join(f"{name} in {count} cases" for name, count in counts.items())
            notes.append(f"infinite values are not in the means: {listed}")
        return [*notes, *self.pairing.notes]

    def write(self, folder: Path) -> None:
        """Write scores.json, scores.csv (a row per case and region) and summary.md into `folder`.

        scores.json also has the relative paths to predictions and references, with which `segkit report` finds them.

        Raises:
            DataError: the folder cannot be written.
        """
        paths = {name: way_to(path, folder) for name, path in self.pairing.sources.items()}
        place = markdown_text(self.where())
        heading = f"Protocol {self.protocol}{place}; mean (median) over cases. {self.intervals()}."
        table = markdown_table(*summary_rows(self.summary, self.headline()))
        documents: dict[str, str | Mapping[str, Any]] = {
            SCORES_NAME: self.to_json() | {name: path for name, path in paths.items() if path is not None},
            "scores.csv": scores_csv({case.case: case.regions for case in self.cases}),
            "summary.md": f"{heading}\n\n{table}{markdown_list(self.notes())}",
        }
        write_documents(folder, documents)


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
