"""Which cases there are to segment, which need no work, and what each of the others asks for."""

from __future__ import annotations

import difflib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from segkit.batch.manifest import CaseRecord, Manifest
from segkit.batch.worker import CaseTask, further_paths, sentence
from segkit.errors import DataError, Problem, RequestError, as_request
from segkit.inference.predictor import Predictor
from segkit.labels import SCHEMES, LabelScheme
from segkit.reading.case import Case, Cohort, is_file_name
from segkit.reading.dicom_seg import is_dicom_source
from segkit.reading.files import IMAGE_SUFFIXES, read_grid, read_labels, stem_of, suffix_of
from segkit.reading.layouts.table import find_cases
from segkit.reading.modalities import match_modalities
from segkit.reading.pictures import PICTURE_SUFFIXES

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InferenceSettings:
    """What may be chosen about a run over a folder, apart from models and input."""

    overwrites: bool = False
    """Do cases again whose mask is there."""
    allows_missing: bool = False
    """Put zeros where a modality is missing; recorded."""
    saves_probabilities: bool = False
    """Also write the probability of each output, as `probabilities/<case>_<output>`."""
    saves_uncertainty: bool = False
    """Also write entropy and disagreement, as `uncertainty/<case>_entropy` and `uncertainty/<case>_disagreement`."""
    keeps_patient: bool = False
    """Copy name, numbers and dates of the patient into DICOM SEG files."""
    label_scheme: str | None = None
    """Values to paint; None: those the input's layout names, else those of the training data."""


def find_input(
    root: Path,
    *,
    layout: str | None = None,
    modalities: Mapping[str, str] | None = None,
    case_ids: Sequence[str] | None = None,
    exclude: Path | None = None,
) -> Cohort:
    """The cases of a data folder, a case folder or one file, or those of them that `case_ids` names.

    What lies below `exclude`, the folder for the masks, is not input.

    Raises:
        RequestError: nothing is there, or an id is unknown; the nearest ids are named.
    """
    try:
        cohort = find_cases(root, layout=layout, modalities=modalities, exclude=exclude)
    except DataError as error:
        unreadable = _why_unreadable(root)
        if unreadable is None:
            raise as_request(error) from error
        case = Case(stem_of(root), stem_of(root), {}, problems=(unreadable,))
        return Cohort(root, "file", None, (), (case,), dims=2 if suffix_of(root) in PICTURE_SUFFIXES else 3)
    if not cohort.cases:
        raise RequestError("holds no case", where=root, expected="images", remedy="Look at it with `segkit check`")
    return cohort if case_ids is None else choose_cases(cohort, case_ids)


def choose_cases(cohort: Cohort, case_ids: Sequence[str]) -> Cohort:
    """The cohort with these cases only, in this order.

    Raises:
        RequestError: an id is unknown; the nearest ids are named.
    """
    known = {case.id: case for case in cohort.cases}
    unknown = [case_id for case_id in case_ids if case_id not in known]
    if unknown:
        hints = [_nearest(case_id, list(known)) for case_id in unknown[:10]]
        found = f"{len(unknown)} of the cases asked for are not there: {'; '.join(hints)}"
        raise RequestError(found, where=cohort.root)
    return replace(cohort, cases=tuple(known[case_id] for case_id in dict.fromkeys(case_ids)))


def take_part(cohort: Cohort, parts: int, part_id: int) -> tuple[Cohort, str | None]:
    """Every `parts`-th case from the `part_id`-th on, for runs that share the work, and the name of that part.

    Raises:
        RequestError: there is no such part.
    """
    if part_id >= parts:
        raise RequestError(f"part {part_id} of {parts} does not exist", expected=f"--part-id from 0 to {parts - 1}")
    if parts == 1:
        return cohort, None
    return replace(cohort, cases=cohort.cases[part_id::parts]), f"part_{part_id}_of_{parts}"


def _why_unreadable(path: Path) -> Problem | None:
    """What is wrong with the one file that the user pointed to; None where that is not the matter."""
    if not path.is_file() or suffix_of(path) not in IMAGE_SUFFIXES:
        return None
    try:
        read_grid(path)
    except DataError as error:
        return Problem(str(path), error.found, error.remedy or "")
    return None


def plan_cases(
    predictor: Predictor, cohort: Cohort, output: Path, settings: InferenceSettings, manifest: Manifest
) -> tuple[list[CaseTask], list[CaseRecord]]:
    """What is to be done, and the records of cases that need no work: done before, or impossible as they are.

    Raises:
        RequestError: pictures for a model of volumes, or the reverse; a label scheme that this model cannot paint.
    """
    refuse_other_dims(cohort, predictor.card.dims)
    asked = None if settings.label_scheme is None else _scheme_asked(settings.label_scheme, predictor)
    tasks: list[CaseTask] = []
    records: list[CaseRecord] = []
    for case in cohort.cases:
        scheme = asked or _scheme_of(case, cohort, predictor)
        try:
            task = _plan_case(case, cohort, output, scheme, predictor, settings)
            is_done = _is_done(task, manifest, settings, predictor)
        except DataError as error:
            _log.debug("%s cannot be done", case.id, exc_info=True)
            records.append(CaseRecord(case.id, "failed", sentence(error), label_scheme=scheme.name))
            continue
        if is_done:
            record = CaseRecord(case.id, "skipped", label_scheme=scheme.name, model=predictor.identity)
            records.append(replace(record, missing_modalities=task.missing_modalities))
        else:
            tasks.append(task)
    return tasks, records


