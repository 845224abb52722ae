"""Checks of the cases of a cohort: every problem is found in one pass, before anything is computed.

A case is read file by file and released before the next one; only a few numbers of each are kept to compare cases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from segkit.errors import DataError, Problem, warning
from segkit.labels import SCHEMES
from segkit.reading.case import BRATS_MODALITIES, Case, Cohort, ImageFile
from segkit.reading.files import count_channels, read_grid, read_labels, read_reference, read_volume
from segkit.reading.geometry import format_size, onto_grid, repair_command, same_grid
from segkit.reading.layouts.layout import bare_name
from segkit.reading.layouts.schemes import present_values
from segkit.reading.volume import Grid, measure_intensities
from segkit.shapes import LabelMap

_PREPARE = (
    "For a BraTS-like model, prepare them with brainles-preprocessing "
    "(co-registration, 1 mm atlas space, HD-BET skull stripping) or CaPTk's BraTSPipeline"
)
_STRIPPED_BACKGROUND = 0.25
"""Skull-stripped brains leave 60-85 % of a volume at one background value; scans with skull and noise almost none."""
_LARGEST_SPACING_DRIFT_MM = 0.05
_FEWEST_TO_COMPARE = 5
_MOST_OUTLIERS = 0.1
"""A larger share of the cases are not outliers: the data have two intensity scales."""
_FEWEST_PATIENTS = 2
_SAMPLED_VOXELS, _FEW_VALUES = 10**5, 4


@dataclass(frozen=True)
class CaseReport:
    """The result for one case; shape, spacing and orientation are those of its first readable modality.

    Pictures have no spacing and orientation. `labels` are the reference's values other than 0, if voxels were read.
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
            "problems": [problem.to_json() for problem in self.problems],
        }


def check_cohort(
    cohort: Cohort, *, read_voxels: bool = True, workers: int = 1, on_case: Callable[[], None] | None = None
) -> list[CaseReport]:
    """One report for each case, in the cohort's order; unreadable data become problems, never exceptions.

    Without `read_voxels`, NaN, label values and intensities are not checked. `workers` cases are read at once, each of
    which needs the memory of one volume. `on_case` is called after each case.
    """

    def check(case: Case) -> _Findings:
        findings = _check_case(case, cohort, read_voxels)
        if on_case is not None:
            on_case()
        return findings

    with ThreadPoolExecutor(max(1, workers)) as pool:
        findings = list(pool.map(check, cohort.cases))
    _compare_values(findings)
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
    found = "all references are of one patient, so that training and validation would share it and scores mean nothing"
    remedy = f"Add cases of other patients, at least {_FEWEST_PATIENTS} in all"
    return [warning(usable.root, found, remedy)]


@dataclass
class _Findings:
    """The collected results of one case; `repair` is the command that repairs a wrong header.

    `is_brain`: the data set is of BraTS, or the case has a FLAIR: advice about tumours and skulls suits no other organ.
    """

    case: Case
    repair: str
    problems: list[Problem]
    is_brain: bool
    grids: dict[str, Grid] = field(default_factory=dict)
    brightness: dict[str, float] = field(default_factory=dict)
    background: dict[str, float] = field(default_factory=dict)
    labels: tuple[int, ...] = ()
    like_masks: list[Path] = field(default_factory=list)

    @property
    def first_grid(self) -> Grid | None:
        return next(iter(self.grids.values()), None)

    def report(self) -> CaseReport:
        grid = self.first_grid
        spacing_mm = () if grid is None or grid.dims == 2 else grid.spacing_mm
        shape, orientation = ((), "") if grid is None else (grid.shape, grid.orientation)
        modalities, problems = tuple(self.case.images), tuple(self.problems)
        return CaseReport(self.case.id, modalities, shape, spacing_mm, orientation, self.labels, problems)


def _check_case(case: Case, cohort: Cohort, read_voxels: bool) -> _Findings:
    is_brain = "t2f" in case.images or (cohort.scheme is not None and cohort.scheme.name in SCHEMES)
    findings = _Findings(case, repair_command(cohort.root), list(case.problems), is_brain)
    if missing := [modality for modality in cohort.modalities if modality not in case.images]:
        where = next((str(image.path.parent) for image in case.images.values()), str(cohort.root))
        remedy = "Add the file, or use --allow-missing where a command has it"
        findings.problems.append(Problem(where, f"case {case.id} has no {', '.join(missing)}", remedy))
    checks = [partial(_check_image, modality, image) for modality, image in case.images.items()]
    checks += [] if case.label is None else [partial(_check_reference, case.label)]
    for check in checks:
        try:
            check(findings, read_voxels)
        except DataError as error:
            found = error.found + (f"; expected {error.expected}" if error.expected else "")
            findings.problems.append(Problem(error.where or "", found, error.remedy or ""))
    if cohort.dims == 3 and cohort.layout != "brats-men-rt":
        _check_preparation(findings)
    return findings


