"""Checks of the cases of a cohort: every problem is found in one pass, before anything is computed.

A case is read file by file and released before the next one; only a few numbers of each are kept to compare cases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from segkit.errors import DataError, Problem
from segkit.labels import SCHEMES
from segkit.reading.case import BRATS_MODALITIES, Case, Cohort, ImageFile
from segkit.reading.files import count_channels, read_grid, read_labels, read_volume
from segkit.reading.geometry import repair_command, same_grid
from segkit.reading.volume import Grid
from segkit.shapes import AnyArray

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
"""A larger share of the cases are not outliers: the data have two intensity scales."""

_FEWEST_PATIENTS = 2


@dataclass(frozen=True)
class CaseReport:
    """The result for one case; shape, spacing and orientation are those of its first readable modality.

    Pictures have neither spacing nor orientation. `labels` are the values of the reference other than 0, empty where
    voxels were not read.
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
        """Whether no problem is fatal."""
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


def problem_to_json(problem: Problem) -> dict[str, object]:
    """A problem as `segkit check --json` gives it."""
    return {"where": problem.where, "found": problem.found, "remedy": problem.remedy, "is_fatal": problem.is_fatal}


def check_cohort(
    cohort: Cohort, *, read_voxels: bool = True, workers: int = 1, on_case: Callable[[], None] | None = None
) -> list[CaseReport]:
    """One report for each case, in the cohort's order; unreadable data become problems, never exceptions.

    Args:
        cohort: what a layout found.
        read_voxels: False reads headers only; NaN, label values and intensities are then not checked.
        workers: cases read at once, each of which needs the memory of one volume.
        on_case: called after each case, for a progress bar.
    """

    def check(case: Case) -> _Findings:
        findings = _check_case(case, cohort, read_voxels)
        if on_case is not None:
            on_case()
        return findings

    with ThreadPoolExecutor(max(1, workers)) as pool:
        findings = list(pool.map(check, cohort.cases))
    _compare_orientations(findings)
    _compare_brightness(findings)
    return [found.report() for found in findings]


def usable_cases(cohort: Cohort, reports: Sequence[CaseReport]) -> Cohort:
    """The cohort without the cases that have a fatal problem."""
    usable = {report.case for report in reports if report.is_usable}
    return replace(cohort, cases=tuple(case for case in cohort.cases if case.id in usable))


def too_few_patients(usable: Cohort) -> list[Problem]:
    """A warning where there are references, but of one patient only."""
    labelled = [case for case in usable.cases if case.label is not None]
    if not labelled or len({case.patient for case in labelled}) >= _FEWEST_PATIENTS:
        return []
    found = "references of one patient only: it would both train and validate, so scores would say nothing"
    remedy = f"Add cases of other patients, at least {_FEWEST_PATIENTS} in all"
    return [Problem(str(usable.root), found, remedy, is_fatal=False)]


@dataclass
class _Findings:
    """What is collected while a case is read; `repair` is the command that repairs a wrong header."""

    case: Case
    repair: str
    problems: list[Problem]
    grids: dict[str, Grid] = field(default_factory=dict)
    brightness: dict[str, float] = field(default_factory=dict)
    background: dict[str, float] = field(default_factory=dict)
    labels: tuple[int, ...] = ()

    @property
    def first_grid(self) -> Grid | None:
        return next(iter(self.grids.values()), None)

    def warn(self, where: object, found: str, remedy: str) -> None:
        self.problems.append(Problem(str(where or ""), found, remedy, is_fatal=False))

    def report(self) -> CaseReport:
        grid = self.first_grid
        return CaseReport(
            case=self.case.id,
            modalities=tuple(self.case.images),
            shape=() if grid is None else grid.shape,
            spacing_mm=() if grid is None or grid.dims == 2 else grid.spacing_mm,
            orientation="" if grid is None else grid.orientation,
            labels=self.labels,
            problems=tuple(self.problems),
        )


def _check_case(case: Case, cohort: Cohort, read_voxels: bool) -> _Findings:
    findings = _Findings(case, repair_command(cohort.root), list(case.problems))
    if missing := [modality for modality in cohort.modalities if modality not in case.images]:
        where = next((str(image.path.parent) for image in case.images.values()), str(cohort.root))
        found = f"case {case.id} has no {', '.join(missing)}"
        findings.problems.append(Problem(where, found, "Add the file, or use --allow-missing where a verb has it"))
    for modality, image in case.images.items():
        try:
            _check_image(modality, image, findings, read_voxels)
        except DataError as error:
            findings.problems.append(_as_problem(error))
    if case.label is not None:
        try:
            _check_reference(case.label, findings, read_voxels)
        except DataError as error:
            findings.problems.append(_as_problem(error))
    if cohort.dims == 3 and cohort.layout != "brats-men-rt":
        _check_preparation(findings)
    return findings


def _as_problem(error: DataError) -> Problem:
    found = error.found + (f"; expected {error.expected}" if error.expected else "")
    return Problem(error.where or "", found, error.remedy or "")


