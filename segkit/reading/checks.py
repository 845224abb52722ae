"""Everything that can be wrong with the cases of a cohort, found in one pass before anything is computed.

A case is read file by file and released before the next one; only a few numbers of each are kept to compare cases.
"""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from segkit.errors import DataError, Problem
from segkit.labels import SCHEMES
from segkit.reading.case import BRATS_MODALITIES, Case, Cohort, ImageFile
from segkit.reading.files import count_channels, read_grid, read_labels, read_volume
from segkit.reading.geometry import same_grid
from segkit.reading.volume import Grid
from segkit.shapes import AnyArray

REPAIR_COMMAND = "segkit convert headers"
"""Named in the remedy of every finding that the verb can repair."""

_PREPARE = (
    "If these are brain scans for a BraTS-like model, prepare them with brainles-preprocessing "
    "(co-registration, 1 mm atlas space, HD-BET skull stripping) or CaPTk's BraTSPipeline"
)
_SAMPLE_STEP = 7
"""Every 7th voxel is enough for percentiles and for the share of background."""

_STRIPPED_BACKGROUND = 0.25
"""Skull-stripped brains leave 60-85 % of a volume at one background value; scans with skull and noise almost none."""

_LARGEST_SPACING_DRIFT_MM = 0.05
_FEWEST_TO_COMPARE = 5
_MOST_OUTLIERS = 0.1
"""Beyond this share of the cases they are no outliers: the data come in two intensity scales."""


