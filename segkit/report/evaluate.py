"""Scoring a folder of masks against references: per case, per region, with a summary.

Prediction and reference are each decoded in their own label scheme, so that masks of different BraTS years compare by
tissue. A case that cannot be scored becomes an error of its own and does not stop the others.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from segkit.data.files import read_labels, read_volume, written_atomically
from segkit.data.geometry import same_grid
from segkit.data.layouts.schemes import present_values
from segkit.data.volume import Grid
from segkit.errors import DataError, RequestError
from segkit.labels import LabelScheme, outputs_of, translate
from segkit.metrics.lesions import Lesion
from segkit.metrics.protocols import rules_of, score_absent, score_case
from segkit.metrics.region import Scores
from segkit.report.companions import Companions, RegionReliability, find_companions
from segkit.report.figures import BACKGROUNDS, overlay_figure
from segkit.report.pairing import Pair, Pairing, pair_folders
from segkit.report.reliability import pool, reliability_figure, reliability_json
from segkit.report.tables import Summary, markdown_table, markdown_text, scores_csv, summarise, summary_rows
from segkit.shapes import LabelMap

Missing = Literal["skip", "zero"]
"""What a reference without a prediction is worth: left out of the scores, or the worst score of every metric."""

_log = logging.getLogger(__name__)

_PED_TISSUES = {"NETC": ("NET",), "ED": ("ED",)}
"""Regions that the paediatric challenge scores besides those a network has outputs for (BraTS-PED 2024 and later)."""


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
            notes.append(f"{len(missing)} cases without a usable prediction have the worst scores: {_some(missing)}")
        if self.unscored:
            notes.append(
                f"{len(self.unscored)} references have no prediction and are NOT in these scores: "
                f"{_some(self.unscored)}. Give them the worst scores with --missing zero"
            )
        if self.surplus:
            names = _some([path.name for path in self.surplus])
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

        Where there are probabilities, figures/reliability.png shows whether they mean what they say.

        Raises:
            DataError: the folder cannot be written.
        """
        columns, rows = summary_rows(self.summary(), self.headline())
        notes = "".join(f"- {markdown_text(note)}\n" for note in self.notes())
        texts = {
            "scores.json": json.dumps(self.to_json(), indent=2, allow_nan=False, ensure_ascii=False) + "\n",
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


def evaluate_folders(
    predictions: Path,
    references: Path,
    *,
    protocol: str = "legacy",
    challenge: str | None = None,
    case_ids: Collection[str] | None = None,
    missing: Missing = "skip",
    label_scheme: str | None = None,
    prediction_scheme: str | None = None,
    roi: str | None = None,
    probabilities: Path | None = None,
) -> Evaluation:
    """Score a folder (or file) of masks against the references of a dataset, a folder of masks or a file.

    See `pair_folders` for how files are paired and `PROTOCOLS` for what is computed. `roi` (see `find_rois`) restricts
    all scores to a region of interest; a folder of `probabilities` adds the area under the ROC curve and calibration
    (`segkit.metrics.calibration`).

    Raises:
        RequestError: the protocol or challenge is unknown, or nothing could be paired; nothing was scored.
    """
    pairing = pair_folders(
        predictions,
        references,
        challenge=challenge,
        case_ids=case_ids,
        label_scheme=label_scheme,
        prediction_scheme=prediction_scheme,
    )
    companions = companions_of(pairing, references, roi=roi, probabilities=probabilities)
    return evaluate_pairs(pairing, protocol=protocol, missing=missing, companions=companions)


def companions_of(
    pairing: Pairing, references: Path, *, roi: str | None = None, probabilities: Path | None = None
) -> Companions:
    """The regions of interest and probabilities of the cases of a pairing, so far as they are asked for.

    Raises:
        RequestError: there are none, or two for one case.
    """
    cases = [pair.reference for pair in pairing.pairs]
    return find_companions(cases, references, regions_of(pairing.scheme), roi=roi, probabilities=probabilities)


def evaluate_pairs(
    pairing: Pairing,
    *,
    protocol: str = "legacy",
    missing: Missing = "skip",
    companions: Companions | None = None,
) -> Evaluation:
    """Score the pairs of two folders, inside the regions of interest of `companions` and with its probabilities.

    Raises:
        RequestError: the protocol is unknown, or has no rules for the challenge.
    """
    regions = scored_regions(pairing.scheme, protocol, pairing.challenge)
    companions = companions or Companions()
    cases: list[CaseScores] = []
    errors: dict[str, str] = {}
    unscored: list[str] = []
    for pair in pairing.pairs:
        case_id = pair.reference.id
        complaint = pairing.ambiguous.get(case_id)
        if pair.prediction is None and complaint is None and missing == "skip":
            unscored.append(case_id)
            continue
        try:
            reference, grid = read_reference(pair, pairing.scheme)
        except DataError as error:
            errors[case_id] = str(error)
            continue
        if pair.prediction is not None:
            try:
                cases.append(_score_pair(pair, reference, grid, pairing, protocol, companions))
            except DataError as error:
                complaint = str(error)
            else:
                _log.debug("scored %s", case_id)
                continue
        if complaint is not None:
            errors[case_id] = complaint
        if missing == "zero":
            absent = score_absent(grid.shape, grid.spacing_mm, regions, protocol=protocol, challenge=pairing.challenge)
            for region, worst in companions.worst_scores().items():
                absent[region] |= worst
            cases.append(CaseScores(case_id, absent, is_missing=True, patient=pair.reference.patient))
    return Evaluation(
        protocol=protocol,
        challenge=pairing.challenge,
        label_scheme=pairing.scheme,
        cases=tuple(cases),
        errors=errors,
        unscored=tuple(unscored),
        surplus=pairing.surplus,
        remarks=pairing.notes,
        roi=companions.roi,
    )


def regions_of(scheme: LabelScheme) -> dict[str, tuple[int, ...]]:
    """What is scored in a label scheme: its regions, or its classes without the background -> label values."""
    regions = {output.name: output.members for output in outputs_of(scheme) if output.label != 0}
    return regions | (_tissue_regions(scheme, _PED_TISSUES) if scheme.name == "brats-ped" else {})


def scored_regions(scheme: LabelScheme, protocol: str, challenge: str | None) -> dict[str, tuple[int, ...]]:
    """What a protocol scores in a label scheme: its regions, and the single tissues that it asks for besides.

    Raises:
        RequestError: the protocol is unknown, or has no rules for the challenge.
    """
    return regions_of(scheme) | _tissue_regions(scheme, rules_of(protocol, challenge).tissues)


def _tissue_regions(scheme: LabelScheme, tissues: Mapping[str, Collection[str]]) -> dict[str, tuple[int, ...]]:
    """Region name -> the values of those of its tissues that the scheme has; left out where it has none."""
    members = {
        region: tuple(sorted(scheme.values[tissue] for tissue in parts if tissue in scheme.values))
        for region, parts in tissues.items()
    }
    return {region: values for region, values in members.items() if values}


def read_reference(pair: Pair, scheme: LabelScheme) -> tuple[LabelMap, Grid]:
    """The reference mask of a pair and its grid.

    Raises:
        DataError: the file is unusable or holds values that its scheme does not know.
    """
    label = pair.reference.label
    if label is None:
        raise ValueError(f"case {pair.reference.id} has no reference")
    labels, grid = read_labels(label.path, label.channel)
    _require_known(labels, scheme, label.path, "--label-scheme")
    return labels, grid


def read_prediction(pair: Pair, grid: Grid) -> LabelMap:
    """The predicted mask of a pair, which must lie on the grid of the reference.

    Raises:
        DataError: the file is unusable, lies on another grid, or holds values that its scheme does not know.
    """
    if pair.prediction is None:
        raise ValueError(f"case {pair.reference.id} has no prediction")
    labels, own_grid = read_labels(pair.prediction)
    difference = same_grid(own_grid, grid)
    if difference is not None:
        remedy = "Scores compare voxel by voxel: bring the prediction back to the grid of the scan it was made from"
        raise DataError(difference, where=pair.prediction, remedy=remedy)
    _require_known(labels, pair.scheme, pair.prediction, "--prediction-scheme")
    return labels


def draw_worst_cases(evaluation: Evaluation, pairing: Pairing, folder: Path, count: int) -> list[Path]:
    """Draw the `count` cases with the lowest mean Dice over regions that have an image: `folder/<case>.png`.

    Raises:
        RequestError: the references are masks without images.
    """
    pairs = {pair.reference.id: pair for pair in pairing.pairs if pair.reference.images and pair.prediction}
    if not pairs:
        raise RequestError(
            "figures need images, and the references are masks only", remedy="Give the dataset folder as reference"
        )
    drawable = [case for case in evaluation.cases if case.case in pairs and not case.is_missing]
    paths = []
    for case in sorted(drawable, key=_mean_dice)[:count]:
        path = folder / f"{case.case}.png"
        try:
            _draw(path, pairs[case.case], pairing.scheme, case)
        except DataError as error:  # the scores stand without the picture
            _log.warning("no picture of %s: %s", case.case, error)
        else:
            paths.append(path)
    return paths


def _score_pair(
    pair: Pair, reference: LabelMap, grid: Grid, pairing: Pairing, protocol: str, companions: Companions
) -> CaseScores:
    scheme, challenge = pairing.scheme, pairing.challenge
    regions, predicted = (scored_regions(each, protocol, challenge) for each in (scheme, pair.scheme))
    if not regions.keys() & predicted.keys():
        raise DataError(
            f"the mask is in label scheme {pair.scheme.name}, which shares no region with {scheme.name}",
            where=pair.prediction,
            remedy="Name the right one with --prediction-scheme",
        )
    members = {name: predicted.get(name, ()) for name in regions}  # what a scheme lacks was not predicted
    prediction = read_prediction(pair, grid)
    case_id = pair.reference.id
    roi = companions.region_of_interest(case_id, reference, grid)
    found = score_case(
        prediction,
        reference,
        grid.spacing_mm,
        regions,
        protocol=protocol,
        challenge=challenge,
        prediction_regions=members,
        roi=roi,
    )
    scores = {region: scored.scores for region, scored in found.items()}
    probable = companions.score_probabilities(case_id, reference, grid, regions, roi)
    for region, own in probable.items():
        scores[region] |= own.scores
    return CaseScores(
        case_id,
        scores,
        lesions={region: scored.lesions for region, scored in found.items() if scored.lesions},
        patient=pair.reference.patient,
        reliability={region: own.reliability for region, own in probable.items() if own.reliability is not None},
    )


def _require_known(labels: LabelMap, scheme: LabelScheme, path: Path, option: str) -> None:
    values = {0, *scheme.values.values()}
    if values.issuperset(range(int(labels.max()) + 1)):  # nearly always, and found out in no time
        return
    stray = sorted(present_values(labels) - values)
    if stray:
        known = ", ".join(f"{value} {tissue}" for tissue, value in scheme.values.items())
        raise DataError(
            f"holds label values {', '.join(map(str, stray))}",
            where=path,
            expected=f"those of label scheme {scheme.name}: {known}",
            remedy=f"Name the right scheme with {option}",
        )


def _draw(path: Path, pair: Pair, scheme: LabelScheme, scores: CaseScores) -> None:
    reference, grid = read_reference(pair, scheme)
    images = pair.reference.images
    name = next((modality for modality in BACKGROUNDS if modality in images), next(iter(images)))
    image = read_volume(images[name].path, images[name].channel)
    difference = same_grid(image.grid, grid)
    if difference is not None:
        raise DataError(difference, where=images[name].path)
    dice = ", ".join(f"{region} {metrics['dice']:.3f}" for region, metrics in scores.regions.items())
    overlay_figure(
        path,
        image.array,
        translate(read_prediction(pair, grid), pair.scheme, scheme),
        grid,
        reference=reference,
        names={value: tissue for tissue, value in scheme.values.items()},
        title=f"{scores.case} ({name})  Dice: {dice}",
    )


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


def _mean_dice(case: CaseScores) -> float:
    """The mean over regions; 1 where it is undefined in all, for nothing was there to be found."""
    defined = [metrics["dice"] for metrics in case.regions.values() if not math.isnan(metrics["dice"])]
    return float(np.mean(defined)) if defined else 1.0


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


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:5]) + (", ..." if len(names) > 5 else "")