def refuse_other_dims(cohort: Cohort, dims: int) -> None:
    """Refuse pictures for a model of volumes (`dims` 3), and the reverse.

    Raises:
        RequestError: as said.
    """
    if cohort.dims != dims:
        kinds = {2: "pictures", 3: "volumes"}
        raise RequestError(
            f"holds {kinds[cohort.dims]}",
            where=cohort.root,
            expected=f"{kinds[dims]}, as this model was trained on",
            remedy="Choose another model",
        )


def refuse_unusable(case: Case) -> None:
    """Refuse a case whose images cannot be used; what is wrong with its reference does not matter here.

    Raises:
        DataError: as said.
    """
    blocking = [problem for problem in case.problems if problem.is_fatal and not _is_about_reference(problem)]
    if blocking:
        raise DataError("; ".join(str(problem) for problem in blocking))


def _plan_case(
    case: Case, cohort: Cohort, output: Path, scheme: LabelScheme, predictor: Predictor, settings: InferenceSettings
) -> CaseTask:
    refuse_odd_id(case.id)
    refuse_unusable(case)
    wanted = predictor.card.modalities
    matched = match_modalities(case, wanted, allow_missing=settings.allows_missing)
    target = output / f"{case.id}{'.png' if cohort.dims == 2 else '.nii.gz'}"
    files = [*case.images.values(), *([case.label] if case.label else [])]
    if any(is_same_file(target, file.path) for file in files):
        raise DataError(
            "the mask would take the place of a file of the case itself",
            where=target,
            remedy="Choose another output folder",
        )
    missing = tuple(name for name in wanted if name not in matched.images)
    dicom_target = target.with_name(f"{case.id}.dcm") if _is_dicom(matched) else None
    return CaseTask(
        matched,
        target,
        scheme,
        missing,
        settings.saves_probabilities,
        settings.saves_uncertainty,
        dicom_target,
        settings.keeps_patient,
    )


def _is_done(task: CaseTask, manifest: Manifest, settings: InferenceSettings, predictor: Predictor) -> bool:
    """Whether the case was done before in the same way; refuses to replace a mask that was not made so."""
    case_id = task.case.id
    if settings.overwrites or not task.target.exists() or manifest.was_cut_short(case_id):
        return False
    if not manifest.was_made(case_id, task.scheme.name, task.missing_modalities):
        raise DataError(
            "a mask that was not made by this model with these options is already there",
            where=task.target,
            remedy="Choose another output folder, or pass --overwrite to replace it",
        )
    try:
        read_labels(task.target)
    except DataError:
        return False
    return all(path.exists() for path in further_paths(task, predictor))


def _is_dicom(case: Case) -> bool:
    """Whether a DICOM SEG can be written for a case."""
    if not is_dicom_source(case):
        return False
    if importlib.util.find_spec("highdicom") is None:
        _log.info("%s: install segkit[dicom] for a DICOM SEG beside the mask", case.id)
        return False
    return True


def _scheme_of(case: Case, cohort: Cohort, predictor: Predictor) -> LabelScheme:
    """The scheme the input names, unless it has no value for a tissue that the model paints; else the training's."""
    named = case.scheme or cohort.scheme
    if named is None or not predictor.can_paint(named):
        return predictor.scheme
    return named


def _scheme_asked(name: str, predictor: Predictor) -> LabelScheme:
    scheme = predictor.scheme if name == predictor.scheme.name else SCHEMES.get(name)
    if scheme is None:
        raise RequestError(f"label scheme {name!r} is not known", expected=f"one of {', '.join(SCHEMES)}")
    if not predictor.can_paint(scheme):
        raise RequestError(
            f"label scheme {name} has no value for some of what this model paints"
            f" ({', '.join(predictor.scheme.values)})",
            expected=f"{predictor.scheme.name}, or another scheme with these tissues",
        )
    return scheme


def _is_about_reference(problem: Problem) -> bool:
    """Whether a finding concerns only the reference mask, which inference does not read."""
    return "reference" in problem.found


def refuse_odd_id(case_id: str) -> None:
    """Refuse a case id that is no file name.

    Raises:
        DataError: as said.
    """
    if not is_file_name(case_id):
        raise DataError(
            f"case id {case_id!r} cannot be used as a file name", remedy="Rename the case's folder or files"
        )


def is_same_file(target: Path, path: Path) -> bool:
    """Whether both are there and are one file, by whatever names or links."""
    return target.exists() and path.exists() and target.samefile(path)


def _nearest(case_id: str, known: list[str]) -> str:
    near = difflib.get_close_matches(case_id, known, n=3, cutoff=0.4)
    return f"{case_id!r}" + (f" (nearest: {', '.join(near)})" if near else "")
