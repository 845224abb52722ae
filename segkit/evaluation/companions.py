"""Files that go with a pair of masks: the region of interest to score in, and the probabilities behind the prediction.

Probabilities are scored by how they rank voxels (`segkit.metrics.calibration`) and by whether they mean what they say
(`segkit.metrics.calibration`), over the whole image and in a box around the reference.

A region of interest is the field of view of a retinal camera, or a brain mask: what lies outside it is black by
construction, and to call it background is no merit.
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from segkit.errors import DataError, RequestError, some
from segkit.metrics.calibration import Reliability, area_under_roc, measure_reliability, surrounding_box
from segkit.metrics.lesions import Scores
from segkit.metrics.overlap import region_mask
from segkit.metrics.registry import METRICS
from segkit.reading.case import Case, file_name_of
from segkit.reading.files import count_channels, read_volume, stem_of, suffix_of
from segkit.reading.geometry import same_grid
from segkit.reading.layouts.listing import list_images
from segkit.reading.volume import Grid
from segkit.shapes import AnyArray, LabelMap, Mask

_LOSSY_SUFFIXES = (".jpg", ".jpeg")
_HALF_WHITE = 127
"""In a JPEG picture black is not exactly 0."""

_LEAST_SHARE = 0.5
"""A region of interest that holds less than this part of the reference is not one: mostly it is inverted."""

_PROBABILITY_METRICS = ("auc", "ece", "ace", "brier", "ece_box", "brier_box")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RegionReliability:
    """Voxels of one region by their probability, in the whole image (or region of interest) and around the reference.

    `box` is None where the reference is empty.
    """

    whole: Reliability
    box: Reliability | None


@dataclass(frozen=True)
class ProbabilityScores:
    """What the probabilities of one region of one case are worth: metric name -> value, NaN where undefined.

    `reliability` is None where they are no probabilities but other numbers in the same order, such as logits.
    """

    scores: Scores
    reliability: RegionReliability | None


@dataclass(frozen=True)
class Companions:
    """What goes with the pairs of two folders; `roi` is what the user called the regions of interest.

    `rois` maps a case id to its mask, `probabilities` a case id and a region to its image.
    """

    roi: str | None = None
    rois: Mapping[str, Path] = field(default_factory=dict)
    probabilities: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)

    @property
    def ranked_regions(self) -> list[str]:
        """The regions for which any case has probabilities, in order of first appearance."""
        return list(dict.fromkeys(region for own in self.probabilities.values() for region in own))

    def region_of_interest(self, case_id: str, reference: LabelMap, grid: Grid) -> Mask | None:
        """Where a case is to be scored; None is everywhere.

        Raises:
            DataError: the case has no region of interest though others have, or it is unusable.
        """
        if self.roi is None:
            return None
        if case_id not in self.rois:
            remedy = "Add one whose name begins with the case id, or leave the case out with --cases"
            raise DataError("has no region of interest", where=case_id, remedy=remedy)
        return read_roi(self.rois[case_id], grid, reference > 0)

    def score_probabilities(
        self, case_id: str, reference: LabelMap, grid: Grid, regions: Mapping[str, Collection[int]], roi: Mask | None
    ) -> dict[str, ProbabilityScores]:
        """Region -> AUC and calibration of its probabilities, for the ranked regions of one case, inside `roi`.

        Raises:
            DataError: probabilities are missing or unusable.
        """
        found = {}
        for region in self.ranked_regions:
            path = self.probabilities[case_id].get(region)
            if path is None:
                remedy = "Write them again with `segkit infer --save-probabilities --overwrite`"
                raise DataError(f"has no probabilities of {region}", where=case_id, remedy=remedy)
            probabilities, present = read_probabilities(path, grid), region_mask(reference, regions[region])
            found[region] = _score_region(probabilities, present, roi, path)
        return found

    def worst_scores(self) -> dict[str, Scores]:
        """Region -> what a missing prediction is worth, for the ranked regions."""
        worst = {metric: METRICS[metric].worst for metric in _PROBABILITY_METRICS}
        return {region: dict(worst) for region in self.ranked_regions}


def find_companions(
    cases: Sequence[Case],
    references: Path,
    regions: Collection[str],
    *,
    roi: str | None = None,
    probabilities: Path | None = None,
) -> Companions:
    """The files that go with these cases, so far as they are asked for; see `find_rois` and `find_probabilities`.

    Raises:
        RequestError: there are none, or two for one case.
    """
    return Companions(
        roi,
        {} if roi is None else find_rois(cases, roi, references),
        {} if probabilities is None else find_probabilities(cases, regions, probabilities),
    )


def find_rois(cases: Sequence[Case], given: str, references: Path) -> dict[str, Path]:
    """Case id -> mask of its region of interest.

    Args:
        cases: The references.
        given: A folder of masks, one file for all cases, or how the names of the masks end that lie below
            `references` (`.gif`, `_fov.png`).
        references: The dataset or folder of the references.

    Raises:
        RequestError: no mask belongs to any case, or two to one.
    """
    path = Path(given)
    if path.is_file():
        return {case.id: path for case in cases}
    if path.is_dir():
        named = [(file, stem_of(file)) for file in list_images(path).images]
    else:
        root = references if references.is_dir() else references.parent
        files = [file for file in list_images(root).images if file.name.lower().endswith(given.lower())]
        named = [(file, file.name[: len(file.name) - len(given)].rstrip("-_. ")) for file in files]
    found = _by_case(cases, named)
    if not found:
        raise RequestError(
            f"--roi {given}: no mask of a region of interest belongs to any of the {len(cases)} cases",
            where=path if path.is_dir() else references,
            expected=f"names with the case id, such as {cases[0].id}",
            remedy="Name a folder of masks, or the end of their names beside the references, such as --roi _fov.png",
        )
    return found


def read_roi(path: Path, grid: Grid, reference: Mask) -> Mask:
    """The region of interest (*grid.shape): all that is not black, or not 0.

    A picture counts as it is seen, whatever numbers its palette gives to black and white. `reference` is what is to
    be scored; a region that leaves out most of it is refused.

    Raises:
        DataError: the file is unusable, lies on another grid, or does not hold the reference.
    """
    channels = count_channels(path)
    planes = [read_volume(path, channel if channels > 1 else None) for channel in range(channels)]
    difference = same_grid(planes[0].grid, grid)
    if difference is not None:
        raise DataError(difference, where=path, expected="a region of interest on the grid of the reference")
    black = _HALF_WHITE if suffix_of(path) in _LOSSY_SUFFIXES else 0
    roi = np.zeros(grid.shape, np.bool_)
    for plane in planes:
        roi |= plane.array > black
    if not roi.any():
        raise DataError("the region of interest is empty", where=path, remedy="Correct it, or leave --roi out")
    present = int(np.count_nonzero(reference))
    inside = int(np.count_nonzero(reference & roi))
    if inside < _LEAST_SHARE * present:
        raise DataError(
            f"only {inside / present:.0%} of the reference lies in this region of interest",
            where=path,
            expected="white, or 1, inside and black outside",
            remedy="Invert it, or give another with --roi",
        )
    return roi


def find_probabilities(cases: Sequence[Case], regions: Collection[str], folder: Path) -> dict[str, dict[str, Path]]:
    """Case id -> region -> probability image `<case>_<region>`, as `segkit infer --save-probabilities` names them.

    Only regions that at least one case has are looked for; a network need not have an output for each.

    Raises:
        RequestError: there is no such folder, or it holds no probabilities of these cases, or two files for one.
    """
    if not folder.is_dir():
        raise RequestError(
            "no such folder of probabilities",
            where=folder,
            remedy="Write them with `segkit infer --save-probabilities`",
        )
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for path in list_images(folder).images:
        by_stem[stem_of(path)].append(path)
    found: dict[str, dict[str, Path]] = {}
    for case in cases:
        stems = {region: f"{case.id}_{file_name_of(region)}" for region in regions}
        own = {region: by_stem[stem] for region, stem in stems.items() if stem in by_stem}
        for paths in own.values():
            if len(paths) > 1:
                raise RequestError(f"{_names(paths)} have one name", where=folder, remedy="Keep one of them")
        found[case.id] = {region: path for region, (path,) in own.items()}
    if not any(found.values()):
        others = sorted(path for paths in by_stem.values() for path in paths)
        raise RequestError(
            f"holds no probabilities of these cases: found {_names(others)}",
            where=folder,
            expected=f"names such as {cases[0].id}_{next(iter(regions))}.tif or .nii.gz",
            remedy="Write them with `segkit infer --save-probabilities`",
        )
    return found


def read_probabilities(path: Path, grid: Grid) -> AnyArray:
    """Probabilities (*grid.shape) of one region, in whatever numbers the file holds.

    Raises:
        DataError: the file is unusable, lies on another grid, or holds values that cannot be ranked.
    """
    volume = read_volume(path)
    difference = same_grid(volume.grid, grid)
    if difference is not None:
        raise DataError(difference, where=path, expected="probabilities on the grid of the reference")
    if not np.isfinite(volume.array).all():
        raise DataError("holds NaN or infinity", where=path, expected="probabilities")
    return volume.array


def _score_region(probabilities: AnyArray, present: Mask, roi: Mask | None, path: Path) -> ProbabilityScores:
    ranked = (probabilities, present) if roi is None else (probabilities[roi], present[roi])
    scores = dict.fromkeys(_PROBABILITY_METRICS, math.nan) | {"auc": area_under_roc(*ranked)}
    box = surrounding_box(present if roi is None else present & roi)
    try:
        whole = measure_reliability(probabilities, present, roi)
    except ValueError as error:
        _log.warning("%s: no calibration, as the %s", path, error)
        return ProbabilityScores(scores, None)
    scores |= {"ece": whole.calibration_error(), "ace": whole.average_calibration_error(), "brier": whole.brier_score()}
    if box is None:
        return ProbabilityScores(scores, RegionReliability(whole, None))
    around = measure_reliability(probabilities[box], present[box], None if roi is None else roi[box])
    scores |= {"ece_box": around.calibration_error(), "brier_box": around.brier_score()}
    return ProbabilityScores(scores, RegionReliability(whole, around))


def _by_case(cases: Sequence[Case], named: Sequence[tuple[Path, str]]) -> dict[str, Path]:
    """Case id -> file; each file belongs to the case with the longest name that it has, with words around it."""
    names = {name: case.id for case in cases for name in _names_of(case)}
    owned: dict[str, list[Path]] = defaultdict(list)
    for path, stem in named:
        fitting = [name for name in names if _is_named_after(stem, name)]
        if fitting:
            owned[names[max(fitting, key=len)]].append(path)
    for case_id, paths in owned.items():
        if len(paths) > 1:
            raise RequestError(
                f"{len(paths)} files could be the region of interest of {case_id}: {_names(paths)}",
                where=paths[0].parent,
                remedy="Name a folder or an ending that only one of them has",
            )
    return {case_id: path for case_id, (path,) in owned.items()}


def _names_of(case: Case) -> list[str]:
    """The case id and the stems of its images: `21` and `21_training`."""
    return [case.id, *(stem_of(image.path) for image in case.images.values())]


def _is_named_after(stem: str, name: str) -> bool:
    """Whether a name is that of a case and words: `21_mask` is of case 21, while `21_1_mask` is of another."""
    words = r"[^\d]*"
    return bool(re.fullmatch(rf"{re.escape(name)}([-_. ]{words})?|{words}[-_. ]{re.escape(name)}", stem))


def _names(paths: Sequence[Path]) -> str:
    return some((path.name for path in paths), 3) or "no images at all"
