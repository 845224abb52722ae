"""From data folders to a run folder, for every kind of training.

Functions are in the order in which they run: find and split the cases, plan, card, first weights, prepare, fit, score.
Cross-validation, which runs this for each fold, comes last.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.model import build_network, read_source
from segkit.checkpoint.transfer import TransferOptions, transfer
from segkit.errors import (
    CheckpointError,
    DataError,
    RequestError,
    TrainingError,
    as_request,
    free_memory_of,
    is_memory_error,
    some,
)
from segkit.inference.backend_loading import smaller_window
from segkit.models.blocks import SegmentationNetwork
from segkit.preparing.memory import has_room_to_keep
from segkit.preparing.splits import read_split
from segkit.process_memory import available_memory_gb, children_mb, keep_freed_memory, peak_rss_mb, return_freed_memory
from segkit.runtime import seed_everything
from segkit.training import folder
from segkit.training.config import RunConfig, TrainConfig, with_values
from segkit.training.journal import LiveView
from segkit.training.loop import fit
from segkit.training.segmentation import SegmentationKind, dice_scores
from segkit.training.segmentation_plan import find_cohort, patients_of
from segkit.training.task import ConfigT, Kind, RunPlan, SplitData, Summary, TaskT, TrainingRequest

_log = logging.getLogger(__name__)

_OF_A_FOLD = ("data.fold", "training.budget_minutes")
"""Settings that differ between the folds of a cross-validation."""


def train(request: TrainingRequest[ConfigT], kind: Kind[ConfigT, TaskT]) -> Summary:
    """Train a network and write its run folder.

    Raises:
        RequestError: the folder is in use, or settings, data and first weights do not fit; nothing was changed.
        DataError: no case can be prepared.
        TrainingError: the training diverged, or memory ran out.
    """
    run, ranks = request.run, request.ranks
    with folder.restore_config_on_error(run, is_first=ranks.is_first):
        trackers = request.config.training.trackers
        ranks.from_first(
            lambda: folder.require_usable(run, trackers, resume=request.resume, overwrite=request.overwrite)
        )
        plan = plan_run(request, kind)
        card, weights = begin(plan, kind)
        if kind.is_supervised:  # the memory of the others is not planned
            memory_gb = request.memory_gb or available_memory_gb()
            arguments, estimated_gb = plan.config.network.arguments, plan.estimate.get("memory_gb", 0.0)
            keeps = has_room_to_keep(arguments, estimated_gb, memory_gb)
            (keep_freed_memory if keeps else return_freed_memory)(request.device)
        ranks.from_first(lambda: _open(plan, kind, weights))
        plan, skipped = _prepare(plan, kind)
        task = kind.build_task(plan, card, weights.network)
        view = LiveView(run, with_page=plan.config.training.live_page)
        with view.until_finished() if ranks.is_first else nullcontext():
            before = kind.measure_before(plan, task)
            with _explaining_memory_errors(plan, card):
                state = fit(
                    task,
                    run,
                    kind.pace(plan, task),
                    plan.config.optimiser,
                    device=request.device,
                    ranks=ranks,
                    deadline_s=plan.request.deadline_s,
                    resume=request.resume,
                    allow_changes=request.allow_changes,
                    on_progress=request.on_progress,
                )
            scores = kind.score(plan, task, before)
            minutes = (time.monotonic() - request.started_s) / 60
            left_out = tuple(name for split in plan.data for name in split.cohort.left_out)
            summary = Summary(run, scores, state.step, minutes, peak_rss_mb() + children_mb(), skipped, left_out)
            if ranks.is_first:
                estimate = {f"estimated_{key}": value for key, value in plan.estimate.items()}
                folder.write_json(run / folder.SCORES_NAME, {**summary.to_json(), **estimate})
                view.finish()
    expected = f" (estimated {plan.estimate['memory_gb']:.2f} GB)" if "memory_gb" in plan.estimate else ""
    peak_gb = summary.peak_rss_mb / 1024
    _log.info("%d steps in %.1f min, peak %.2f GB%s", state.step, minutes, peak_gb, expected)
    return summary


@contextmanager
def _explaining_memory_errors(plan: RunPlan[Any], card: ModelCard) -> Iterator[None]:
    """Name the next smaller batch or, at a batch of one, the next smaller patch, when memory runs out."""
    try:
        yield
    except Exception as error:
        if not is_memory_error(error):
            raise
        free_memory_of(error)
        section, batch_setting = plan.config, "batch_size"
        if plan.patch_setting.startswith("planning."):
            section, batch_setting = plan.config.planning, "planning.batch_size"
        batch, patch = section.batch_size, card.patch_size
        smaller = smaller_window(patch, card)
        if batch > 1:
            remedy = f"Start a new run with --set {batch_setting}={batch // 2}"
        elif smaller is not None:
            remedy = f"Start a new run with --set {plan.patch_setting}=[{','.join(map(str, smaller))}]"
        else:
            remedy = "Take a smaller network (network.size, --preset)"
        shown, planned = " x ".join(map(str, patch)), plan.estimate.get("memory_gb")
        found = f"{plan.request.device} ran out of memory with batches of {batch} and patches of {shown} voxels"
        found += "" if planned is None else f", for which {planned:.1f} GB were planned"
        raise TrainingError(found, where=plan.request.run, remedy=f"{remedy}, or free memory and --resume") from error


def plan_run(request: TrainingRequest[ConfigT], kind: Kind[ConfigT, TaskT]) -> RunPlan[ConfigT]:
    """Find and split the cases and complete the settings; nothing is written.

    Raises:
        RequestError: data and settings do not fit, or a resumed run would get other settings or cases.
    """
    plan = kind.plan(request)
    if request.resume:
        allow_changes = request.allow_changes
        request.ranks.from_first(lambda: folder.changes_of(request.run, plan.config, allow_changes=allow_changes))
        folder.require_same_split(request.run, *_split_ids(plan, kind))
    return plan


def _split_ids(plan: RunPlan[ConfigT], kind: Kind[ConfigT, TaskT]) -> tuple[list[str], list[str]]:
    named = [("" if kind.is_supervised else f"{split.name}/", split) for split in plan.data]
    training = [prefix + case_id for prefix, split in named for case_id in split.training_ids]
    return training, [prefix + case_id for prefix, split in named for case_id in split.validation_ids]


@dataclass(frozen=True)
class FirstWeights:
    """A network before its first step, with the origin of its weights (`facts`, empty for random weights).

    `report` has the names of all tensors by how they were loaded, and the share of the encoder that was found; it is
    empty for a resumed run, which loads its own weights later.
    """

    network: SegmentationNetwork = field(repr=False)
    facts: Mapping[str, str] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


def begin(plan: RunPlan[ConfigT], kind: Kind[ConfigT, TaskT]) -> tuple[ModelCard, FirstWeights]:
    """The card of a run and its network before the first step; nothing is written.

    Raises:
        RequestError: the first weights cannot be read or do not fit, or the patch does not fit the network.
    """
    request, card = plan.request, kind.card(plan)
    gets_parts = kind.is_supervised and plan.config.training.sharding == "full" and not request.ranks.is_first
    weights = first_weights(card, plan.config, request.run, resume=request.resume, is_shape_only=gets_parts)
    size, divisor = plan.patch_size, tuple(weights.network.divisor)
    patch = (size,) * card.dims if isinstance(size, int) else size
    if len(patch) != card.dims or any(length % step for length, step in zip(patch, divisor, strict=False)):
        shown, steps = (" x ".join(map(str, numbers)) for numbers in (patch, divisor))
        raise RequestError(f"{plan.patch_setting} {shown} does not suit the network", expected=f"multiples of {steps}")
    facts = {"initial_weights": dict(weights.facts)} if weights.facts else {}
    data = card.training_data.model_copy(update=facts)
    return card.model_copy(update={"patch_size": patch, "divisor": divisor, "training_data": data}), weights


def first_weights(
    card: ModelCard, config: RunConfig, run: Path, *, resume: bool, is_shape_only: bool = False
) -> FirstWeights:
    """Build the network of a card and, unless the run is resumed, load the weights of the settings.

    With `is_shape_only` the network is on the meta device, without memory; rank 0 has its weights.

    Raises:
        RequestError: the weights cannot be read or do not fit the network, or hold too little of the encoder.
    """
    seed_everything(config.training.seed)
    if is_shape_only:
        with torch.device("meta"):
            return FirstWeights(build_network(card))
    network = build_network(card)
    path = config.network.weights
    if resume:
        document = folder.read_object(run / folder.ORIGIN_NAME)
        return FirstWeights(network, {name: fact for name, fact in document.items() if isinstance(fact, str)})
    if path is None:
        if config.optimiser.encoder_lr == 0 and not config.network.arguments.get("encoder_weights"):
            _log.warning("optimiser.encoder_lr=0 freezes an encoder of random weights: name others with --weights")
        return FirstWeights(network)
    options = TransferOptions(
        input_adapt=config.network.input_adapt,
        is_strict=config.network.weights_share == 1,
        modalities=card.modalities,
        outputs=[output.name for output in card.outputs],
    )
    try:
        source = read_source(path)
        report = transfer(network, source, options)
    except CheckpointError as error:
        raise as_request(error) from error
    share, least = encoder_share(network, {*report.loaded, *report.adapted}), config.network.weights_share
    if share < least:
        lacking = some(name for name in report.missing if name.startswith(network.encoder_prefix))
        raise RequestError(
            f"holds {percent(share)} of the encoder's parameters; {'; '.join((f'without {lacking}', *report.notes))}",
            where=source.file,
            expected=f"at least {percent(least)} (network.weights_share)",
            remedy="Choose the network.family and network.size that it was trained as, or lower network.weights_share",
        )
    _log.info("weights of %s: %s of the encoder; %s", path, percent(share), report)
    return FirstWeights(network, source.facts(), {**dataclasses.asdict(report), "encoder_share": share})


def encoder_share(network: SegmentationNetwork, names: Collection[str]) -> float:
    """Share of the encoder's parameters, 0 to 1 by number of elements, that are among `names` of the state dict."""
    sizes = {name: p.numel() for name, p in network.named_parameters() if name.startswith(network.encoder_prefix)}
    return sum(size for name, size in sizes.items() if name in names) / sum(sizes.values())


