"""Probabilities of predicted masks: their files, and the scores of their ranking and calibration.

Both are computed by `segkit.metrics.calibration`, over the whole image (or region of interest), and calibration also in
a box around the reference.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segkit.errors import DataError, RequestError, some
from segkit.metrics.calibration import Reliability, area_under_roc, measure_reliability, surrounding_box
from segkit.metrics.lesions import Scores
from segkit.reading.case import Case, file_name_of
from segkit.reading.files import read_volume, stem_of
from segkit.reading.geometry import onto_grid, same_grid
from segkit.reading.layouts.layout import list_images
from segkit.reading.volume import Grid
from segkit.shapes import AnyArray, Mask

PROBABILITY_METRICS = ("auc", "ece", "ace", "brier", "ece_box", "brier_box")

RegionReliability = Mapping[str, Reliability]
"""Voxels of a region by their probability: "whole" of the image or region of interest, and "box" around the reference.

"box" is absent if the reference is empty; both are absent if the numbers are not probabilities.
"""

_log = logging.getLogger(__name__)


def find_probabilities(cases: Sequence[Case], regions: Collection[str], folder: Path) -> dict[str, dict[str, Path]]:
    """Case id -> region -> probability image `<case>_<region>`, as `segkit infer --save-probabilities` names them.

    A region that no case has an image of is left out: a network need not have an output for each.

    Raises:
        RequestError: there is no such folder, or it holds no probabilities of these cases, or two files for one.
    """
    remedy = "Write them with `segkit infer --save-probabilities`"
    if not folder.is_dir():
        raise RequestError("no such folder of probabilities", where=folder, remedy=remedy)
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for path in list_images(folder).images:
        by_stem[stem_of(path)].append(path)
    found: dict[str, dict[str, Path]] = {}
    for case in cases:
        stems = {region: f"{case.id}_{file_name_of(region)}" for region in regions}
        own = {region: by_stem[stem] for region, stem in stems.items() if stem in by_stem}
        for paths in own.values():
            if len(paths) > 1:
                names = some((path.name for path in paths), 3)
                raise RequestError(f"{names} have one name", where=folder, remedy="Keep one of them")
        found[case.id] = {region: path for region, (path,) in own.items()}
    if not any(found.values()):
        others = some(sorted(path.name for paths in by_stem.values() for path in paths), 3) or "no images at all"
        raise RequestError(
            f"holds no probabilities of these cases: found {others}",
            where=folder,
            expected=f"names such as {cases[0].id}_{next(iter(regions))}.tif or .nii.gz",
            remedy=remedy,
        )
    return found


def read_probabilities(path: Path, grid: Grid) -> AnyArray:
    """Probabilities (*grid.shape) of one region, in the data type of the file.

    Raises:
        DataError: the file is unusable, lies on another grid, or holds NaN or infinity.
    """
    volume = read_volume(path)
    array = onto_grid(volume.array, volume.grid, grid, turns=True)
    if array is None:
        found = same_grid(volume.grid, grid) or ""
        raise DataError(found, where=path, expected="probabilities on the grid of the reference")
    if not np.isfinite(array).all():
        raise DataError("holds NaN or infinity", where=path, expected="probabilities")
    return array


def score_probabilities(path: Path, present: Mask, grid: Grid, roi: Mask | None) -> tuple[Scores, RegionReliability]:
    """AUC and calibration of one region of a case, inside `roi` (None: everywhere); NaN where undefined.

    `present` is where the reference has the region; masks are (*grid.shape) on the grid of the reference. Numbers
    outside [0, 1], such as logits, are ranked only.

    Raises:
        DataError: the file is unusable, lies on another grid, or holds NaN or infinity.
    """
    probabilities = read_probabilities(path, grid)
    ranked = (probabilities, present) if roi is None else (probabilities[roi], present[roi])
    scores = dict.fromkeys(PROBABILITY_METRICS, math.nan) | {"auc": area_under_roc(*ranked)}
    try:
        whole = measure_reliability(probabilities, present, roi)
    except ValueError as error:
        _log.warning("%s: no calibration, as the %s", path, error)
        return scores, {}
    scores |= {"ece": whole.calibration_error(), "ace": whole.average_calibration_error(), "brier": whole.brier_score()}
    box = surrounding_box(present if roi is None else present & roi)
    if box is None:
        return scores, {"whole": whole}
    around = measure_reliability(probabilities[box], present[box], None if roi is None else roi[box])
    scores |= {"ece_box": around.calibration_error(), "brier_box": around.brier_score()}
    return scores, {"whole": whole, "box": around}


def reliability_tables(cases: Iterable[Mapping[str, RegionReliability]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Region -> "whole" or "box" -> calibration table over the voxels of all cases, as strict JSON.

    Each voxel counts once, so that a large lesion counts more than a small one. `confidence` (the mean probability)
    and `frequency` (the share of voxels in the region) of an empty bin are None.
    """
    pooled: dict[str, dict[str, Reliability]] = defaultdict(dict)
    for region, own in (entry for regions in cases for entry in regions.items()):
        parts = pooled[region]
        parts |= {where: parts[where] + found if where in parts else found for where, found in own.items()}
    return {region: {where: _table(own) for where, own in parts.items()} for region, parts in pooled.items()}


def _table(own: Reliability) -> dict[str, Any]:
    bins = {"confidence": own.confidence, "frequency": own.frequency}
    errors = {"ece": own.calibration_error(), "ace": own.average_calibration_error(), "brier": own.brier_score()}
    shares = {name: [float(v) if np.isfinite(v) else None for v in values] for name, values in bins.items()}
    return {"edges": own.edges.tolist(), "count": own.count.tolist(), **shares, **errors}