def _check_image(modality: str, image: ImageFile, findings: _Findings, read_voxels: bool) -> None:
    grid, channels = read_grid(image.path), count_channels(image.path)
    if grid.dims == 3 and image.channel is None and channels > 1:
        remedy = "Split it, or name its channels with --modality name=NUMBER"
        raise DataError(f"holds {channels} channels (4D) instead of one volume", where=image.path, remedy=remedy)
    if grid.dims == 3 and image.channel is not None and image.channel >= channels:
        found = f"has no channel {image.channel} for {modality}; it holds {channels}"
        remedy = "Correct the modalities in dataset.json, or export the file with all of them"
        raise DataError(found, where=image.path, remedy=remedy)
    _compare_grid(grid, findings)
    findings.grids[modality] = grid
    findings.problems += [warning(image.path, note) for note in grid.notes]
    if read_voxels and grid.dims == 3:
        _check_intensities(modality, image, findings)
    elif read_voxels and not image.channel:
        read_volume(image.path, image.channel)  # one plane shows whether the picture can be decoded


def _check_intensities(modality: str, image: ImageFile, findings: _Findings) -> None:
    array = read_volume(image.path, image.channel).array
    findings.background[modality], findings.brightness[modality] = measure_intensities(array, image.path)
    few = np.unique(array.ravel(order="K")[:: max(1, array.size // _SAMPLED_VOXELS)])
    findings.like_masks += [image.path] if len(few) <= _FEW_VALUES and np.array_equal(few, np.rint(few)) else []


def _check_reference(label: ImageFile, findings: _Findings, read_voxels: bool) -> None:
    if read_voxels:
        labels, grid = read_reference(label)
        findings.labels = tuple(sorted(present_values(labels) - {0}))
        findings.problems += [*_value_problems(findings, label.path), *_overlaps(label, labels)]
    else:
        grid = read_grid(label.path)
        labels = np.broadcast_to(np.uint8(0), grid.shape)
    findings.problems += [warning(label.path, note) for note in grid.notes]
    whole = onto_grid(labels, grid, findings.first_grid or grid)
    if whole is None:
        _compare_grid(grid, findings)
    elif whole.shape != grid.shape:
        note = f"the mask covers {format_size(grid.shape)} of the {format_size(whole.shape)} voxels; others are 0"
        findings.problems.append(warning(label.path, note))


def _value_problems(findings: _Findings, path: Path) -> Iterable[Problem]:
    case, values = findings.case, findings.labels
    if not set(values) - ({case.scheme.ignore} if case.scheme else set()):
        yield warning(path, "the reference mask is empty", "Fine if there is no lesion; else export the mask again")
    if case.scheme is None:
        return
    if stray := sorted(set(values) - case.scheme.reference_values):
        known = ", ".join(f"{name} {value}" for name, value in case.scheme.values.items())
        listed = f"label value{'s' * (len(stray) > 1)} {', '.join(map(str, stray))}"
        fitting = [name for name, scheme in SCHEMES.items() if set(values) <= set(scheme.values.values())]
        remedy = "Correct the mask, or pass the scheme it was drawn in with --label-scheme"
        remedy += f" ({', '.join(fitting)})" if fitting and findings.is_brain else ""
        yield Problem(str(path), f"{listed} not in label scheme {case.scheme.name} ({known})", remedy)


def _overlaps(label: ImageFile, labels: LabelMap) -> Iterable[Problem]:
    """A warning about the voxels that several masks of one reference hold."""
    total = sum(int(np.count_nonzero(read_labels(path)[0])) for _, path in label.parts)
    if (double := total - int(np.count_nonzero(labels))) > 0:
        order = ", ".join(bare_name(path) for _, path in label.parts)
        found = f"{double} voxels are in more than one of the {len(label.parts)} masks of the classes"
        yield warning(label.path.parent, found, f"The last one counts, in this order: {order}")


def _compare_grid(grid: Grid, findings: _Findings) -> None:
    """Compare with the case's first image; a header that differs in its affine alone can be repaired."""
    first = findings.first_grid
    difference = None if first is None else same_grid(grid, first)
    if first is None or difference is None:
        return
    repair = f"If only the header is wrong, repair a copy with `{findings.repair}`"
    resample = "Save the files of the case with the same rows and columns"
    if grid.dims == 3:
        resample = "Resample all images of the case to one grid"
        resample += f". {_PREPARE}" if findings.is_brain else ""
    remedy = repair if grid.shape == first.shape else resample
    findings.problems.append(Problem(str(grid.source or ""), difference, remedy))


def _check_preparation(findings: _Findings) -> None:
    """Recognise raw clinical scans among BraTS modalities: with skull, not 1 mm, not on one grid."""
    brain = [modality for modality in findings.grids if modality in BRATS_MODALITIES]
    if len(brain) < 2 or not findings.is_brain:
        return
    signs = []
    backgrounds = [findings.background[modality] for modality in brain if modality in findings.background]
    if backgrounds and max(backgrounds) < _STRIPPED_BACKGROUND:
        signs.append(f"not skull-stripped (only {100 * max(backgrounds):.0f} % of the voxels are background)")
    grids = [findings.grids[modality] for modality in brain]
    spacings = [grid.spacing_mm for grid in grids]
    if other := [each for each in spacings if max(abs(mm - 1.0) for mm in each) > _LARGEST_SPACING_DRIFT_MM]:
        signs.append(f"not 1 mm (voxels of {' x '.join(f'{mm:.3g}' for mm in other[0])} mm)")
    if len({grid.shape for grid in grids}) > 1:
        signs.append("not co-registered (modalities have different numbers of voxels)")
    if signs:
        folder = findings.case.images[brain[0]].path.parent
        findings.problems.append(warning(folder, "looks like raw clinical input: " + ", ".join(signs), _PREPARE))


def _compare_values(findings: Sequence[_Findings]) -> None:
    """Warn of images that hold a few whole numbers where others do not: masks whose names do not say so."""
    if all(found.like_masks for found in findings):
        return
    remedy = "If it is a mask, name masks and images with --modality label=SUFFIX --modality image=SUFFIX"
    note = "is read as an image, but looks like a mask"
    for found in findings:
        found.problems += [warning(path, note, remedy) for path in found.like_masks]


def _compare_orientations(findings: Sequence[_Findings]) -> None:
    """Warn of cases whose orientation differs from that of the great majority: a flipped affine looks like that."""
    grids = [(found, found.first_grid) for found in findings]
    counts = Counter(grid.orientation for _, grid in grids if grid is not None and grid.orientation)
    if counts.total() < _FEWEST_TO_COMPARE:
        return
    usual, count = counts.most_common(1)[0]
    if count < 0.8 * counts.total():
        return
    remedy = "It is reoriented on reading; make sure that left and right are not swapped in its header"
    for found, grid in grids:
        if grid is not None and grid.orientation and grid.orientation != usual:
            note = f"axes run {grid.orientation}, but {usual} in {count} of {counts.total()} cases"
            found.problems.append(warning(grid.source, note, remedy))


def _compare_brightness(findings: Sequence[_Findings]) -> None:
    """Warn of images much brighter or darker than the same modality elsewhere (robust z-score of the logarithm)."""
    for modality in dict.fromkeys(modality for found in findings for modality in found.brightness):
        measured = [found for found in findings if modality in found.brightness]
        if len(measured) < _FEWEST_TO_COMPARE:
            continue
        logs = np.array([np.log10(max(found.brightness[modality], 1e-12)) for found in measured])
        deviations = logs - np.median(logs)
        limit = max(1.0, 5 * 1.4826 * float(np.median(np.abs(deviations))))
        outliers = [pair for pair in zip(measured, deviations, strict=True) if abs(pair[1]) > limit]
        is_mixed = len(outliers) > _MOST_OUTLIERS * len(logs)
        for found, deviation in outliers[:1] if is_mixed else outliers:
            direction = "brighter" if deviation > 0 else "darker"
            note = f"{modality} is about {10 ** abs(deviation):.0f} times {direction} than in the other cases"
            remedy = "Make sure it is the right modality and not already normalised"
            if is_mixed:
                note = (
                    f"{modality} of this and {len(outliers) - 1} other cases has another intensity scale than the rest"
                )
                remedy = "Normalisation of each case removes the difference; do not train without it"
            found.problems.append(warning(found.grids[modality].source, note, remedy))
