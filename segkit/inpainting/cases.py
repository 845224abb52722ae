"""Which cases there are to fill, which need no work, and which files each of the others gets."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

from segkit.batch.cases import is_same_file, refuse_odd_id, refuse_other_dims, refuse_unusable
from segkit.batch.manifest import CaseRecord, Manifest
from segkit.batch.worker import sentence
from segkit.errors import DataError, RequestError
from segkit.inpainting.masks import HoleSource
from segkit.inpainting.worker import Filler, FillingRecord, FillingTask
from segkit.reading.case import Case, Cohort
from segkit.reading.files import read_volume, suffix_of
from segkit.reading.layouts.synthesis import SYNTHESIS_LAYOUT
from segkit.reading.modalities import match_modalities

_VOIDED = re.compile("(?<=t1n)-voided", re.IGNORECASE)
"""What tells the name of a voided scan of BraTS local synthesis from that of the whole one beside it."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InpaintingSettings:
    """What may be chosen about a run over a folder, apart from model, input and holes."""

    overwrites: bool = False
    """Do cases again whose images are there."""
    writes_holes: bool = False
    """Also write what was made up, as the mask `<case>_hole`."""
    writes_anomaly: bool = False
    """Also write the anomaly map, as `<case>_anomaly`."""
    bank: Path | None = None
    """Folder of a bank of lesion-free copies to write as well."""


def plan_cases(
    filler: Filler, cohort: Cohort, output: Path, holes: HoleSource, settings: InpaintingSettings, manifest: Manifest
) -> tuple[list[FillingTask], list[CaseRecord]]:
    """What is to be done, and the records of cases that need no work: done before, or impossible as they are.

    Raises:
        RequestError: pictures for a model of volumes, or a bank of pictures.
    """
    if not (filler.card.dims == 2 and cohort.dims == 3):  # a model of slices fills volumes
        refuse_other_dims(cohort, filler.card.dims)
    if settings.bank is not None and cohort.dims == 2:
        raise RequestError("holds pictures", where=cohort.root, expected="volumes, for a bank", remedy="Omit --bank")
    tasks: list[FillingTask] = []
    records: list[CaseRecord] = []
    for case in cohort.cases:
        try:
            task = _plan_case(case, cohort, output, holes, filler.card.modalities, settings)
            is_done = not settings.overwrites and _is_done(task, manifest)
        except DataError as error:
            _log.debug("%s cannot be done", case.id, exc_info=True)
            records.append(FillingRecord(case.id, "failed", sentence(error)))
            continue
        if is_done:
            records.append(FillingRecord(case.id, "skipped", model=manifest.identity))
        else:
            tasks.append(task)
    return tasks, records


def _plan_case(
    case: Case,
    cohort: Cohort,
    output: Path,
    holes: HoleSource,
    modalities: tuple[str, ...],
    settings: InpaintingSettings,
) -> FillingTask:
    refuse_odd_id(case.id)
    refuse_unusable(case)
    segmented = None if holes.segmenter is None else _matched(case, holes.segmenter.card.modalities)
    matched = _matched(case, modalities)
    suffix = ".nii.gz" if cohort.dims == 3 else ".png"
    task = FillingTask(
        _with_truth(matched) if settings.writes_anomaly and cohort.layout == SYNTHESIS_LAYOUT else matched,
        _targets(matched, output, cohort),
        None if holes.segmenter else holes.mask_of(case),
        segmented,
        output / f"{case.id}_hole{suffix}" if settings.writes_holes else None,
        output / f"{case.id}_anomaly{'.nii.gz' if cohort.dims == 3 else '.tif'}" if settings.writes_anomaly else None,
        settings.bank,
    )
    files = [*case.images.values(), *([case.label] if case.label else []), *([task.mask] if task.mask else [])]
    for path in task.paths():
        if any(is_same_file(path, file.path) for file in files):
            raise DataError(
                "the result would take the place of a file of the case itself",
                where=path,
                remedy="Choose another output folder",
            )
    return task


def _matched(case: Case, wanted: tuple[str, ...]) -> Case:
    """The case with its images under a model's modality names; none of them may be missing here.

    Raises:
        DataError: one is.
    """
    try:
        return match_modalities(case, wanted)
    except DataError as error:
        remedy = "Add the files, or say which file is which with --modality NAME=SUFFIX"
        raise DataError(error.found, expected=error.expected, remedy=remedy) from error


def _targets(case: Case, output: Path, cohort: Cohort) -> dict[str, Path]:
    """Modality -> the file it goes to; the colours of a picture go to one file."""
    if cohort.dims == 3:
        mark = "-" if cohort.layout == SYNTHESIS_LAYOUT else "_"
        return {name: output / f"{case.id}{mark}{name}-inference.nii.gz" for name in case.images}
    files = list(case.images.values())
    # Other formats lose something of a picture, or cannot hold numbers of 32 bits.
    suffix = ".tif" if any(suffix_of(file.path) in (".tif", ".tiff") for file in files) else ".png"
    if [file.channel for file in files] == [0, 1, 2] and len({file.path for file in files}) == 1:
        return dict.fromkeys(case.images, output / f"{case.id}-inference{suffix}")
    return {name: output / f"{case.id}_{name}-inference{suffix}" for name in case.images}


def _with_truth(case: Case) -> Case:
    """A case of the challenge with the image before its hole was cut out of it, where that is beside it.

    Raises:
        DataError: it is not, as in the challenge's test cases.
    """
    images = {}
    for name, file in case.images.items():
        whole = file.path.with_name(_VOIDED.sub("", file.path.name))
        if not whole.exists():
            raise DataError(
                "there is no image to compare with: in the voided one the hole is empty",
                where=case.id,
                expected=f"{whole.name} beside it, for an anomaly map",
                remedy="Leave out --anomaly",
            )
        images[name] = replace(file, path=whole)
    return replace(case, images=images)


def _is_done(task: FillingTask, manifest: Manifest) -> bool:
    """Whether the case was done before in the same way; refuses to replace an image that was not made so."""
    case_id = task.case.id
    targets = set(task.targets.values())
    there = [path for path in targets if path.exists()]
    if not there or manifest.was_cut_short(case_id):
        return False
    if not manifest.was_made(case_id, None, ()):
        raise DataError(
            "an image that was not made by this model with these holes is already there",
            where=there[0],
            remedy="Choose another output folder, or pass --overwrite to replace it",
        )
    if not all(path.exists() for path in task.paths()):
        return False
    try:
        for path in targets:
            read_volume(path, None if len(targets) == len(task.targets) else 0)
    except DataError:
        return False
    return True
