"""Training of segmentation networks on patches, validated by the predictor of inference."""

import itertools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Transform
from torch import Tensor, nn

from segkit.checkpoint.card import ModelCard, OutputCard, SchemeCard, SegmentationCard
from segkit.checkpoint.model import load_model, save_model
from segkit.checkpoint.run_folder import load_card
from segkit.errors import RequestError
from segkit.inference.backend_loading import inference_precision
from segkit.inference.backends import TorchBackend, windows_at_once
from segkit.inference.predictor import Predictor
from segkit.labels import LabelScheme, outputs_of
from segkit.losses.dice_cross_entropy import SegmentationLoss
from segkit.metrics.overlap import dice_by_region
from segkit.models.blocks import SegmentationNetwork
from segkit.models.sample_processes import SampleProcesses
from segkit.preparing.augmentation import training_transforms
from segkit.preparing.cache import StoredCases
from segkit.preparing.lesion_bank import LesionBank, prepare_copies
from segkit.preparing.patch_sampling import PatchDataset, RandBoxd
from segkit.preparing.preprocessing import PreparedCase, load_case
from segkit.preparing.user_transforms import build_transforms, keeping_background, parts_of, require_usable
from segkit.reading.case import Case
from segkit.report.figures import drawing, overlay_figure
from segkit.training.batches import ENDLESS, endless_batches
from segkit.training.choose_postprocessing import ScoredCases, settle_postprocessing
from segkit.training.config import TrainConfig, TrainingConfig
from segkit.training.distributed import Ranks
from segkit.training.optim import encoder_of
from segkit.training.segmentation_plan import FEW_WINDOWS, VALIDATION_SHARE, plan_segmentation
from segkit.training.task import Batch, Kind, RunPlan, Score, TrainingRequest, borrowed, build_card

_log = logging.getLogger(__name__)

_LONGEST_VALIDATION, _LONGEST_SCORING = 0.025, 0.06
"""Shares of a budget for one validation and for the scoring at the end, which have as many cases as fit, at least one.
"""
_WINDOWS_PER_PATCH = 3
"""Time of a training step divided by that of the inference of its patches."""
_BESIDE_WINDOWS = 1.3
"""Time of a case divided by that of its windows: reading, blending, decoding, Dice."""
_FIGURES = 3
"""Validation cases with a figure."""

CaseDice = Mapping[str, Mapping[str, float]]
"""Case id -> output -> Dice; NaN or missing if the output is neither in the prediction nor in the reference."""


