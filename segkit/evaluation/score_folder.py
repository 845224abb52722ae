"""Scoring a folder of masks against references: per case, per region, with a summary.

Prediction and reference are each decoded in their own label scheme, so that masks of different BraTS years are compared
by tissue. A case that cannot be scored becomes an error of its own and does not stop the others.
"""

import logging
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from segkit.errors import DataError
from segkit.evaluation.pairing import Pair, Pairing, pair_folders
from segkit.evaluation.probabilities import (
    PROBABILITY_METRICS,
    RegionReliability,
    find_probabilities,
    score_probabilities,
)
from segkit.evaluation.roi import find_rois, read_roi
from segkit.evaluation.scores import CaseScores, Evaluation
from segkit.labels import LabelScheme, outputs_of
from segkit.metrics.overlap import region_mask
from segkit.metrics.protocols import rules_of, score_absent, score_case
from segkit.metrics.registry import METRICS
from segkit.reading.files import read_grid, read_labels, read_reference
from segkit.reading.geometry import onto_grid, same_grid
from segkit.reading.layouts.schemes import present_values
from segkit.reading.volume import Grid, log_notes
from segkit.shapes import LabelMap, Mask

Missing = Literal["skip", "zero"]
"""The scores of a reference without a prediction: none, or the worst of every metric."""

_log = logging.getLogger(__name__)

_PED_TISSUES = {"NETC": ("NET",), "ED": ("ED",)}
"""Regions that the paediatric challenge scores but networks have no outputs for (BraTS-PED 2024 and later)."""


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

    See `pair_folders` for the pairing of files and `PROTOCOLS` for the metrics. `roi` (see `find_rois`) restricts all
    scores to a region of interest; a folder of `probabilities` adds the area under the ROC curve and calibration.

    Raises:
        RequestError: protocol or challenge is unknown, or the protocol has no rules for the challenge; nothing could be
            paired; there are no regions of interest or probabilities of these cases, or two files for one case.
    """
    pairing = pair_folders(
        predictions,
        references,
        challenge=challenge,
        case_ids=case_ids,
        label_scheme=label_scheme,
        prediction_scheme=prediction_scheme,
    )
    scorer = _Scorer(pairing, protocol, roi, probabilities)
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
            reference, grid = _read_reference(pair, pairing.scheme)
        except DataError as error:
            errors[case_id] = str(error)
            continue
        try:
            if pair.prediction is not None:
                cases.append(scorer.score(pair, pair.prediction, reference, grid))
                _log.debug("scored %s", case_id)
                continue
        except DataError as error:
            complaint = str(error)
        if complaint is not None:
            errors[case_id] = complaint
        if missing == "zero":
            cases.append(scorer.score_missing(pair, grid))
    return Evaluation(pairing, protocol, tuple(cases), errors, tuple(unscored), roi)


class _Scorer:
    """Protocol, regions (name -> label values), regions of interest and probabilities of the cases of a pairing."""

    def __init__(self, pairing: Pairing, protocol: str, roi: str | None, probabilities: Path | None) -> None:
        cases = [pair.reference for pair in pairing.pairs]
        self.protocol, self.challenge, self.scheme = protocol, pairing.challenge, pairing.scheme
        self.rois = None if roi is None else find_rois(cases, roi, pairing.sources["references"])
        known = regions_of(self.scheme)
        self.probabilities = {} if probabilities is None else find_probabilities(cases, known, probabilities)
        self.ranked_regions = list(dict.fromkeys(region for own in self.probabilities.values() for region in own))
        self.regions = scored_regions(self.scheme, protocol, self.challenge)

    def score(self, pair: Pair, path: Path, reference: LabelMap, grid: Grid) -> CaseScores:
        """Scores of a prediction; a DataError says what is missing or unusable."""
        case_id = pair.reference.id
        predicted = scored_regions(pair.scheme, self.protocol, self.challenge)
        if not self.regions.keys() & predicted.keys():
            raise DataError(
                f"the mask is in label scheme {pair.scheme.name}, which shares no region with {self.scheme.name}",
                where=path,
                remedy="Name the right one with --prediction-scheme",
            )
        prediction = _read_prediction(path, pair.scheme, grid)
        roi = self._read_roi(case_id, reference, grid)
        masks = (prediction, reference, grid.spacing_mm, self.regions)
        members = {name: predicted.get(name, ()) for name in self.regions}  # (): not predicted
        found = score_case(*masks, self.protocol, self.challenge, prediction_regions=members, roi=roi)
        scores = {region: scored.scores for region, scored in found.items()}
        reliability: dict[str, RegionReliability] = {}
        for region in self.ranked_regions:
            image = self.probabilities[case_id].get(region)
            if image is None:
                remedy = "Write them again with `segkit infer --save-probabilities --overwrite`"
                raise DataError(f"has no probabilities of {region}", where=case_id, remedy=remedy)
            mask = region_mask(reference, self.regions[region])
            more, reliable = score_probabilities(image, mask, grid, roi)
            scores[region] |= more
            reliability |= {region: reliable} if reliable else {}
        lesions = {region: scored.lesions for region, scored in found.items() if scored.lesions}
        return CaseScores(case_id, scores, False, lesions, pair.reference.patient, reliability)

    def score_missing(self, pair: Pair, grid: Grid) -> CaseScores:
        """The worst scores, of a case without a usable prediction."""
        scores = score_absent(grid.shape, grid.spacing_mm, self.regions, self.protocol, self.challenge)
        for region in self.ranked_regions:
            scores[region] |= {metric: METRICS[metric].worst for metric in PROBABILITY_METRICS}
        return CaseScores(pair.reference.id, scores, is_missing=True, patient=pair.reference.patient)

    def _read_roi(self, case_id: str, reference: LabelMap, grid: Grid) -> Mask | None:
        """The voxels to score: the region of interest without ignored voxels; None: all."""
        known = None if self.scheme.ignore is None else reference != self.scheme.ignore
        if self.rois is None:
            return known
        if case_id not in self.rois:
            remedy = "Add one whose name begins with the case id, or leave the case out with --cases"
            raise DataError("has no region of interest", where=case_id, remedy=remedy)
        roi = read_roi(self.rois[case_id], grid, region_mask(reference, self.scheme.values.values()))
        return roi if known is None else roi & known


def regions_of(scheme: LabelScheme) -> dict[str, tuple[int, ...]]:
    """The regions of a label scheme, or its classes without the background -> label values."""
    regions = {output.name: output.members for output in outputs_of(scheme) if output.label != 0}
    return regions | (_tissue_regions(scheme, _PED_TISSUES) if scheme.name == "brats-ped" else {})


def scored_regions(scheme: LabelScheme, protocol: str, challenge: str | None) -> dict[str, tuple[int, ...]]:
    """The regions (name -> label values) that a protocol scores in a label scheme, with its single tissues.

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