def _check_image(modality: str, image: ImageFile, findings: _Findings, read_voxels: bool) -> None:
    grid = read_grid(image.path)
    _require_channel(modality, image, count_channels(image.path), grid)
    _compare_grid(grid, findings)
    findings.grids[modality] = grid
    if read_voxels and grid.dims == 3:
        _check_intensities(modality, image, read_volume(image.path, image.channel).array, findings)
    elif read_voxels and not image.channel:
        read_volume(image.path, image.channel)  # one plane shows whether the picture can be decoded


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


def _check_reference(label: ImageFile, findings: _Findings, read_voxels: bool) -> None:
    if read_voxels:
        labels, grid = read_labels(label.path, label.channel)
        counts = np.bincount(labels.reshape(-1), minlength=256)
        findings.labels = tuple(int(value) for value in np.flatnonzero(counts) if value != 0)
        findings.problems += _value_problems(findings.case, label.path, findings.labels)
    else:
        grid = read_grid(label.path)
    _compare_grid(grid, findings)


def _value_problems(case: Case, path: Path, values: Sequence[int]) -> Iterable[Problem]:
    if not values:
        remedy = "Fine if there is no lesion; else export the mask again"
        yield Problem(str(path), "the reference mask is empty", remedy, is_fatal=False)
    if case.scheme is None:
        return
    if stray := sorted(set(values) - set(case.scheme.values.values())):
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
    first = findings.first_grid
    difference = None if first is None else same_grid(grid, first)
    if first is None or difference is None:
        return
    remedy = f"If only the header is wrong, repair a copy with `{findings.repair}`"
    if grid.shape != first.shape:
        remedy = "Resample all images of the case to one grid. " + _PREPARE
    findings.problems.append(Problem(str(grid.source or ""), difference, remedy))


def _check_preparation(findings: _Findings) -> None:
    """Recognise raw clinical scans among BraTS modalities: with skull, not 1 mm, not on one grid."""
    brain = [modality for modality in findings.grids if modality in BRATS_MODALITIES]
    if len(brain) < 2:
        return
    signs = []
    backgrounds = [findings.background[modality] for modality in brain if modality in findings.background]
    if backgrounds and max(backgrounds) < _STRIPPED_BACKGROUND:
        signs.append(f"not skull-stripped (only {100 * max(backgrounds):.0f} % of the voxels are background)")
    grids = [findings.grids[modality] for modality in brain]
    drifts = [max(abs(length - 1.0) for length in grid.spacing_mm) for grid in grids]
    if other := [grid for grid, drift in zip(grids, drifts, strict=True) if drift > _LARGEST_SPACING_DRIFT_MM]:
        spacing = " x ".join(f"{length:.3g}" for length in other[0].spacing_mm)
        signs.append(f"not 1 mm (voxels of {spacing} mm)")
    if len({grid.shape for grid in grids}) > 1:
        signs.append("not co-registered (modalities have different numbers of voxels)")
    if signs:
        folder = findings.case.images[brain[0]].path.parent
        findings.warn(folder, "looks like raw clinical input: " + ", ".join(signs), _PREPARE)


def _compare_orientations(findings: Sequence[_Findings]) -> None:
    """Warn of cases whose orientation differs from that of the great majority: a flipped affine looks like that."""
    grids = [(found, found.first_grid) for found in findings]
    counts = Counter(grid.orientation for _, grid in grids if grid is not None and grid.orientation)
    if counts.total() < _FEWEST_TO_COMPARE:
        return
    usual, count = counts.most_common(1)[0]
    if count < 0.8 * counts.total():
        return
    for found, grid in grids:
        if grid is not None and grid.orientation and grid.orientation != usual:
            note = f"axes run {grid.orientation}, but {usual} in {count} of {counts.total()} cases"
            remedy = "It is turned on reading; make sure that left and right are not swapped in its header"
            found.warn(grid.source, note, remedy)


def _compare_brightness(findings: Sequence[_Findings]) -> None:
    """Warn of images much brighter or darker than the same modality elsewhere (robust z-score of the logarithm)."""
    for modality in dict.fromkeys(modality for found in findings for modality in found.brightness):
        those = [found for found in findings if modality in found.brightness]
        if len(those) < _FEWEST_TO_COMPARE:
            continue
        logs = np.array([np.log10(max(found.brightness[modality], 1e-12)) for found in those])
        deviations = logs - np.median(logs)
        limit = max(1.0, 5 * 1.4826 * float(np.median(np.abs(deviations))))
        outliers = [pair for pair in zip(those, deviations, strict=True) if abs(pair[1]) > limit]
        if len(outliers) > _MOST_OUTLIERS * len(logs):
            first = outliers[0][0]
            note = f"{modality} of this and {len(outliers) - 1} other cases has another intensity scale than the rest"
            remedy = "Normalisation of each case evens that out; do not train without it"
            first.warn(first.grids[modality].source, note, remedy)
            continue
        for found, deviation in outliers:
            direction = "brighter" if deviation > 0 else "darker"
            note = f"{modality} is about {10 ** abs(deviation):.0f} times {direction} than in the other cases"
            remedy = "Make sure it is the right modality and not already normalised"
            found.warn(found.grids[modality].source, note, remedy)