def percent(share: float) -> str:
    """`99.9 %`, rounded down: a share below a limit must not be shown as the limit."""
    return f"{math.floor(1000 * share + 1e-9) / 10:g} %"


def _open(plan: RunPlan[ConfigT], kind: Kind[ConfigT, TaskT], weights: FirstWeights) -> None:
    request, config = plan.request, plan.config
    folder.open_folder(request.run, config, resume=request.resume, allow_changes=request.allow_changes)
    if weights.report:  # not of random weights, or of a resumed run
        folder.write_json(request.run / folder.ORIGIN_NAME, {**weights.facts, "report": dict(weights.report)})
    folder.write_config(request.run, config, plan.reasons, plan.heading)
    if not request.resume:
        if plan.estimate:
            folder.write_plan(request.run, plan.reasons, plan.estimate)
        folder.write_split(request.run, request.data, *_split_ids(plan, kind), config.data.exclude)


def _prepare(plan: RunPlan[ConfigT], kind: Kind[ConfigT, TaskT]) -> tuple[RunPlan[ConfigT], dict[str, str]]:
    """Prepare every case: the plan with the usable ones, and the reasons of those that are left out.

    Raises:
        DataError: no training case is usable, or no validation case of a supervised training.
    """
    prepared: list[SplitData] = []
    skipped: dict[str, str] = {}
    ranks, memory_gb, store = plan.request.ranks, plan.request.memory_gb, plan.store
    for split in plan.data:
        cohort, config = split.cohort, split.preprocessing
        mine = cohort.cases[ranks.rank :: ranks.size]
        parts = ranks.exchange(store.entries(mine, cohort.modalities, cohort.scheme, config, memory_gb=memory_gb))
        folders = {case_id: path for found, _ in parts for case_id, path in found.items()}
        reasons = {case_id: reason for _, left_out in parts for case_id, reason in left_out.items()}
        for reason in reasons.values():
            _log.warning("left out: %s", reason)
        training, validation = (
            tuple(case_id for case_id in ids if case_id in folders)
            for ids in (split.training_ids, split.validation_ids)
        )
        for what, ids in (("training", training), ("validation", validation)):
            if not ids and (what == "training" or kind.is_supervised):
                first = next(iter(reasons.values()), "there is none")
                raise DataError(f"no {what} case can be used", where=cohort.root, remedy=f"The first: {first}")
        _log.info("%d cases prepared in %s", len(folders), store.folder)
        prepared.append(replace(split, training_ids=training, validation_ids=validation, folders=folders))
        skipped |= reasons
    return replace(plan, data=tuple(prepared)), skipped


