"""A folder of cases in, a folder of filled images and a manifest out; one bad case never stops the others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from segkit.batch.executor import Executor, LocalExecutor
from segkit.batch.manifest import CaseRecord, Manifest
from segkit.errors import DataError, as_request
from segkit.inpainting.bank import BankWriter
from segkit.inpainting.cases import InpaintingSettings, plan_cases
from segkit.inpainting.masks import HoleSource
from segkit.inpainting.worker import Filler, FillingRecord, FillingWorker
from segkit.reading.case import Cohort
from segkit.reading.files import remove_leftovers
from segkit.runtime import environment

_log = logging.getLogger(__name__)


def inpaint_folder(
    filler: Filler,
    cohort: Cohort,
    output: Path,
    holes: HoleSource,
    settings: InpaintingSettings | None = None,
    *,
    executor: Executor | None = None,
    on_record: Callable[[CaseRecord], None] = lambda record: None,
    model: str = "",
) -> dict[str, Any]:
    """Fill the holes of every case of a cohort; gives back the manifest, which is also `output/manifest.json`.

    Of each modality of the model an image goes to `output`, in type and geometry that of its file, every voxel outside
    the hole as it was. A case that fails is recorded with a sentence and the next one goes on; one of which nothing is
    missing is written unchanged, with a note. `on_record` is called after each case; `model` is the name of the model
    in the manifest.

    Raises:
        RequestError: the model does not fit the cohort, or a folder cannot be written or holds something else.
    """
    settings = settings or InpaintingSettings()
    manifest = open_manifest(filler, cohort, output, holes, model)
    tasks, records = plan_cases(filler, cohort, output, holes, settings, manifest)
    bank = _open_bank(filler, holes, settings)
    remove_leftovers(output)
    for problem in cohort.problems:
        _log.info("%s", problem)
    manifest.replacing = {task.case.id for task in tasks if any(path.exists() for path in task.targets.values())}
    cases = {case.id: case for case in cohort.cases}

    def note(record: CaseRecord) -> None:
        if bank is not None and record.status != "failed":
            bank.add(cases[record.case])
        if isinstance(record, FillingRecord) and record.note is not None:
            _log.warning("%s: %s", record.case, record.note)
        manifest.add(record)
        on_record(record)

    try:
        manifest.write()
    except DataError as error:
        raise as_request(error) from error
    for record in records:
        note(record)
    executor = executor or LocalExecutor()
    is_plain = isinstance(executor, LocalExecutor) and executor.workers == 0
    worker = FillingWorker(filler, holes.segmenter, holes.margin_mm, manifest.identity, uses_threads=not is_plain)
    with closing(manifest):
        for record in executor.map(worker, tasks):
            note(record)
    return manifest.to_json()


def open_manifest(filler: Filler, cohort: Cohort, output: Path, holes: HoleSource, model: str = "") -> Manifest:
    """The manifest of a run that is about to start, with what earlier runs left in the folder; nothing is written."""
    facts = {"model": _model_facts(filler, model), "holes": holes.to_json(), "environment": environment()}
    identity = f"{filler.card.sha256[:16]}+{holes.identity}"
    return Manifest(output, (case.id for case in cohort.cases), facts, identity, task="inpainting")


def _open_bank(filler: Filler, holes: HoleSource, settings: InpaintingSettings) -> BankWriter | None:
    if settings.bank is None:
        return None
    facts = holes.to_json()
    model = {"sha256": filler.card.sha256, "margin_mm": facts["margin_mm"], "lesions_sha256": facts["sha256"]}
    return BankWriter(settings.bank, filler.card.modalities, model)


def _model_facts(filler: Filler, name: str) -> dict[str, Any]:
    card = filler.card
    return {
        "name": name,
        "family": card.network.family,
        "size": card.network.size,
        "modalities": list(card.modalities),
        "sha256": [filler.card.sha256],
        "backend": filler.backend.name,
    }