@dataclass
class SegmentationTask:
    """A network with its training patches and the validation cases that choose its checkpoint."""

    model: nn.Module
    card: ModelCard
    loss_function: SegmentationLoss
    patches: PatchDataset
    validation: StoredCases
    batch_size: int
    scored: StoredCases
    """The validation cases that are scored after the last step."""
    workers: int | None = None
    budget_s: float | None = None
    """The first validation sets the number of cases by it."""
    final_s: float | None = None
    frozen: nn.Module | None = None
    """Part of the model without training: no gradients, and fixed running statistics of its norms."""
    ranks: Ranks = field(default_factory=Ranks)
    processes: SampleProcesses = field(default_factory=SampleProcesses)

    def __post_init__(self) -> None:
        if self.frozen is not None:
            self.frozen.requires_grad_(False)

    def batches(self, start: int) -> Iterator[Batch]:
        """Endless batches {"image": (B, C, *patch), "label": (B, *patch)} from number `start` on."""
        device = next(self.model.parameters()).device
        collate = list if self.patches.gives_boxes else None
        batches = endless_batches(self.patches, self.batch_size, start, self.workers, self.ranks, device, collate)
        return (self.patches.patches_of(boxes, device) for boxes in batches) if collate else batches

    def loss(self, batch: Batch) -> Tensor:
        """Loss of a batch on the model's device."""
        if self.frozen is not None:
            self.frozen.eval()  # the loop puts the whole model into training mode before each step
        self.loss_function.to(batch["image"].device)
        loss: Tensor = self.loss_function(self.processes(self.model, batch["image"]), batch["label"])
        return loss

    def validate(self, weights: Mapping[str, Tensor]) -> Score:
        """Mean Dice over outputs and validation cases, on the prepared grid, with these weights.

        Outputs that are absent from all references and predictions are ignored; if all are, the score is 1.
        """
        with borrowed(self.model, weights):
            predictor = self.predictor(overlap=0.0)
            if self.budget_s is not None and self.final_s is None:
                self._fit_budget(predictor, self.budget_s)
            per_case = self.ranks.map(
                lambda number: self._dice(predictor, self.validation[number]), range(len(self.validation))
            )
        found = {name: [d[name] for d in per_case if not math.isnan(d[name])] for name in _regions(self.card)}
        by_output = {name: sum(values) / len(values) for name, values in found.items() if values}
        mean = sum(by_output.values()) / len(by_output) if by_output else 1.0
        return Score(mean, {"dice": by_output}, self.final_s)

    def predictor(self, *, overlap: float) -> Predictor:
        """The predictor of the model's present weights."""
        card = self.card.model_copy(update={"overlap": overlap})
        return Predictor(TorchBackend(self.model, next(self.model.parameters()).device), card)

    def _fit_budget(self, predictor: Predictor, budget_s: float) -> None:
        """Leave out cases that would take too long, by the time of one window."""
        shape = (windows_at_once(predictor.backend), self.card.network.in_channels, *predictor.window)
        window = np.zeros(shape, np.float32)
        predictor.backend(window)  # the first one is slower
        began_s = time.monotonic()
        predictor.backend(window)
        seconds = _BESIDE_WINDOWS * (time.monotonic() - began_s) / len(window)
        window_s = self.ranks.from_first(lambda: seconds / self.ranks.size)

        def fitting(cases: StoredCases, predictor: Predictor, share: float) -> tuple[StoredCases, float]:
            plans = (predictor.plan(case.image.shape[1:]) for case in cases)
            ends = list(itertools.accumulate(window_s * plan.count for plan in plans))
            count = max(1, sum(end <= share * budget_s for end in ends))
            return cases[:count], ends[count - 1]

        self.validation, seconds = fitting(self.validation, predictor, _LONGEST_VALIDATION)
        whole = self.predictor(overlap=self.card.overlap)
        self.scored, self.final_s = fitting(self.scored, whole, _LONGEST_SCORING)
        sentence = "%d cases are validated, in about %.0f s; %d are scored at the end, in about %.0f s"
        _log.info(sentence, len(self.validation), seconds, len(self.scored), self.final_s)

    def paced(self, training: TrainingConfig) -> TrainingConfig:
        """The settings of the loop, with validations that take about a tenth of the time, each at most 2.5 % of it.

        Cases are left out, then epochs. A budget is divided by measured times. Without one, windows are counted, so
        that a resumed run validates the same cases at the same steps.
        """
        predictor = self.predictor(overlap=0.0)
        windows = [predictor.plan(case.image.shape[1:]).count for case in self.validation]
        if training.budget_minutes is not None or sum(windows) <= FEW_WINDOWS:
            return training
        of_step = _WINDOWS_PER_PATCH * training.accumulate * self.batch_size * self.ranks.size
        ends = list(itertools.accumulate(_BESIDE_WINDOWS * count for count in windows))
        most = sum(end <= _LONGEST_VALIDATION * training.steps * of_step for end in ends) or 1
        self.validation = self.validation[:most]
        every = ceil(ends[most - 1] / (VALIDATION_SHARE * training.steps_per_epoch * of_step))
        every = max(every, training.validate_every)
        if most < len(windows) or every > training.validate_every:
            sentence = "%d of %d cases are validated, after each %d epochs, in about a tenth of the time"
            _log.info(sentence, most, len(windows), every)
        return training.model_copy(update={"validate_every": every})

    def save(self, run: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write model.safetensors and model.json."""
        training = self.card.training_data.model_copy(update=dict(facts))
        save_model(run, weights, self.card.model_copy(update={"training_data": training}))

    def _dice(self, predictor: Predictor, case: PreparedCase) -> dict[str, float]:
        if case.labels is None:
            raise ValueError(f"validation case {case.id} has no reference")
        labels, ignore = predictor.label_prepared(case), self.card.scheme().ignore
        return dice_by_region(labels, np.asarray(case.labels), _regions(self.card), ignore)


def _regions(card: ModelCard) -> dict[str, tuple[int, ...]]:
    return {output.name: output.members for output in card.outputs if output.label != 0}


class SegmentationKind(Kind[TrainConfig, SegmentationTask]):
    """Segmentation from label maps; the scores are Dice of the validation cases."""

    config_type = TrainConfig
    is_supervised = True

    def plan(self, request: TrainingRequest[TrainConfig]) -> RunPlan[TrainConfig]:
        """See `plan_segmentation`."""
        return plan_segmentation(request)

    def card(self, plan: RunPlan[TrainConfig]) -> ModelCard:
        """The card with the outputs of the label scheme."""
        config, cohort, scheme = plan.config, plan.data[0].cohort, _scheme(plan)
        outputs, augmentation = outputs_of(scheme), config.augmentation
        return build_card(
            plan,
            task="segmentation",
            dims=cohort.dims,
            modalities=cohort.modalities,
            out_channels=len(outputs),
            identity=f"{cohort.layout}: {cohort.root.name}",
            overlap=config.overlap,
            segmentation=SegmentationCard(
                mirror_axes=augmentation.mirror_axes,
                activation="sigmoid" if scheme.has_regions else "softmax",
                outputs=tuple(OutputCard(name=o.name, label=o.label, members=o.members) for o in outputs),
                label_scheme=SchemeCard.model_validate(scheme.to_json()),
                modality_dropout=(augmentation.modality_dropout or 0.0) if augmentation.enabled else 0.0,
            ),
        )

    def build_task(self, plan: RunPlan[TrainConfig], card: ModelCard, network: SegmentationNetwork) -> SegmentationTask:
        """The task with patches of the training cases, and of a lesion bank if the settings name one."""
        config, (data,), ranks = plan.config, plan.data, plan.request.ranks
        budget, on_device = config.training.budget_minutes, config.augmentation.on_device
        cases = data.prepared(data.training_ids)
        transforms = training_transforms(
            config.augmentation,
            card.patch_size,
            foreground_fraction=config.training.foreground_fraction,
            bank=ranks.first_before_others(lambda: _lesion_bank(plan)),
            **_user_transforms(plan, cases[0], card.patch_size),
        )
        return SegmentationTask(
            model=network,
            card=card,
            loss_function=SegmentationLoss.of_scheme(_scheme(plan), config.loss),
            patches=PatchDataset(cases, transforms, seed=config.training.seed, length=ENDLESS, gives_boxes=on_device),
            validation=data.prepared(data.validation_ids[: config.training.validation_cases]),
            batch_size=config.planning.batch_size or 1,
            workers=config.training.workers,
            frozen=encoder_of(network) if config.optimiser.encoder_lr == 0 else None,
            scored=data.prepared(data.validation_ids),
            budget_s=None if budget is None else 60 * budget,
            ranks=ranks,
        )

    def pace(self, plan: RunPlan[TrainConfig], task: SegmentationTask) -> TrainingConfig:
        """See `SegmentationTask.paced`."""
        return task.paced(plan.config.training)

    def score(self, plan: RunPlan[TrainConfig], task: SegmentationTask, before: Mapping[str, float]) -> dict[str, Any]:
        """Dice of the best weights on the validation cases, on their own grids, with figures of three of them.

        The post-processing is chosen on the same cases and written into the card, so scores with it are slightly high.
        """
        request, (data,), scheme = plan.request, plan.data, _scheme(plan)
        run, ranks, ids = request.run, request.ranks, data.validation_ids
        if len(ids) > (most := len(task.scored)):
            _log.warning("the budget is spent: %d of %d validation cases are scored", most, len(ids))
            ids = ids[:most]
        card = load_card(run).with_postprocessing(None)  # a resumed run has chosen one already
        precision = inference_precision(card, request.device)
        network = load_model(run, request.device)
        predictor = Predictor(TorchBackend(network, request.device, precision=precision), card)

        def score_case(numbered: tuple[int, Case]) -> tuple[CaseDice, ScoredCases]:
            number, case = numbered
            loaded, kept = load_case(case, data.cohort.modalities, scheme), ScoredCases()
            if loaded.labels is None:
                return {}, kept
            labels = predictor.predict_loaded(loaded).labels
            kept.add(case.id, labels, loaded.labels, loaded.grid.spacing_mm)
            if number < _FIGURES:
                path, reference = run / "figures" / f"validation_{number}.png", loaded.labels
                image, grid = loaded.image[-1], loaded.grid
                with drawing(path):
                    overlay_figure(path, image, labels, grid, reference=reference, scheme=scheme, title=case.id)
            return {case.id: dice_by_region(labels, loaded.labels, _regions(card), scheme.ignore)}, kept

        per_case: dict[str, Mapping[str, float]] = {}
        scored = ScoredCases()
        ranks.mark("in validation")
        for dice, kept in ranks.map(score_case, enumerate(data.cases(ids))):
            per_case |= dice
            scored.take(kept)
        names = {value: tissue for tissue, value in scheme.values.items()}
        is_wanted = plan.config.postprocessing == "auto"
        postprocessed = ranks.from_first(lambda: settle_postprocessing(run, scored, names, is_wanted=is_wanted))
        return dice_scores(per_case, postprocessed)


def dice_scores(cases: CaseDice, postprocessed: CaseDice | None) -> dict[str, Any]:
    """Scores of a summary: "dice", the mean by output, and "cases"; "postprocessed" has both or is None."""

    def means(dice: CaseDice) -> dict[str, Any]:
        defined = {
            case_id: {name: value for name, value in found.items() if not math.isnan(value)}
            for case_id, found in dice.items()
        }
        names = list(dict.fromkeys(name for found in defined.values() for name in found))
        values = {name: [found[name] for found in defined.values() if name in found] for name in names}
        return {"dice": {name: sum(found) / len(found) for name, found in values.items()}, "cases": defined}

    return {**means(cases), "postprocessed": None if postprocessed is None else means(postprocessed)}


def _scheme(plan: RunPlan[TrainConfig]) -> LabelScheme:
    scheme = plan.data[0].cohort.scheme
    if scheme is None:
        raise ValueError("a planned run has a label scheme")
    return scheme


def _user_transforms(
    plan: RunPlan[TrainConfig], case: PreparedCase, patch_size: Sequence[int]
) -> dict[str, list[Transform]]:
    """The user's transforms "before" and "after" ours, tried on a patch of a case.

    Raises:
        RequestError: one cannot be used.
    """
    settings, from_python = plan.config.training.transforms, plan.request.transforms
    placed = {place: build_transforms(settings, place) for place in ("before", "after")}
    try:
        placed["after"] += [keeping_background(part) for part in parts_of(from_python)] if from_python else []
    except ValueError as error:
        raise RequestError(str(error), where="transforms") from error
    patch = RandBoxd(patch_size, foreground_fraction=1).set_random_state(0)({"case": case})
    device = plan.request.device if plan.config.augmentation.on_device else torch.device("cpu")
    require_usable([*placed["before"], *placed["after"]], {key: part.to(device) for key, part in patch.items()})
    return placed


def _lesion_bank(plan: RunPlan[TrainConfig]) -> LesionBank | None:
    """The lesion bank of the settings, with its copies prepared as the cases are.

    Raises:
        DataError: none of its copies can be used.
    """
    if not plan.copies:
        return None
    config, cohort = plan.config, plan.data[0].cohort
    copies = prepare_copies(
        plan.copies,
        {case.id: case for case in cohort.cases},
        plan.store,
        cohort.modalities,
        config.preprocessing,
        memory_gb=plan.request.memory_gb,
    )
    _log.info("%d lesion-free copies are used in the training", len(copies))
    shares = config.augmentation
    return LesionBank(copies, lesion_share=shares.lesion_share, lesion_free_share=shares.lesion_free_share)
