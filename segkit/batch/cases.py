"""The cases of an input, those that are finished or cannot be used, and the plans of all others."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from segkit.batch.manifest import CaseRecord, InputFile, Manifest
from segkit.batch.worker import CasePlan, P, Task
from segkit.errors import DataError, Problem, RequestError, as_request
from segkit.reading.case import Case, Cohort, is_file_name
from segkit.reading.files import IMAGE_SUFFIXES, read_grid, stem_of, suffix_of
from segkit.reading.layouts.table import find_cases
from segkit.reading.pictures import PICTURE_SUFFIXES
from segkit.runtime import error_sentence

_log = logging.getLogger(__name__)


def find_input(
    root: Path,
    *,
    layout: str | None = None,
    modalities: Mapping[str, str] | None = None,
    case_ids: Sequence[str] | None = None,
    exclude: Path | None = None,
) -> Cohort:
    """The cases of a data folder, a case folder or one file, or those that `case_ids` names.

    Files below `exclude`, the output folder, are not input.

    Raises:
        RequestError: there is no case, or an id is unknown; the nearest ids are named.
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
        raise RequestError("holds no case", where=root, expected="images", remedy="Run `segkit check` on it")
    return choose_cases(cohort, case_ids)


def _why_unreadable(path: Path) -> Problem | None:
    """The problem of a file that was passed; None if it can be read or is not an image."""
    if not path.is_file() or suffix_of(path) not in IMAGE_SUFFIXES:
        return None
    try:
        read_grid(path)
    except DataError as error:
        return Problem(str(path), error.found, error.remedy or "")
    return None


def choose_cases(cohort: Cohort, case_ids: Sequence[str] | None) -> Cohort:
    """The cohort with these cases only, in this order; None: all.

    Raises:
        RequestError: an id is unknown; the nearest ids are named.
    """
    if case_ids is None:
        return cohort
    known = {case.id: case for case in cohort.cases}
    unknown = [case_id for case_id in case_ids if case_id not in known]
    if unknown:
        hints = []
        for case_id in unknown[:10]:
            near = difflib.get_close_matches(case_id, known, n=3, cutoff=0.4)
            hints.append(f"{case_id!r}" + (f" (nearest: {', '.join(near)})" if near else ""))
        found = f"{len(unknown)} of the requested cases do not exist: {'; '.join(hints)}"
        raise RequestError(found, where=cohort.root, remedy="`segkit check` lists the cases")
    problems = tuple(replace(problem, left_out=()) for problem in cohort.problems)  # the user has chosen
    return replace(cohort, cases=tuple(known[case_id] for case_id in dict.fromkeys(case_ids)), problems=problems)


def take_part(cohort: Cohort, parts: int, part_id: int) -> tuple[Cohort, str | None]:
    """Every `parts`-th case from the `part_id`-th on, and the name of that part; RequestError if it does not exist."""
    if part_id >= parts:
        raise RequestError(f"part {part_id} of {parts} does not exist", expected=f"--part-id from 0 to {parts - 1}")
    if parts == 1:
        return cohort, None
    return replace(cohort, cases=cohort.cases[part_id::parts]), f"part_{part_id}_of_{parts}"


def refuse_other_dims(cohort: Cohort, dims: int) -> None:
    """Raise a RequestError for pictures with a model of volumes (`dims` 3), and the reverse."""
    if cohort.dims != dims:
        kinds = {2: "pictures", 3: "volumes"}
        expected = f"{kinds[dims]}, as this model was trained on"
        found, remedy = f"holds {kinds[cohort.dims]}", "Choose another model"
        raise RequestError(found, where=cohort.root, expected=expected, remedy=remedy)


def plan_cases(
    task: Task[P], cohort: Cohort, output: Path, manifest: Manifest, *, overwrite: bool = False
) -> tuple[list[P], list[CaseRecord]]:
    """The plans of the cases to process, and records of finished cases and of cases that cannot be used.

    Raises:
        RequestError: the cohort does not fit the model.
    """
    task.check(cohort)
    plans: list[P] = []
    records: list[CaseRecord] = []
    unknown = 0
    for case in cohort.cases:
        scheme = task.label_scheme_for(case, cohort)
        try:
            _refuse_unusable(case)
            plan = task.plan(case, cohort, output)
            _refuse_to_replace_input(case, plan)
            is_done = not overwrite and _is_done(plan, manifest, task)
            before = manifest.inputs_of(case.id) if is_done else []
            inputs = _inputs_now(plan, before) if is_done else None
        except DataError as error:
            _log.debug("%s cannot be processed", case.id, exc_info=True)
            records.append(task.record_class(case.id, "failed", error_sentence(error), label_scheme=scheme))
            continue
        if inputs is None:
            plans.append(plan)
            continue
        unknown += not before
        done = task.record_class(case.id, "skipped", label_scheme=scheme, model=task.identity, inputs=inputs)
        records.append(replace(done, missing_modalities=plan.missing_modalities))
    if unknown:
        _log.warning(
            "%d results of an earlier version do not record the files they were made from. If scans changed since, "
            "compute the results again with --overwrite; later changes are noticed",
            unknown,
        )
    return plans, records


def _inputs_now(plan: CasePlan, before: Sequence[Mapping[str, Any]]) -> tuple[InputFile, ...] | None:
    """The inputs of a finished case as they are now; None if one differs from `before`, which is empty if unknown."""
    paths = plan.inputs()
    now = tuple(map(InputFile.of, paths, before)) if before else tuple(map(InputFile.of, paths))
    pairs = zip(now, before, strict=False)
    changed = [new.name for new, old in pairs if not new.sha256 or new.sha256 != old.get("sha256")]
    if not changed and len(before) in (0, len(paths)):
        return now
    names = ", ".join(changed) or "the number of its files"
    _log.info("%s: %s has changed since its result was made, which is computed again", plan.case.id, names)
    return None


def _refuse_unusable(case: Case) -> None:
    """Refuse a case whose id or images cannot be used; problems of its reference are ignored."""
    if not is_file_name(case.id):
        found = f"case id {case.id!r} cannot be used as a file name"
        raise DataError(found, remedy="Rename the case's folder or files")
    blocking = [problem for problem in case.problems if problem.is_fatal and "reference" not in problem.found]
    if blocking:
        raise DataError("; ".join(map(str, blocking)))


def _refuse_to_replace_input(case: Case, plan: CasePlan) -> None:
    files = [*plan.inputs(), *(file.path for file in case.images.values()), *([case.label.path] if case.label else [])]
    for path in plan.all_paths():
        if path.exists() and any(file.exists() and path.samefile(file) for file in files):
            found = "the result would replace an input file of the case"
            raise DataError(found, where=path, remedy="Choose another output folder")


def _is_done(plan: CasePlan, manifest: Manifest, task: Task[Any]) -> bool:
    """Whether the case was finished by the same model and options; refuses to replace other results."""
    case_id = plan.case.id
    existing = [path for path in plan.paths("results") if path.exists()]
    if not existing or manifest.was_cut_short(case_id):
        return False
    if not manifest.was_made(case_id, plan.label_scheme, plan.missing_modalities):
        raise DataError(
            f"{task.foreign_result} is already there",
            where=existing[0],
            remedy="Choose another output folder, or pass --overwrite to replace it",
        )
    if not all(path.exists() for path in plan.all_paths()):
        return False
    try:
        task.read_results(plan)
    except DataError:
        return False
    return True