def _read_reference(pair: Pair, scheme: LabelScheme) -> tuple[LabelMap, Grid]:
    label = pair.reference.label
    if label is None:
        raise ValueError(f"case {pair.reference.id} has no reference")
    labels, grid = read_reference(label)
    log_notes(grid)
    images = [image.path for image in pair.reference.images.values()][:1]
    for path in (*images, *([pair.prediction] if pair.prediction else [])):
        with suppress(DataError):  # of the prediction it is reported when that is read
            other = read_grid(path)
            if other.shape != grid.shape and (whole := onto_grid(labels, grid, other)) is not None:
                labels, grid = whole, other  # the mask of a part of the scan, such as one of 3D Slicer
                break
    _require_known(labels, scheme, scheme.reference_values, label.path, "--label-scheme")
    return labels, grid


def _read_prediction(path: Path, scheme: LabelScheme, grid: Grid) -> LabelMap:
    """A predicted mask on the grid of the reference, turned or padded if needed."""
    labels, own_grid = read_labels(path)
    log_notes(own_grid)
    whole = onto_grid(labels, own_grid, grid, turns=True)
    if whole is None:
        remedy = "Scores compare voxel by voxel: resample the prediction to the grid of its scan"
        raise DataError(same_grid(own_grid, grid) or "", where=path, remedy=remedy)
    _require_known(whole, scheme, {0, *scheme.values.values()}, path, "--prediction-scheme")
    return whole


def _require_known(labels: LabelMap, scheme: LabelScheme, values: set[int], path: Path, option: str) -> None:
    if values.issuperset(range(int(labels.max()) + 1)):  # nearly always, and fast
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
