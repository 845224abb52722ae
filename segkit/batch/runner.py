"""A folder of cases in, a folder of masks and a manifest out; one bad case never stops the others.

The work on one case is a `CaseWorker` called with a `CaseTask`; an `Executor` decides where it runs. Only this module's
caller writes the manifest, so workers share nothing but the output folder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from segkit.batch.cases import InferenceSettings, plan_cases
from segkit.batch.executor import Executor, LocalExecutor
from segkit.batch.forecast import fit_memory
from segkit.batch.manifest import CaseRecord, Manifest
from segkit.batch.worker import PROBABILITIES, UNCERTAINTY, CaseWorker
from segkit.errors import DataError, as_request
from segkit.inference.predictor import Predictor
from segkit.reading.case import Cohort
from segkit.reading.files import remove_leftovers, way_to
from segkit.runtime import environment

_log = logging.getLogger(__name__)


def infer_folder(
    predictor: Predictor,
    cohort: Cohort,
    output: Path,
    settings: InferenceSettings | None = None,
    *,
    executor: Executor | None = None,
    memory_mb: float | None = None,
    on_record: Callable[[CaseRecord], None] = lambda record: None,
    model: str = "",
    part: str | None = None,
    data: Path | None = None,
) -> dict[str, Any]:
    """Segment every case of a cohort into `output`; gives back the manifest, which is also `output/manifest.json`.

    A case that fails is recorded with a sentence and the next one goes on. `on_record` is called after each case;
    `memory_mb` is what a process may take, by default nearly all that is free: cases are done one after the other and
    windows are made smaller where that does not suffice. On other machines they stay as they are unless it is given.
    `model` is the name of the model in the manifest, `part` that of this run where several share a folder, `data` where
    the images stay.

    Raises:
        RequestError: this model cannot paint the label scheme asked for, or the output folder cannot be written.
    """
    settings = settings or InferenceSettings()
    for folder in (output, output / PROBABILITIES, output / UNCERTAINTY):
        remove_leftovers(folder)
    manifest = open_manifest(predictor, cohort, output, model, part, data)
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
    executor = executor or LocalExecutor()
    if isinstance(executor, LocalExecutor) or memory_mb is not None:
        tasks, has_room = fit_memory(predictor, tasks, memory_mb)
        executor = executor if has_room or not isinstance(executor, LocalExecutor) else LocalExecutor(workers=0)
    is_plain = isinstance(executor, LocalExecutor) and executor.workers == 0
    with closing(manifest):
        for record in executor.map(CaseWorker(predictor, uses_threads=not is_plain), tasks):
            manifest.add(record)
            on_record(record)
    return manifest.to_json()


def open_manifest(
    predictor: Predictor,
    cohort: Cohort,
    output: Path,
    model: str = "",
    part: str | None = None,
    data: Path | None = None,
) -> Manifest:
    """The manifest of a run that is about to start, with what earlier runs left in the folder; nothing is written.

    It tells the way to `data`, by which `segkit report` finds the images.
    """
    facts: dict[str, Any] = {"model": _model_facts(predictor, model), "environment": environment()}
    if data is not None:
        facts["data"] = way_to(data, output)
    return Manifest(output, (case.id for case in cohort.cases), facts, predictor.identity, part)


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
        "backend": predictor.backend.name,
    }
