"""What an evaluation found: scores case by case, their summary, and what a reader must know of them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from segkit.errors import some
from segkit.evaluation.companions import RegionReliability
from segkit.evaluation.reliability import pool, reliability_figure, reliability_json
from segkit.evaluation.tables import Summary, markdown_table, markdown_text, scores_csv, summarise, summary_rows
from segkit.labels import LabelScheme
from segkit.metrics.lesions import Lesion, Scores
from segkit.metrics.protocols import rules_of
from segkit.reading.files import way_to, written_atomically

SCORES_NAME = "scores.json"


@dataclass(frozen=True)
class CaseScores:
    """Scores of one case: region name -> metric name -> value, NaN where undefined.

    `is_missing` says that there was no usable prediction and that the case was given the worst scores. `lesions` lists
    those of the reference by region, where the protocol looks at single ones. `patient` is the one that other time
    points, or the other eye, share; `reliability` is there for the regions with probabilities.
    """

    case: str
    regions: dict[str, Scores]
    is_missing: bool = False
    lesions: Mapping[str, tuple[Lesion, ...]] = field(default_factory=dict)
    patient: str = ""
    reliability: Mapping[str, RegionReliability] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_folders` found.

    `errors` maps a case id to a sentence; `unscored` are references without a prediction that were left out;
    `surplus` are predictions that belong to no reference; `remarks` are the notes of the pairing. `roi` names the
    regions of interest outside which nothing was scored, None where all was.
    """

    protocol: str
    challenge: str | None
    label_scheme: LabelScheme
    cases: tuple[CaseScores, ...]
    errors: dict[str, str]
    unscored: tuple[str, ...] = ()
    surplus: tuple[Path, ...] = ()
    remarks: tuple[str, ...] = ()
    roi: str | None = None
    sources: Mapping[str, Path] = field(default_factory=dict)
    """Where "predictions" and "references" are."""

    def summary(self) -> Summary:
        """Region name -> metric name -> statistics over the scored cases; undefined values are left out."""
        return self._summary

    @cached_property
    def _summary(self) -> Summary:
        return summarise((case.regions for case in self.cases), [case.patient or case.case for case in self.cases])

    def to_json(self) -> dict[str, Any]:
        """The document of `segkit evaluate --json`, strict JSON: a value that is undefined or infinite is null.

        A case with infinite values lists them under "infinite", region -> metrics; `scores_from_json` is the way back.
        """
        return {
            "protocol": self.protocol,
            "challenge": self.challenge,
            "headline": self.headline(),
            "label_scheme": self.label_scheme.to_json(),
            "roi": self.roi,
            "cases": [_case_to_json(case) for case in self.cases],
            "summary": self.summary(),
            "intervals": self.intervals(),
            "reliability": reliability_json(pool(case.reliability for case in self.cases)),
            "errors": [{"case": case, "error": error} for case, error in self.errors.items()],
            "unscored": list(self.unscored),
            "surplus": [path.name for path in self.surplus],
            "notes": list(self.remarks),
        }

    def headline(self) -> list[str]:
        """The metrics that a table for people shows: those of the protocol, and what was asked for besides."""
        present = {metric for case in self.cases for scores in case.regions.values() for metric in scores}
        wanted = (*rules_of(self.protocol, self.challenge).headline, "auc", "ece_box")
        return [metric for metric in wanted if metric in present]

    def where(self) -> str:
        """Where was scored, for a heading: nothing where it was everywhere."""
        return "" if self.roi is None else f", inside the regions of interest {self.roi}"

    def intervals(self) -> str:
        """How the intervals of the summary came about, for a heading."""
        patients = len({case.patient or case.case for case in self.cases})
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
        if self.surplus:
            names = some([path.name for path in self.surplus])
            notes.append(f"{len(self.surplus)} files belong to no reference and are not scored: {names}")
        infinite = Counter(
            f"{region} {metric}"
            for case in self.cases
            for region, metrics in _infinite(case.regions).items()
            for metric in metrics
        )
        if infinite:
            told = ", ".join(f"{name} in {count} cases" for name, count in infinite.items())
            notes.append(f"infinite values are not in the means: {told}")
        return [*notes, *self.remarks]

    def write(self, folder: Path) -> None:
        """Write scores.json, scores.csv (a row per case and region) and summary.md into `folder`.

        scores.json also tells the ways from there to predictions and references, by which `segkit report` finds them.
        Where there are probabilities, figures/reliability.png shows whether they mean what they say.

        Raises:
            DataError: the folder cannot be written.
        """
        columns, rows = summary_rows(self.summary(), self.headline())
        ways = {name: way for name, path in self.sources.items() if (way := way_to(path, folder)) is not None}
        notes = "".join(f"- {markdown_text(note)}\n" for note in self.notes())
        texts = {
            SCORES_NAME: json.dumps(self.to_json() | ways, indent=2, allow_nan=False, ensure_ascii=False) + "\n",
            "scores.csv": scores_csv({case.case: case.regions for case in self.cases}),
            "summary.md": f"Protocol {self.protocol}{markdown_text(self.where())}; mean (median) over cases. "
            f"{self.intervals()}.\n\n" + markdown_table(columns, rows) + (f"\n{notes}" if notes else ""),
        }
        for name, text in texts.items():
            with written_atomically(folder / name) as temporary:
                # File names that are not UTF-8 reach Python as lone surrogates, which JSON too escapes as `\udce9`.
                temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        reliability = pool(case.reliability for case in self.cases)
        if reliability:
            with written_atomically(folder / "figures" / "reliability.png") as temporary:
                reliability_figure(temporary, reliability)


def scores_from_json(case: Mapping[str, Any]) -> dict[str, Scores]:
    """The scores of an entry of "cases" in `scores.json`: undefined ones are NaN again, infinite ones infinite."""
    infinite = case.get("infinite", {})
    return {
        region: {
            metric: value if value is not None else math.inf if metric in infinite.get(region, ()) else math.nan
            for metric, value in scores.items()
        }
        for region, scores in case["regions"].items()
    }


def worst_first(cases: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Case ids by their mean Dice over regions, lowest first, then by id.

    A case whose Dice is undefined in all regions counts as perfect: nothing was there to be found.
    """

    def key(case_id: str) -> tuple[float, str]:
        dice = [scores.get("dice", math.nan) for scores in cases[case_id].values()]
        defined = [value for value in dice if not math.isnan(value)]
        return (sum(defined) / len(defined) if defined else 1.0, case_id)

    return sorted(cases, key=key)


def _case_to_json(case: CaseScores) -> dict[str, Any]:
    regions = {
        region: {metric: value if math.isfinite(value) else None for metric, value in scores.items()}
        for region, scores in case.regions.items()
    }
    document: dict[str, Any] = {"case": case.case, "regions": regions}
    if infinite := _infinite(case.regions):
        document["infinite"] = infinite
    if case.lesions:
        document["lesions"] = {
            region: [lesion.to_json() for lesion in lesions] for region, lesions in case.lesions.items()
        }
    if case.patient not in ("", case.case):
        document["patient"] = case.patient
    return document | {"missing": True} if case.is_missing else document


def _infinite(regions: Mapping[str, Scores]) -> dict[str, list[str]]:
    """Region -> the metrics that are infinite there, for the regions that have any."""
    found = {
        region: [name for name, value in scores.items() if math.isinf(value)] for region, scores in regions.items()
    }
    return {region: names for region, names in found.items() if names}