def cross_validate(request: TrainingRequest[TrainConfig]) -> Summary:
    """Train every fold into `RUN/fold_K`; `RUN` is then an ensemble, and every case has an out-of-fold score.

    A budget is divided equally between the remaining folds. A resumed run does not train finished folds again.

    Raises:
        RequestError: there is one patient only, or as for `train`.
    """
    run, ranks = request.run, request.ranks
    with folder.restore_config_on_error(run, is_first=ranks.is_first):
        patients, split = patients_of(find_cohort(request)), request.config.data.split
        if patients == 1 and split is None:
            where = request.data[0]
            raise RequestError("one patient cannot be cross-validated", where=where, remedy="Train without -f all")
        folds = min(request.config.data.folds, patients) if split is None else len(read_split(split))
        cache = request.config.data.cache or run / "cache"
        request = replace(request, config=with_values(request.config, "data", folds=folds, cache=cache))
        changes = ranks.from_first(lambda: _open_folds(request))
        documents = []
        for fold in range(folds):
            _log.info("fold %d of %d", fold + 1, folds)
            document = ranks.from_first(partial(_finished_fold, request, fold))
            if document is None:
                document = train(_fold_request(request, fold, folds - fold, changes), SegmentationKind()).to_json()
            documents.append(document)
        summary = summarise_folds(run, documents, (time.monotonic() - request.started_s) / 60)
        if ranks.is_first:
            folder.write_json(run / folder.SCORES_NAME, summary.to_json())
        return summary


