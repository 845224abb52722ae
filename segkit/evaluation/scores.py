"""The scores of an evaluation, case by case, and the files they are written to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segkit.errors import some
from segkit.evaluation.probabilities import RegionReliability, reliability_tables
from segkit.evaluation.score_files import (
    SCORES_NAME,
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
from segkit.reading.files import way_to

if TYPE_CHECKING:
    from segkit.evaluation.pairing import Pairing


@dataclass(frozen=True)
class CaseScores:
    """Scores of one case: region name -> metric name -> value, NaN where undefined.

    A missing case has no usable prediction and the worst scores. `lesions` of the reference are by region, `patient` is
    shared by the time points, or the eyes, of a person, and `reliability` has the regions with probabilities.
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
        found = {region: [name for name in own if math.isinf(own[name])] for region, own in self.regions.items()}
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
        if counts := Counter(f"{region} {metric}" for region, metrics in infinite for metric in metrics):
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
