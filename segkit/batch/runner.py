"""Processing of all cases of a folder, with a manifest; a case that fails does not stop the others."""

import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from segkit.batch.cases import plan_cases
from segkit.batch.manifest import CaseRecord, Manifest
from segkit.batch.worker import CaseWorker, Executor, LocalExecutor, P, Task
from segkit.errors import DataError, as_request
from segkit.reading.case import Cohort
from segkit.reading.files import remove_leftovers, way_to
from segkit.runtime import environment

_log = logging.getLogger(__name__)


def run_folder(
    task: Task[P],
    cohort: Cohort,
    output: Path,
    *,
    overwrite: bool = False,
    executor: Executor | None = None,
    memory_gb: float | None = None,
    on_record: Callable[[CaseRecord], None] = lambda record: None,
    model: str = "",
    part: str | None = None,
    data: Path | None = None,
) -> dict[str, Any]:
    """Process each case of a cohort; returns the manifest, which is also `output/manifest.json`.

    `on_record` is called after each case. `memory_gb` is the memory limit of the process (default: nearly all free
    memory): if it is short, cases are processed one at a time and windows become smaller. On other machines windows
    keep their size unless it is given. In the manifest, `model` is the name of the model, `part` that of this run if
    several share a folder, `data` the folder of the images.

    Raises:
        RequestError: the task does not fit the cohort, or a folder cannot be written or holds other results.
    """
    manifest = open_manifest(task, cohort, output, model, part, data)
    plans, decided = plan_cases(task, cohort, output, manifest, overwrite=overwrite)
    log = task.open_log(cohort)
    for folder in (output, *output.glob("*/")):
        remove_leftovers(folder)
    for problem in cohort.problems:
        _log.log(logging.WARNING if problem.left_out else logging.INFO, "%s", problem)
    manifest.replacing = {plan.case.id for plan in plans if any(path.exists() for path in plan.paths("results"))}
    try:
        manifest.add(*decided)
    except DataError as error:
        raise as_request(error) from error
    for record in decided:
        log(record)
        on_record(record)
    executor = executor or LocalExecutor()
    is_local = isinstance(executor, LocalExecutor)
    if is_local or memory_gb is not None:
        task, plans, has_room = task.fit_memory(plans, memory_gb)
        if is_local and not has_room:
            executor = LocalExecutor(workers=0)
    has_threads = not isinstance(executor, LocalExecutor) or executor.workers > 0
    with closing(manifest):
        for record in executor.map(CaseWorker(task, uses_threads=has_threads), plans):
            log(record)
            manifest.add(record)
            on_record(record)
    return manifest.to_json()


def open_manifest(
    task: Task[Any], cohort: Cohort, output: Path, model: str = "", part: str | None = None, data: Path | None = None
) -> Manifest:
    """The manifest of a new run, with the records of earlier runs in the folder; nothing is written.

    `data` is recorded relative to the output, for `segkit report`.

    Raises:
        RequestError: the folder has the manifest of another task.
    """
    facts = {**task.facts(model), "environment": environment()}
    facts |= {"files": dict(cohort.files), "left_out": list(cohort.left_out)}
    if data is not None:
        facts["data"] = way_to(data, output)
    return Manifest(output, (case.id for case in cohort.cases), facts, task.identity, part, task=task.name)
