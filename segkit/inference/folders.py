"""A folder of cases in, a folder of masks and a manifest out; one bad case never stops the others.

The work on one case is a `CaseWorker` called with a `CaseTask`; an `Executor` decides where it runs. Only this module's
caller writes the manifest, so workers share nothing but the output folder.
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from segkit.data.case import Case, Cohort
from segkit.data.files import (
    IMAGE_SUFFIXES,
    read_grid,
    read_labels,
    stem_of,
    suffix_of,
    write_image,
    write_labels,
)
from segkit.data.layouts.table import find_cases
from segkit.data.pictures import PICTURE_SUFFIXES
from segkit.data.preprocessing import load_case
from segkit.errors import DataError, Problem, RequestError, SegkitError, as_request
from segkit.inference.decode import probability_planes
from segkit.inference.manifest import STAGES, CaseRecord, Manifest
from segkit.inference.predictor import Predictor, match_modalities
from segkit.labels import SCHEMES, LabelScheme
from segkit.runtime import environment, peak_rss_mb

PROBABILITIES = "probabilities"
"""Sub-folder of the output for `<case>_<output>` probability images."""

_T = TypeVar("_T")
_R = TypeVar("_R")
_log = logging.getLogger(__name__)


class Executor(Protocol):
    """Where the work is done: maps `work` over `tasks` and yields each result as it is ready, in any order."""

    def map(self, work: Callable[[_T], _R], tasks: Iterable[_T]) -> Iterator[_R]:
        """Results of `work(task)` for every task; `work` and tasks must survive pickling."""
        ...


class LocalExecutor:
    """One case after the other, in this process and thread."""

    def map(self, work: Callable[[_T], _R], tasks: Iterable[_T]) -> Iterator[_R]:
        """Results of `work(task)` in the order of the tasks."""
        return (work(task) for task in tasks)


@dataclass(frozen=True)
class InferenceSettings:
    """What may be chosen about a run over a folder, apart from models and input."""

    overwrites: bool = False
    """Do cases again whose mask is there."""
    allows_missing: bool = False
    """Put zeros where a modality is missing; recorded."""
    saves_probabilities: bool = False
    """Also write the probability of each output, as `probabilities/<case>_<output>`."""
    label_scheme: str | None = None
    """Values to paint; None: those the input's layout names, else those of the training data."""


@dataclass(frozen=True)
class CaseTask:
    """One case to segment: its images under the model's modality names, and where its mask goes, in which values."""

    case: Case
    target: Path
    scheme: LabelScheme
    missing_modalities: tuple[str, ...] = ()


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
    if case_ids is None:
        return cohort
    known = {case.id: case for case in cohort.cases}
    unknown = [case_id for case_id in case_ids if case_id not in known]
    if unknown:
        hints = [_nearest(case_id, list(known)) for case_id in unknown[:10]]
        raise RequestError(f"{len(unknown)} of the cases asked for are not there: {'; '.join(hints)}", where=root)
    return replace(cohort, cases=tuple(known[case_id] for case_id in dict.fromkeys(case_ids)))


def _why_unreadable(path: Path) -> Problem | None:
    """What is wrong with the one file that the user pointed to; None where that is not the matter."""
    if not path.is_file() or suffix_of(path) not in IMAGE_SUFFIXES:
        return None
    try:
        read_grid(path)
    except DataError as error:
        return Problem(str(path), error.found, error.remedy or "")
    return None


def infer_folder(
    predictor: Predictor,
    cohort: Cohort,
    output: Path,
    settings: InferenceSettings | None = None,
    *,
    executor: Executor | None = None,
    on_record: Callable[[CaseRecord], None] = lambda record: None,
    model: str = "",
) -> dict[str, Any]:
    """Segment every case of a cohort into `output`; gives back the manifest, which is also `output/manifest.json`.

    A case that fails is recorded with a sentence and the next one goes on. `on_record` is called after each case;
    `model` is the name of the model in the manifest.

    Raises:
        RequestError: this model cannot paint the label scheme asked for, or the output folder cannot be written.
    """
    settings = settings or InferenceSettings()
    executor = executor or LocalExecutor()
    manifest = open_manifest(predictor, cohort, output, model)
    tasks, decided = plan_cases(predictor, cohort, output, settings, manifest)
    for problem in cohort.problems:
        _log.info("%s", problem)
    manifest.replacing = {task.case.id for task in tasks if task.target.exists()}
    try:
        manifest.add(*decided)
    except DataError as error:
        raise as_request(error) from error
    for record in decided:
        on_record(record)
    worker = CaseWorker(predictor, settings.saves_probabilities)
    for record in executor.map(worker, tasks):
        manifest.add(record)
        on_record(record)
    return manifest.to_json()


def open_manifest(predictor: Predictor, cohort: Cohort, output: Path, model: str = "") -> Manifest:
    """The manifest of a run that is about to start, with what earlier runs left in the folder; nothing is written."""
    facts = {"model": _model_facts(predictor, model), "environment": environment()}
    return Manifest(output, (case.id for case in cohort.cases), facts, predictor.identity)


def plan_cases(
    predictor: Predictor, cohort: Cohort, output: Path, settings: InferenceSettings, manifest: Manifest
) -> tuple[list[CaseTask], list[CaseRecord]]:
    """What is to be done, and the records of cases that need no work: done before, or impossible as they are.

    Raises:
        RequestError: pictures for a model of volumes, or the reverse; a label scheme that this model cannot paint.
    """
    if cohort.dims != predictor.card.dims:
        kinds = {2: "pictures", 3: "volumes"}
        raise RequestError(
            f"holds {kinds[cohort.dims]}",
            where=cohort.root,
            expected=f"{kinds[predictor.card.dims]}, as this model was trained on",
            remedy="Choose another model",
        )
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
            records.append(CaseRecord(case.id, "failed", _sentence(error), label_scheme=scheme.name))
            continue
        if is_done:
            record = CaseRecord(case.id, "skipped", label_scheme=scheme.name, model=predictor.identity)
            records.append(replace(record, missing_modalities=task.missing_modalities))
        else:
            tasks.append(task)
    return tasks, records


