"""Cross-validation: a run for each fold, and the scores of all cases by the networks that have not seen them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from segkit.errors import RequestError
from segkit.training.changes import Change, settle_settings, with_changes
from segkit.training.folder import (
    SCORES_NAME,
    has_state,
    read_config,
    settings_return_if_refused,
    write_config,
    write_json,
)
from segkit.training.planned import find_cohort, patients_of, with_values
from segkit.training.request import RunRequest
from segkit.training.run import train_run
from segkit.training.summary import RunSummary, summarise_folds

_log = logging.getLogger(__name__)

_OF_A_FOLD = ("data.fold", "training.budget_minutes")
"""Settings that each fold of a cross-validation has its own value of."""


@settings_return_if_refused
def cross_validate(request: RunRequest) -> RunSummary:
    """Train every fold into `RUN/fold_K`; the out-of-fold scores are those of the whole cohort, `RUN` an ensemble.

    A budget is shared equally between the folds that are left. Folds that are finished are not trained again on
    `--resume`.

    Raises:
        RequestError: there is one patient only, or as for `train_run`.
    """
    patients = patients_of(find_cohort(request))
    if patients == 1:
        raise RequestError("one patient cannot be cross-validated", where=request.data, remedy="Train without -f all")
    folds = min(request.config.data.folds, patients)
    cache = request.config.data.cache or request.run / "cache"
    request = replace(request, config=with_values(request.config, "data", folds=folds, cache=cache))
    changes = request.ranks.from_first(lambda: _open_folds(request))
    documents = []
    for fold in range(folds):
        _log.info("fold %d of %d", fold + 1, folds)
        document = request.ranks.from_first(partial(_finished_fold, request, fold))
        documents.append(document or train_run(_fold_request(request, fold, folds - fold, changes)).to_json())
    summary = summarise_folds(request.run, documents, (time.monotonic() - request.started_s) / 60)
    if request.ranks.is_first:
        write_json(request.run / SCORES_NAME, summary.to_json())
    return summary


def _open_folds(request: RunRequest) -> list[Change]:
    """Make the folder of a cross-validation; gives back what a resumed one does otherwise than before."""
    request.run.mkdir(parents=True, exist_ok=True)
    changes = settle_settings(request.run, request.config, resume=request.resume, allow_changes=request.allow_changes)
    write_config(request.run, request.config, {}, f"cross-validation of {request.data}")
    return changes


def _finished_fold(request: RunRequest, fold: int) -> dict[str, Any] | None:
    path = request.run / f"fold_{fold}" / SCORES_NAME
    if not request.resume or not path.exists():
        return None
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _fold_request(request: RunRequest, fold: int, folds_left: int, changes: Sequence[Change]) -> RunRequest:
    """One fold of a cross-validation: begun before, it goes on as it was planned; else with an equal share of the time.

    `changes` are what a resumed cross-validation does otherwise than before, in all its folds.
    """
    run = request.run / f"fold_{fold}"
    now = time.monotonic()
    if request.resume and has_state(run):
        of_all = [change for change in changes if change.name not in _OF_A_FOLD]
        return replace(request, run=run, config=with_changes(read_config(run), of_all), started_s=now)
    config = with_values(request.config, "data", fold=fold)
    if config.training.budget_minutes is not None:
        left = config.training.budget_minutes - (now - request.started_s) / 60
        config = with_values(config, "training", budget_minutes=max(left / folds_left, 0.1))
    return replace(request, run=run, config=config, started_s=now, resume=False)
