"""From a data folder to a run folder: find, split, plan, prepare, fit, score.

Functions appear in the order in which they run. A run folder keeps everything: `config.yaml` (every setting, with what
planning chose and why), `split.json`, `metrics.jsonl`, `model.safetensors` with `model.json`, `validation.json`,
`figures/`, and the resume state.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from torch import nn

from segkit.checkpoint.card import (
    ModelCard,
    NetworkCard,
    OutputCard,
    PreprocessingCard,
    SchemeCard,
    SegmentationCard,
    TrainingData,
)
from segkit.checkpoint.model import load_model
from segkit.checkpoint.run_folder import load_card, require_segmentation
from segkit.errors import DataError
from segkit.inference.backends import TorchBackend
from segkit.inference.predictor import Predictor
from segkit.labels import outputs_of
from segkit.losses.compound import SegmentationLoss
from segkit.metrics.overlap import dice_by_region
from segkit.preparing.cache import PreparedStore, StoredCases
from segkit.preparing.lesion_bank import LesionBank, prepare_copies
from segkit.preparing.memory import has_room_to_keep
from segkit.preparing.patch_sampling import PatchDataset
from segkit.preparing.preprocessing import PreprocessingConfig, load_case
from segkit.reading.case import Case, Cohort
from segkit.report.figures import overlay_figure
from segkit.runtime import (
    available_memory_gb,
    environment,
    keep_freed_memory,
    peak_rss_mb,
    return_freed_memory,
)
from segkit.training.batches import ENDLESS
from segkit.training.choose_postprocessing import ScoredCases, settle_postprocessing
from segkit.training.distributed import Ranks
from segkit.training.folder import (
    SCORES_NAME,
    open_folder,
    require_usable,
    settings_return_if_refused,
    write_config,
    write_json,
    write_plan,
    write_split,
)
from segkit.training.live_report import LiveView
from segkit.training.loop import fit
from segkit.training.optim import encoder_of
from segkit.training.planned import PlannedRun, plan_run
from segkit.training.request import RunRequest
from segkit.training.segmentation import SegmentationTask
from segkit.training.summary import CaseDice, RunSummary, without_undefined
from segkit.training.weights import FirstWeights, first_weights

_log = logging.getLogger(__name__)

_LONGEST_VALIDATION = 0.05
"""Part of a budget that one validation may take."""
_FINAL_VALIDATIONS = 2.0
"""Cases scored at the end of a budget, as a multiple of those validated on the way."""
_PICTURES = 3
"""Validation cases drawn at the end of a run."""


@settings_return_if_refused
def train_run(request: RunRequest) -> RunSummary:
    """Train one fold and write its run folder.

    Raises:
        RequestError: the folder is in use, the weights to begin with do not fit, or nothing can be trained on as
            asked; nothing was changed.
        DataError: no case can be prepared.
        TrainingError: the training diverged.
    """
    asked = {"resume": request.resume, "overwrite": request.overwrite}
    ranks = request.ranks
    ranks.from_first(lambda: require_usable(request.run, request.config.training.trackers, **asked))
    planned = plan_run(request)
    card, begun = begin(planned)
    _settle_freed_memory(planned)
    ranks.from_first(lambda: _open(planned, begun))
    store = PreparedStore(planned.config.data.cache or request.run / "cache")
    ids = (*planned.training_ids, *planned.validation_ids)
    folders, skipped = _prepare(planned, store, planned.cases(ids))
    validation_ids = [case_id for case_id in planned.validation_ids if case_id in folders]
    bank = ranks.first_before_others(lambda: _lesion_bank(planned, store))
    task = _build_task(planned, card, begun.network, folders, bank)
    view = LiveView(request.run, with_page=planned.config.training.live_page)
    with view.until_finished() if ranks.is_first else nullcontext():
        state = fit(
            task,
            request.run,
            planned.config.training,
            planned.config.optimiser,
            device=request.device,
            ranks=ranks,
            deadline_s=request.deadline_s,
            final_validations=_FINAL_VALIDATIONS,
            resume=request.resume,
            allow_changes=request.allow_changes,
            on_progress=request.on_progress,
        )
        most = len(validation_ids) if request.deadline_s is None else int(_FINAL_VALIDATIONS * len(task.validation))
        scored = validation_ids[:most]
        if len(scored) < len(validation_ids):
            _log.warning("the budget is spent: %d of %d validation cases are scored", len(scored), len(validation_ids))
        return _finish(planned, *_score(planned, scored), state.step, skipped)


def begin(planned: PlannedRun) -> tuple[ModelCard, FirstWeights]:
    """The card of a run and its network before the first step; nothing is written.

    Raises:
        RequestError: the weights to begin with cannot be read or do not fit.
    """
    card, request = _card(planned), planned.request
    gets_parts = planned.config.training.sharding == "full" and not request.ranks.is_first
    begun = first_weights(card, planned.config, request.run, resume=request.resume, is_shape_only=gets_parts)
    return begun.completed(card), begun


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
        preprocessing=PreprocessingCard(**config.preprocessing.model_dump()),
        segmentation=SegmentationCard(
            mirror_axes=config.augmentation.mirror_axes,
            activation="sigmoid" if scheme.has_regions else "softmax",
            outputs=tuple(OutputCard(name=o.name, label=o.label, members=o.members) for o in outputs),
            label_scheme=SchemeCard(name=scheme.name, labels=dict(scheme.values)),
            modality_dropout=(config.augmentation.modality_dropout or 0.0) if config.augmentation.enabled else 0.0,
        ),
        versions=environment(),
        training_data=TrainingData(
            identity=f"{cohort.layout}: {cohort.root.name}", licence=cohort.licence, cases=len(planned.training_ids)
        ),
    )


def _open(planned: PlannedRun, begun: FirstWeights) -> None:
    """Make the run folder, with the plan in it."""
    run = planned.request.run
    request = planned.request
    open_folder(run, planned.config, resume=request.resume, allow_changes=request.allow_changes)
    begun.keep(run)
    heading = f"{planned.cohort.layout} data in {planned.cohort.root}"
    write_config(run, planned.config, planned.reasons, heading)
    if not planned.request.resume:
        write_plan(run, planned.reasons, planned.estimate)
        excluded = planned.config.data.exclude
        write_split(run, [planned.request.data], planned.training_ids, planned.validation_ids, excluded)


def _prepare(
    planned: PlannedRun, store: PreparedStore, cases: Sequence[Case]
) -> tuple[dict[str, Path], dict[str, str]]:
    """Prepare every case, several at a time; those that cannot be used are named and left out.

    Raises:
        DataError: no training case, or no validation case, can be used.
    """
    folders, skipped = prepare_cases(
        cases, planned.cohort, store, planned.config.preprocessing, planned.request.memory_gb, planned.request.ranks
    )
    for what, ids in (("training", planned.training_ids), ("validation", planned.validation_ids)):
        if not any(case_id in folders for case_id in ids):
            first = next(iter(skipped.values()), "there is none")
            raise DataError(f"no {what} case can be used", where=planned.request.data, remedy=f"The first: {first}")
    _log.info("%d cases prepared in %s", len(folders), store.folder)
    return folders, skipped


def _lesion_bank(planned: PlannedRun, store: PreparedStore) -> LesionBank | None:
    """The bank that the settings name, its copies prepared as the cases are.

    Raises:
        DataError: none of its copies can be used.
    """
    if not planned.copies:
        return None
    config, cohort = planned.config, planned.cohort
    copies = prepare_copies(
        planned.copies,
        {case.id: case for case in cohort.cases},
        store,
        cohort.modalities,
        config.preprocessing,
        memory_gb=planned.request.memory_gb,
    )
    _log.info("%d lesion-free copies take part in the training", len(copies))
    shares = config.augmentation
    return LesionBank(copies, lesion_share=shares.lesion_share, lesion_free_share=shares.lesion_free_share)


def prepare_cases(
    cases: Sequence[Case],
    cohort: Cohort,
    store: PreparedStore,
    config: PreprocessingConfig,
    memory_gb: float | None,
    ranks: Ranks,
) -> tuple[dict[str, Path], dict[str, str]]:
    """Prepare cases of a cohort: their folders by id, and why others are left out; each process takes its part."""
    mine = cases[ranks.rank :: ranks.size]
    parts = ranks.exchange(store.entries(mine, cohort.modalities, cohort.scheme, config, memory_gb=memory_gb))
    folders = {case_id: folder for found, _ in parts for case_id, folder in found.items()}
    skipped = {case_id: reason for _, reasons in parts for case_id, reason in reasons.items()}
    for reason in skipped.values():
        _log.warning("left out: %s", reason)
    return folders, skipped


def _settle_freed_memory(planned: PlannedRun) -> None:
    device, needed_gb = planned.request.device, planned.estimate.get("memory_gb", 0.0)
    memory_gb = planned.request.memory_gb or available_memory_gb()
    if has_room_to_keep(planned.config.network.arguments, needed_gb, memory_gb):
        keep_freed_memory(device)
    else:
        return_freed_memory(device)


def _build_task(
    planned: PlannedRun, card: ModelCard, network: nn.Module, folders: Mapping[str, Path], bank: LesionBank | None
) -> SegmentationTask:
    config = planned.config
    validation = [folders[case_id] for case_id in planned.validation_ids if case_id in folders]
    return SegmentationTask(
        model=network,
        card=card,
        loss_function=SegmentationLoss(require_segmentation(card).activation, outputs_of(planned.scheme), config.loss),
        patches=PatchDataset(
            StoredCases([folders[case_id] for case_id in planned.training_ids if case_id in folders]),
            card.patch_size,
            config.augmentation,
            foreground_fraction=config.training.foreground_fraction,
            seed=config.training.seed,
            length=ENDLESS,
            bank=bank,
        ),
        validation=StoredCases(validation[: config.training.validation_cases]),
        batch_size=config.planning.batch_size or 1,
        workers=config.training.workers,
        ranks=planned.request.ranks,
        frozen=encoder_of(network) if config.optimiser.encoder_lr == 0 else None,
        validation_limit_s=None
        if config.training.budget_minutes is None
        else 60 * config.training.budget_minutes * _LONGEST_VALIDATION,
    )


def _score(planned: PlannedRun, case_ids: Sequence[str]) -> tuple[CaseDice, CaseDice | None]:
    """Dice of the best weights on the validation cases, each on its own grid, with pictures of three of them.

    The second is that with the post-processing which is then chosen on them and written in the card, None without any.
    """
    run = planned.request.run
    card = load_card(run).with_postprocessing(None)  # a resumed run has chosen one already
    predictor = Predictor(TorchBackend(load_model(run, planned.request.device), planned.request.device), card)
    regions = {output.name: output.members for output in card.outputs if output.label != 0}
    names = {value: tissue for tissue, value in planned.scheme.values.items()}

    def score(numbered: tuple[int, Case]) -> tuple[CaseDice, ScoredCases]:
        number, case = numbered
        loaded, kept = load_case(case, planned.cohort.modalities, planned.scheme), ScoredCases()
        if loaded.labels is None:
            return {}, kept
        labels = predictor.predict_loaded(loaded).labels
        kept.add(case.id, labels, loaded.labels, loaded.grid.spacing_mm)
        if number < _PICTURES:
            path = run / "figures" / f"validation_{number}.png"
            image, title = loaded.image[-1], case.id
            scheme = planned.scheme
            overlay_figure(path, image, labels, loaded.grid, reference=loaded.labels, scheme=scheme, title=title)
        return {case.id: dice_by_region(labels, loaded.labels, regions)}, kept

    per_case: dict[str, Mapping[str, float]] = {}
    scored = ScoredCases()
    ranks = planned.request.ranks
    ranks.mark("in validation")
    for dice, kept in ranks.map(score, enumerate(planned.cases(case_ids))):
        per_case |= dice
        scored.take(kept)
    is_wanted = planned.config.postprocessing == "auto"
    return per_case, ranks.from_first(lambda: settle_postprocessing(run, scored, names, is_wanted=is_wanted))


def _finish(
    planned: PlannedRun, dice: CaseDice, postprocessed: CaseDice | None, steps: int, skipped: Mapping[str, str]
) -> RunSummary:
    request = planned.request
    minutes = (time.monotonic() - request.started_s) / 60
    clean = without_undefined(dice)
    cleaned = None if postprocessed is None else without_undefined(postprocessed)
    summary = RunSummary(request.run, clean, steps, minutes, peak_rss_mb(), skipped, cleaned)
    estimate = {f"estimated_{key}": value for key, value in planned.estimate.items()}
    if request.ranks.is_first:
        write_json(request.run / SCORES_NAME, {**summary.to_json(), **estimate})
        LiveView(request.run, with_page=planned.config.training.live_page).finish()
    _log.info(
        "%d steps in %.1f min, peak %.2f GB (estimated %.2f GB)",
        steps,
        minutes,
        summary.peak_rss_mb / 1024,
        planned.estimate.get("memory_gb", float("nan")),
    )
    return summary