def _open_folds(request: TrainingRequest[TrainConfig]) -> folder.Changes:
    """Make the folder of a cross-validation; returns the settings that change when it is resumed."""
    run, config = request.run, request.config
    run.mkdir(parents=True, exist_ok=True)
    changes = folder.settle_settings(run, config, resume=request.resume, allow_changes=request.allow_changes)
    folder.write_config(run, config, {}, f"cross-validation of {request.data[0]}")
    return changes


def _finished_fold(request: TrainingRequest[TrainConfig], fold: int) -> dict[str, Any] | None:
    path = request.run / f"fold_{fold}" / folder.SCORES_NAME
    return folder.read_object(path) or None if request.resume else None


def _fold_request(
    request: TrainingRequest[TrainConfig], fold: int, folds_left: int, changes: folder.Changes
) -> TrainingRequest[TrainConfig]:
    """The request of a fold: a started one keeps its plan, with the changes; a new one gets its share of the time."""
    run = request.run / f"fold_{fold}"
    now_s = time.monotonic()
    if request.resume and folder.has_state(run):
        of_all = {name: new for name, (_, new) in changes.items() if name not in _OF_A_FOLD}
        return replace(request, run=run, config=folder.with_settings(folder.read_config(run), of_all), started_s=now_s)
    config = with_values(request.config, "data", fold=fold)
    if config.training.budget_minutes is not None:
        left = config.training.budget_minutes - (now_s - request.started_s) / 60
        config = with_values(config, "training", budget_minutes=max(left / folds_left, 0.1))
    return replace(request, run=run, config=config, started_s=now_s, resume=False)


def summarise_folds(run: Path, folds: Sequence[Mapping[str, Any]], minutes: float) -> Summary:
    """The summary of a cross-validation from the results of `Summary.to_json` of its folds.

    Folds without post-processing contribute the same scores to "postprocessed".
    """
    cases: dict[str, Any] = {}
    postprocessed: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    left_out: dict[str, None] = {}
    for fold in folds:
        cases |= fold["cases"]
        skipped |= fold["skipped"]
        left_out |= dict.fromkeys(fold.get("left_out", ()))
        postprocessed |= (fold.get("postprocessed") or fold)["cases"]
    is_any = any(fold.get("postprocessed") for fold in folds)
    scores = dice_scores(cases, postprocessed if is_any else None)
    return Summary(run, scores, sum(fold["steps"] for fold in folds), minutes, peak_rss_mb(), skipped, tuple(left_out))
