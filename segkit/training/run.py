"""From a data folder to a run folder: find, split, plan, prepare, fit, score.

Functions appear in the order in which they run. A run folder keeps everything: `config.yaml` (every setting, with what
planning chose and why), `split.json`, `metrics.jsonl`, `model.safetensors` with `model.json`, `validation.json`,
`figures/`, and the resume state.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from segkit.checkpoint import (
    LAST_NAME,
    ModelCard,
    NetworkCard,
    OutputCard,
    SchemeCard,
    TrainingData,
    load_card,
    load_model,
)
from segkit.config.loading import annotated_yaml
from segkit.data.case import Case
from segkit.data.dataset import PatchDataset
from segkit.data.preprocessing import load_case
from segkit.data.store import PreparedStore, StoredCases
from segkit.errors import DataError, RequestError
from segkit.inference.predictor import Predictor
from segkit.labels import outputs_of
from segkit.losses.compound import SegmentationLoss
from segkit.metrics.overlap import dice_by_region
from segkit.models.table import build_model
from segkit.report.figures import overlay_figure
from segkit.runtime import available_cores, environment, peak_rss_mb, seed_everything
from segkit.training.loop import fit
from segkit.training.planned import PlannedRun, RunRequest, plan_run, with_values
from segkit.training.segmentation import ENDLESS, SegmentationTask

_log = logging.getLogger(__name__)

_PICTURES = 3
"""Validation cases drawn at the end of a run."""


@dataclass(frozen=True)
class RunSummary:
    """How a run ended: mean validation Dice per output, per case, and what it cost."""

    run: Path
    dice: Mapping[str, float]
    cases: Mapping[str, Mapping[str, float]]
    steps: int
    minutes: float
    peak_rss_mb: float
    skipped: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The document printed by `segkit train --json` and kept as validation.json."""
        return {
            "run": str(self.run),
            "dice": dict(self.dice),
            "cases": {case_id: dict(dice) for case_id, dice in self.cases.items()},
            "steps": self.steps,
            "minutes": round(self.minutes, 2),
            "peak_rss_mb": round(self.peak_rss_mb),
            "skipped": dict(self.skipped),
        }


def train_run(request: RunRequest) -> RunSummary:
    """Train one fold and write its run folder.

    Raises:
        RequestError: the folder is in use, or nothing can be trained on as asked.
        DataError: the data cannot be read.
    """
    _claim(request)
    planned = plan_run(request)
    _write_plan(planned)
    store = PreparedStore(planned.config.data.cache or request.run / "cache")
    ids = (*planned.training_ids, *planned.validation_ids)
    folders, skipped = _prepare(planned, store, planned.cases(ids))
    task = _build_task(planned, folders)
    training = planned.config.training
    deadline_s = None if training.budget_minutes is None else request.started_s + 60 * training.budget_minutes
    state = fit(
        task,
        request.run,
        training,
        planned.config.optimiser,
        device=request.device,
        deadline_s=deadline_s,
        resume=request.is_resumed,
        tell=request.tell,
    )
    per_case = _score(planned, [case_id for case_id in planned.validation_ids if case_id in folders])
    return _finish(planned, per_case, state.step, skipped)


def cross_validate(request: RunRequest) -> RunSummary:
    """Train every fold into `RUN/fold_K`; the out-of-fold scores are those of the whole cohort, `RUN` an ensemble.

    A budget is shared equally between the folds. Folds that are finished are not trained again on `--resume`.
    """
    folds = request.config.data.folds
    per_case: dict[str, Mapping[str, float]] = {}
    skipped: dict[str, str] = {}
    steps, began = 0, time.monotonic()
    budget = request.config.training.budget_minutes
    for fold in range(folds):
        run = request.run / f"fold_{fold}"
        finished = run / "validation.json"
        if request.is_resumed and finished.exists():
            document = json.loads(finished.read_text(encoding="utf-8"))
            per_case |= document["cases"]
            continue
        _log.info("fold %d of %d", fold + 1, folds)
        config = with_values(
            request.config, "data", fold=fold, cache=request.config.data.cache or request.run / "cache"
        )
        if budget is not None:
            left = (budget - (time.monotonic() - request.started_s) / 60) / (folds - fold)
            config = with_values(config, "training", budget_minutes=max(left, 0.1))
        is_resumed = request.is_resumed and (run / LAST_NAME).exists()
        summary = train_run(replace(request, run=run, config=config, is_resumed=is_resumed, started_s=time.monotonic()))
        per_case |= summary.cases
        skipped |= summary.skipped
        steps += summary.steps
    summary = RunSummary(
        request.run,
        _mean_by_output(per_case),
        per_case,
        steps,
        (time.monotonic() - began) / 60,
        peak_rss_mb(),
        skipped,
    )
    _write_json(request.run / "validation.json", summary.to_json())
    return summary