@dataclass(frozen=True)
class CaseWorker:
    """Does one task from files to mask; never raises but for what ends the whole program."""

    predictor: Predictor
    saves_probabilities: bool = False

    def __call__(self, task: CaseTask) -> CaseRecord:
        """Segment the case, write its mask, and tell what became of it."""
        seconds = dict.fromkeys(STAGES, 0.0)
        error = None
        try:
            self._segment(task, seconds)
        except Exception as caught:
            error = _sentence(caught)
            _log.debug("%s failed", task.case.id, exc_info=True)
        return CaseRecord(
            task.case.id,
            "done" if error is None else "failed",
            error,
            {stage: round(value, 4) for stage, value in seconds.items()},
            round(peak_rss_mb(), 1),
            label_scheme=task.scheme.name,
            missing_modalities=task.missing_modalities,
            model=self.predictor.identity,
        )

    def _segment(self, task: CaseTask, seconds: dict[str, float]) -> None:
        predictor = self.predictor
        with _timed(seconds, "read"):
            loaded = load_case(task.case, predictor.card.modalities, None, allow_missing=bool(task.missing_modalities))
        grid = loaded.grid
        with _timed(seconds, "preprocess"):
            prepared = predictor.prepare(loaded)
        del loaded  # the source image is not needed any more, and may be the largest array of all
        with _timed(seconds, "predict"):
            logits = predictor.predict_prepared(prepared)
        preparation = prepared.preparation
        del prepared
        with _timed(seconds, "decode"):
            labels = predictor.decode(logits, preparation, task.scheme)
        with _timed(seconds, "write"):
            if self.saves_probabilities:
                planes = probability_planes(logits, preparation, predictor.activation)
                for path, plane in zip(_probability_paths(task.target, predictor), planes, strict=True):
                    write_image(path, plane, grid)
            write_labels(task.target, labels, grid)


def _plan_case(
    case: Case, cohort: Cohort, output: Path, scheme: LabelScheme, predictor: Predictor, settings: InferenceSettings
) -> CaseTask:
    _refuse_odd_id(case.id)
    blocking = [problem for problem in case.problems if problem.is_fatal and not _is_about_reference(problem)]
    if blocking:
        raise DataError("; ".join(str(problem) for problem in blocking))
    wanted = predictor.card.modalities
    matched = match_modalities(case, wanted, allow_missing=settings.allows_missing)
    target = output / f"{case.id}{'.png' if cohort.dims == 2 else '.nii.gz'}"
    files = [*case.images.values(), *([case.label] if case.label else [])]
    if any(_is_same_file(target, file.path) for file in files):
        raise DataError(
            "the mask would take the place of a file of the case itself",
            where=target,
            remedy="Choose another output folder",
        )
    return CaseTask(matched, target, scheme, tuple(name for name in wanted if name not in matched.images))


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
    paths = _probability_paths(task.target, predictor) if settings.saves_probabilities else []
    try:
        read_labels(task.target)
    except DataError:
        return False
    return all(path.exists() for path in paths)


def _probability_paths(target: Path, predictor: Predictor) -> list[Path]:
    suffix = ".tif" if predictor.card.dims == 2 else ".nii.gz"
    folder = target.parent / PROBABILITIES
    return [folder / f"{stem_of(target)}_{output.name}{suffix}" for output in predictor.card.outputs]


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


def _refuse_odd_id(case_id: str) -> None:
    is_plain = case_id not in ("", ".", "..") and not any(letter in "/\\:\0" for letter in case_id)
    if not is_plain or not case_id.isprintable():
        raise DataError(
            f"case id {case_id!r} cannot be used as a file name", remedy="Rename the case's folder or files"
        )


def _is_same_file(target: Path, path: Path) -> bool:
    return target.exists() and path.exists() and target.samefile(path)


def _nearest(case_id: str, known: list[str]) -> str:
    near = difflib.get_close_matches(case_id, known, n=3, cutoff=0.4)
    return f"{case_id!r}" + (f" (nearest: {', '.join(near)})" if near else "")


def _model_facts(predictor: Predictor, name: str) -> dict[str, Any]:
    card = predictor.card
    return {
        "name": name,
        "family": card.network.family,
        "size": card.network.size,
        "modalities": list(card.modalities),
        "label_scheme": predictor.scheme.name,
        "sha256": predictor.digests,
        "tta": predictor.uses_tta,
        "device": str(predictor.device),
    }


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] += time.perf_counter() - start


_MEMORY_SIGNS = ("out of memory", "allocate memory", "not enough memory", "bad allocation", "bad_alloc")


def _sentence(error: Exception) -> str:
    """One line that a user without knowledge of Python understands."""
    text = " ".join(str(error).split())
    if isinstance(error, SegkitError):
        return text
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _MEMORY_SIGNS):
        return (
            f"out of memory after {peak_rss_mb():.0f} MB. Close other programs, use a machine with more memory, "
            "or a model with a smaller patch or fewer outputs"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return (
        f"unexpected {type(error).__name__}: {text[:300]}. This is a fault of segkit: run again with -v for the trace"
    )