@dataclass(frozen=True)
class CaseReport:
    """What a check found in one case; shape, spacing and orientation are those of its first readable modality.

    Pictures have neither spacing nor orientation.

    `labels` lists the values of the reference other than 0, or nothing where voxels were not read.
    """

    case: str
    modalities: tuple[str, ...]
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    orientation: str = ""
    labels: tuple[int, ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def is_usable(self) -> bool:
        """Whether no finding is fatal."""
        return not any(problem.is_fatal for problem in self.problems)

    def to_json(self) -> dict[str, object]:
        """The entry of `cases` in `segkit check --json`."""
        return {
            "case": self.case,
            "modalities": list(self.modalities),
            "shape": list(self.shape),
            "spacing_mm": [round(length, 4) for length in self.spacing_mm],
            "orientation": self.orientation,
            "labels": list(self.labels),
            "problems": [problem_to_json(problem) for problem in self.problems],
        }


@dataclass
class _Findings:
    """What is gathered while a case is read; `repair` is the command that mends a wrong header."""

    repair: str
    problems: list[Problem] = field(default_factory=list)
    grids: dict[str, Grid] = field(default_factory=dict)
    brightness: dict[str, float] = field(default_factory=dict)
    background: dict[str, float] = field(default_factory=dict)
    labels: tuple[int, ...] = ()


def problem_to_json(problem: Problem) -> dict[str, object]:
    """A problem as `segkit check --json` gives it."""
    return {
        "where": problem.where,
        "found": problem.found,
        "remedy": problem.remedy,
        "is_fatal": problem.is_fatal,
    }


def check_cohort(
    cohort: Cohort,
    *,
    read_voxels: bool = True,
    workers: int = 1,
    on_case: Callable[[], None] | None = None,
) -> list[CaseReport]:
    """One report for each case, in the cohort's order; unreadable data become problems, never exceptions.

    Args:
        cohort: what a layout found.
        read_voxels: False looks at headers only; NaN, label values and intensities are then not judged.
        workers: cases read at once, each of which needs the memory of one volume.
        on_case: called after each case, for a progress bar.
    """

    def look(case: Case) -> _Findings:
        findings = _check_case(case, cohort, read_voxels)
        if on_case is not None:
            on_case()
        return findings

    with ThreadPoolExecutor(max(1, workers)) as pool:
        findings = list(pool.map(look, cohort.cases))
    _compare_orientations(findings)
    _compare_brightness(findings)
    return [_report(case, found) for case, found in zip(cohort.cases, findings, strict=True)]


def _report(case: Case, findings: _Findings) -> CaseReport:
    grid = next(iter(findings.grids.values()), None)
    return CaseReport(
        case=case.id,
        modalities=tuple(case.images),
        shape=() if grid is None else grid.shape,
        spacing_mm=() if grid is None or grid.dims == 2 else grid.spacing_mm,  # pictures have none
        orientation="" if grid is None else grid.orientation,
        labels=findings.labels,
        problems=tuple(findings.problems),
    )


def _check_case(case: Case, cohort: Cohort, read_voxels: bool) -> _Findings:
    root = str(cohort.root)
    repair = f"{REPAIR_COMMAND} {shlex.quote(root)} -o {shlex.quote(cohort.root.name + '-repaired')}"
    findings = _Findings(repair, problems=list(case.problems))
    if missing := [modality for modality in cohort.modalities if modality not in case.images]:
        where = next((str(image.path.parent) for image in case.images.values()), root)
        found = f"case {case.id} has no {', '.join(missing)}"
        findings.problems.append(Problem(where, found, "Add the file, or use --allow-missing where a verb has it"))
    for modality, image in case.images.items():
        _check_image(modality, image, findings, read_voxels)
    if case.label is not None:
        _check_reference(case, case.label, findings, read_voxels)
    if cohort.dims == 3 and cohort.layout != "brats-men-rt":
        _check_preparation(case, findings)
    return findings


def _check_image(modality: str, image: ImageFile, findings: _Findings, read_voxels: bool) -> None:
    try:
        grid = read_grid(image.path)
        _require_channel(modality, image, count_channels(image.path), grid)
        _compare_grid(grid, findings)
        findings.grids[modality] = grid
        if read_voxels and grid.dims == 3:
            _check_intensities(modality, image, read_volume(image.path, image.channel).array, findings)
        elif read_voxels and not image.channel:
            read_volume(image.path, image.channel)  # one plane tells whether the picture can be decoded
    except DataError as error:
        findings.problems.append(_as_problem(error))


def _require_channel(modality: str, image: ImageFile, channels: int, grid: Grid) -> None:
    if grid.dims == 2:
        return
    if image.channel is None and channels > 1:
        raise DataError(
            f"holds {channels} channels (4D) where one volume was promised",
            where=image.path,
            remedy="Split it, or name its channels with --modality name=NUMBER",
        )
    if image.channel is not None and image.channel >= channels:
        raise DataError(
            f"has no channel {image.channel} for {modality}; it holds {channels}",
            where=image.path,
            remedy="Correct the modalities in dataset.json, or export the file with all of them",
        )


def _check_intensities(modality: str, image: ImageFile, array: AnyArray, findings: _Findings) -> None:
    where = str(image.path)
    if array.dtype.kind == "f" and (broken := int(array.size - np.count_nonzero(np.isfinite(array)))):
        remedy = "Write the file again with finite values, usually 0 outside the brain"
        findings.problems.append(Problem(where, f"{broken} voxels are NaN or infinite", remedy))
        return
    sample = array.reshape(-1)[::_SAMPLE_STEP]
    lowest, highest = array.min(), array.max()
    if lowest == highest:
        found = f"every voxel holds the same value, {lowest:g}"
        findings.problems.append(Problem(where, found, "Export the image again, or leave the case out"))
        return
    corner = array.reshape(-1)[0]
    findings.background[modality] = float(np.mean(sample == corner))
    inside = np.abs(sample[sample != corner].astype(np.float32))
    if inside.size:
        findings.brightness[modality] = float(np.percentile(inside, 99))


def _check_reference(case: Case, label: ImageFile, findings: _Findings, read_voxels: bool) -> None:
    try:
        if read_voxels:
            labels, grid = read_labels(label.path, label.channel)
            counts = np.bincount(labels.reshape(-1), minlength=256)
            findings.labels = tuple(int(value) for value in np.flatnonzero(counts) if value != 0)
            findings.problems += _about_values(case, label.path, findings.labels)
        else:
            grid = read_grid(label.path)
        _compare_grid(grid, findings)
    except DataError as error:
        findings.problems.append(_as_problem(error))


def _about_values(case: Case, path: Path, values: Sequence[int]) -> Iterable[Problem]:
    if not values:
        remedy = "Fine if there is no lesion; else export the mask again"
        yield Problem(str(path), "the reference mask is empty", remedy, is_fatal=False)
    known = set() if case.scheme is None else set(case.scheme.values.values())
    stray = sorted(set(values) - known) if case.scheme is not None else []
    if stray and case.scheme is not None:
        fitting = [name for name, scheme in SCHEMES.items() if set(values) <= set(scheme.values.values())]
        remedy = "Correct the mask, or pass the scheme it was drawn in with --label-scheme"
        yield Problem(
            str(path),
            f"label value{'s' * (len(stray) > 1)} {', '.join(map(str, stray))} not in label scheme "
            f"{case.scheme.name} ({', '.join(f'{name} {value}' for name, value in case.scheme.values.items())})",
            remedy + (f" ({', '.join(fitting)})" if fitting else ""),
        )


def _compare_grid(grid: Grid, findings: _Findings) -> None:
    """Compare with the case's first image; a header that differs in its affine alone can be repaired."""
    first = next(iter(findings.grids.values()), None)
    difference = None if first is None else same_grid(grid, first)
    if first is None or difference is None:
        return
    remedy = f"If only the header is wrong, repair a copy with `{findings.repair}`"
    if grid.shape != first.shape:
        remedy = "Resample all images of the case to one grid. " + _PREPARE
    findings.problems.append(Problem(str(grid.source or ""), difference, remedy))


def _check_preparation(case: Case, findings: _Findings) -> None:
    """Recognise raw clinical scans among BraTS modalities: with skull, not 1 mm, not on one grid."""
    brain = [modality for modality in findings.grids if modality in BRATS_MODALITIES]
    if len(brain) < 2:
        return
    signs = []
    judged = [findings.background[modality] for modality in brain if modality in findings.background]
    if judged and max(judged) < _STRIPPED_BACKGROUND:
        signs.append(f"not skull-stripped (only {100 * max(judged):.0f} % of the voxels are background)")
    grids = [findings.grids[modality] for modality in brain]
    spacing = next((g.spacing_mm for g in grids if not _is_isotropic_1mm(g)), None)
    if spacing is not None:
        signs.append("not 1 mm (voxels of " + " x ".join(f"{length:.3g}" for length in spacing) + " mm)")
    if len({grid.shape for grid in grids}) > 1:
        signs.append("not co-registered (modalities have different numbers of voxels)")
    if signs:
        where = str(case.images[brain[0]].path.parent)
        findings.problems.append(
            Problem(where, "looks like raw clinical input: " + ", ".join(signs), _PREPARE, is_fatal=False)
        )


def _is_isotropic_1mm(grid: Grid) -> bool:
    return all(abs(length - 1.0) <= _LARGEST_SPACING_DRIFT_MM for length in grid.spacing_mm)


def _compare_orientations(findings: Sequence[_Findings]) -> None:
    """Warn of the few cases whose axes run otherwise than in the great majority: a flipped affine looks like that."""
    firsts = [next(iter(found.grids.values()), None) for found in findings]
    counts = Counter(grid.orientation for grid in firsts if grid is not None and grid.orientation)
    if not counts:
        return
    usual, count = counts.most_common(1)[0]
    if count < 0.8 * counts.total() or counts.total() < _FEWEST_TO_COMPARE:
        return
    for found, grid in zip(findings, firsts, strict=True):
        if grid is not None and grid.orientation and grid.orientation != usual:
            note = f"axes run {grid.orientation}, but {usual} in {count} of {counts.total()} cases"
            remedy = "It is turned on reading; make sure that left and right are not swapped in its header"
            found.problems.append(Problem(str(grid.source or ""), note, remedy, is_fatal=False))


def _compare_brightness(findings: Sequence[_Findings]) -> None:
    """Warn of images much brighter or darker than the same modality elsewhere (robust z-score of the logarithm)."""
    values: dict[str, list[float]] = defaultdict(list)
    for found in findings:
        for modality, brightness in found.brightness.items():
            values[modality].append(np.log10(max(brightness, 1e-12)))
    for modality, logs in values.items():
        if len(logs) < _FEWEST_TO_COMPARE:
            continue
        middle = float(np.median(logs))
        spread = 1.4826 * float(np.median(np.abs(np.array(logs) - middle)))
        limit = max(1.0, 5 * spread)
        outliers = [
            (found, np.log10(max(found.brightness[modality], 1e-12)) - middle)
            for found in findings
            if modality in found.brightness
        ]
        outliers = [(found, deviation) for found, deviation in outliers if abs(deviation) > limit]
        if len(outliers) > _MOST_OUTLIERS * len(logs):
            outliers[0][0].problems.append(_two_scales(outliers[0][0].grids[modality], modality, len(outliers)))
            continue
        for found, deviation in outliers:
            found.problems.append(_outlier(found.grids[modality], modality, float(deviation)))


def _outlier(grid: Grid, modality: str, deviation: float) -> Problem:
    factor = 10 ** abs(deviation)
    direction = "brighter" if deviation > 0 else "darker"
    found = f"{modality} is about {factor:.0f} times {direction} than in the other cases"
    remedy = "Make sure it is the right modality and not already normalised"
    return Problem(str(grid.source or ""), found, remedy, is_fatal=False)


def _two_scales(grid: Grid, modality: str, count: int) -> Problem:
    found = f"{modality} of this and {count - 1} other cases has another intensity scale than the rest"
    remedy = "Normalisation of each case evens that out; do not train without it"
    return Problem(str(grid.source or ""), found, remedy, is_fatal=False)


def _as_problem(error: DataError) -> Problem:
    found = error.found + (f"; expected {error.expected}" if error.expected else "")
    return Problem(error.where or "", found, error.remedy or "")


def usable_cases(cohort: Cohort, reports: Sequence[CaseReport]) -> Cohort:
    """The cohort without the cases that have a fatal problem."""
    usable = {report.case for report in reports if report.is_usable}
    return replace(cohort, cases=tuple(case for case in cohort.cases if case.id in usable))