def _claim(request: RunRequest) -> None:
    """Refuse to mix two runs in one folder, and to resume what never began."""
    has_state = (request.run / LAST_NAME).exists()
    if request.is_resumed and not has_state:
        raise RequestError("there is nothing to resume", where=request.run, remedy="Start it without --resume")
    if not request.is_resumed and has_state and not request.may_overwrite:
        raise RequestError(
            "holds a run already",
            where=request.run,
            remedy="Go on with --resume, start again with --overwrite, or name another folder",
        )
    if not request.is_resumed:
        for name in (LAST_NAME, "previous.ckpt", "metrics.jsonl", "validation.json"):
            (request.run / name).unlink(missing_ok=True)
    try:
        (request.run / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot be written to ({error.strerror})", where=request.run) from error


def _write_plan(planned: PlannedRun) -> None:
    run = planned.request.run
    text = annotated_yaml(planned.config, planned.reasons)
    (run / "config.yaml").write_text(f"# {planned.cohort.layout} data in {planned.cohort.root}\n{text}", "utf-8")
    split = {"training": list(planned.training_ids), "validation": list(planned.validation_ids)}
    _write_json(run / "split.json", {**split, "excluded": list(planned.config.data.exclude)})
    for key, reason in planned.reasons.items():
        _log.info("%s: %s", key, reason)


def _prepare(
    planned: PlannedRun, store: PreparedStore, cases: Sequence[Case]
) -> tuple[dict[str, Path], dict[str, str]]:
    """Prepare every case, several at a time; those that cannot be used are named and left out.

    Raises:
        DataError: no training case, or no validation case, can be used.
    """

    def entry(case: Case) -> Path | DataError:
        try:
            return store.entry(case, planned.cohort.modalities, planned.scheme, planned.config.preprocessing)
        except DataError as error:
            return error

    with ThreadPoolExecutor(min(available_cores(), 8)) as pool:
        entries = dict(zip((case.id for case in cases), pool.map(entry, cases), strict=True))
    folders = {case_id: found for case_id, found in entries.items() if isinstance(found, Path)}
    skipped = {case_id: str(found) for case_id, found in entries.items() if isinstance(found, DataError)}
    for reason in skipped.values():
        _log.warning("left out: %s", reason)
    for what, ids in (("training", planned.training_ids), ("validation", planned.validation_ids)):
        if not any(case_id in folders for case_id in ids):
            first = next(iter(skipped.values()), "there is none")
            raise DataError(f"no {what} case can be used", where=planned.request.data, remedy=f"The first: {first}")
    _log.info("%d cases prepared in %s", len(folders), store.folder)
    return folders, skipped


def _build_task(planned: PlannedRun, folders: Mapping[str, Path]) -> SegmentationTask:
    config = planned.config
    card = _card(planned)
    seed_everything(config.training.seed)
    model = build_model(
        card.network.family,
        in_channels=card.network.in_channels,
        out_channels=card.network.out_channels,
        dims=card.dims,
        size=card.network.size,
        **card.network.arguments,
    )
    divisor: tuple[int, ...] = tuple(model.divisor)  # type: ignore[arg-type]
    validation = [folders[case_id] for case_id in planned.validation_ids if case_id in folders]
    return SegmentationTask(
        model=model,
        card=card.model_copy(update={"divisor": divisor}),
        loss_function=SegmentationLoss(card.activation or "sigmoid", outputs_of(planned.scheme), config.loss),
        patches=PatchDataset(
            StoredCases([folders[case_id] for case_id in planned.training_ids if case_id in folders]),
            card.patch_size,
            config.augmentation,
            foreground_fraction=config.training.foreground_fraction,
            seed=config.training.seed,
            length=ENDLESS,
        ),
        validation=StoredCases(validation[: config.training.validation_cases]),
        batch_size=config.planning.batch_size or 1,
        workers=config.training.workers,
    )


def _card(planned: PlannedRun) -> ModelCard:
    config, cohort, scheme = planned.config, planned.cohort, planned.scheme
    outputs = outputs_of(scheme)
    return ModelCard(
        task="segmentation",
        network=NetworkCard(
            family=config.network.family,
            size=config.network.size,
            in_channels=len(cohort.modalities),
            out_channels=len(outputs),
            arguments=config.network.arguments,
        ),
        dims=2 if cohort.dims == 2 else 3,
        modalities=cohort.modalities,
        patch_size=config.planning.patch_size or (),
        overlap=config.overlap,
        divisor=(),
        activation="sigmoid" if scheme.has_regions else "softmax",
        outputs=tuple(OutputCard(name=o.name, label=o.label, members=o.members) for o in outputs),
        label_scheme=SchemeCard(name=scheme.name, labels=dict(scheme.values)),
        mirror_axes=config.augmentation.mirror_axes,
        versions=environment(),
        training_data=TrainingData(
            identity=f"{cohort.layout}: {cohort.root.name}", licence=cohort.licence, cases=len(planned.training_ids)
        ),
        **{name: value for name, value in config.preprocessing.model_dump().items() if name in ModelCard.model_fields},
    )


def _score(planned: PlannedRun, case_ids: Sequence[str]) -> dict[str, dict[str, float]]:
    """Dice of the best weights on the validation cases, each on its own grid, with pictures of three of them."""
    run = planned.request.run
    card = load_card(run)
    predictor = Predictor(load_model(run, planned.request.device), card, planned.request.device)
    regions = {output.name: output.members for output in card.output_list() if output.label != 0}
    names = {value: tissue for tissue, value in planned.scheme.values.items()}
    per_case: dict[str, dict[str, float]] = {}
    for number, case in enumerate(planned.cases(case_ids)):
        loaded = load_case(case, planned.cohort.modalities, planned.scheme)
        if loaded.labels is None:
            continue
        labels = predictor.predict_loaded(loaded).labels
        per_case[case.id] = dice_by_region(labels, loaded.labels, regions)
        if number < _PICTURES:
            path = run / "figures" / f"validation_{number}.png"
            image, title = loaded.image[-1], case.id
            overlay_figure(path, image, labels, loaded.grid, reference=loaded.labels, names=names, title=title)
    return per_case


def _finish(
    planned: PlannedRun, per_case: Mapping[str, Mapping[str, float]], steps: int, skipped: Mapping[str, str]
) -> RunSummary:
    request = planned.request
    minutes = (time.monotonic() - request.started_s) / 60
    clean = {case_id: {k: v for k, v in dice.items() if v == v} for case_id, dice in per_case.items()}
    summary = RunSummary(request.run, _mean_by_output(clean), clean, steps, minutes, peak_rss_mb(), skipped)
    estimate = {f"estimated_{key}": value for key, value in planned.estimate.items()}
    _write_json(request.run / "validation.json", {**summary.to_json(), **estimate})
    _log.info(
        "%d steps in %.1f min, peak %.2f GB (estimated %.2f GB)",
        steps,
        minutes,
        summary.peak_rss_mb / 1024,
        planned.estimate.get("memory_gb", float("nan")),
    )
    return summary


def _mean_by_output(per_case: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean Dice per output over the cases where it is defined (present in prediction or reference)."""
    names = list(dict.fromkeys(name for dice in per_case.values() for name in dice))
    values = {name: [dice[name] for dice in per_case.values() if name in dice] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
