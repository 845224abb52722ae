"""The plan of a segmentation run: cases, split, and every setting with its reason; and an estimate of its duration."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from segkit.errors import DataError, RequestError, as_request, some
from segkit.inference.sliding_window import plan_windows
from segkit.labels import LabelScheme
from segkit.models.table import build_model, configure
from segkit.preparing.fingerprint import Fingerprint, take_fingerprint
from segkit.preparing.lesion_bank import find_copies
from segkit.preparing.plan import CandidateNetwork, Plan, PlanningRequest, plan_training, prepared_shapes
from segkit.preparing.splits import given_split, train_and_validation, with_patients
from segkit.process_memory import available_memory_gb
from segkit.reading.case import Case, Cohort, usable_only
from segkit.reading.layouts.patients import patients_note
from segkit.reading.layouts.table import find_cases
from segkit.runtime import autocast, pick_precision, process_place
from segkit.training.config import NetworkConfig, TrainConfig, with_values
from segkit.training.folder import read_plan, read_recorded_split, with_planned
from segkit.training.task import RunPlan, SplitData, TrainingRequest

_log = logging.getLogger(__name__)

VALIDATION_SHARE = 0.1
"""Part of the time of a run without a budget that validations may take."""
FEW_WINDOWS = 64
"""Validations of as many windows are never limited."""
_SHARE_OF_FREE_MEMORY = 0.9
"""Planning reserves the rest for other programs."""


def plan_segmentation(request: TrainingRequest[TrainConfig]) -> RunPlan[TrainConfig]:
    """Find the cases, split them by patient, and complete the settings by planning.

    A resumed run keeps its plan: patch, batch and mode must not depend on the memory that is free now.

    Raises:
        RequestError: layout or label scheme are not recognised, an id to exclude does not exist, a setting or the
            lesion bank does not fit, or transforms from Python are missing.
    """
    network, transforms = request.config.network, request.config.training.python_transforms
    if transforms and request.transforms is None:
        raise RequestError(
            f"the run uses transforms from Python: {', '.join(transforms)}",
            where=request.run,
            expected="the same transforms again",
            remedy="Resume it with segkit.train(..., transforms=Compose([...]), resume=True)",
        )
    configure(network.family, network.size, network.arguments)  # a mistyped argument is found before data are read
    cohort = find_cohort(request)
    request, training_ids, validation_ids = _split(request, cohort)
    augmentation = request.config.augmentation
    copies: tuple[Case, ...] = ()
    if augmentation.lesion_bank is not None and augmentation.enabled:
        training = [case for case in cohort.cases if case.id in set(training_ids)]
        copies = tuple(find_copies(augmentation.lesion_bank, training, cohort.modalities))
    if request.resume:
        config, (reasons, estimate) = with_planned(request.run, request.config), read_plan(request.run)
    else:
        # Every fold is planned from the whole cohort, so that the folds can be one ensemble.
        config, reasons, estimate = request.ranks.from_first(lambda: _decide(request, cohort))
    split = SplitData(cohort, config.preprocessing, tuple(training_ids), tuple(validation_ids))
    heading, patch = f"{cohort.layout} data in {cohort.root}", config.planning.patch_size or ()
    request = replace(request, config=config)
    return RunPlan(request, (split,), heading, "planning.patch_size", patch, reasons, estimate, copies)


def patients_of(cohort: Cohort) -> int:
    """Number of patients."""
    return len({case.patient for case in cohort.cases})


def _split(
    request: TrainingRequest[TrainConfig], cohort: Cohort
) -> tuple[TrainingRequest[TrainConfig], list[str], list[str]]:
    """Ids of training and validation cases; there are at most as many folds as patients, and one patient does both."""
    data = request.config.data
    if request.resume and (
        recorded := read_recorded_split(request.run, request.config, [case.id for case in cohort.cases])
    ):
        return request, *recorded
    if data.split is not None:
        return request, *given_split(data.split, data.fold, cohort.cases, data.exclude)
    patients = patients_of(cohort)
    _log.info("%s", patients_note(cohort.cases))
    if patients == 1:
        _log.warning("one patient only, used for training and validation: the scores do not generalise")
        ids = [case.id for case in cohort.cases]
        return request, ids, ids
    if patients < data.folds:
        _log.warning("%d patients make %d folds, not %d", patients, patients, data.folds)
        request = replace(request, config=with_values(request.config, "data", folds=patients))
        data = request.config.data
    training, validation = train_and_validation(cohort.cases, data.fold, data.folds, data.split_seed)
    return request, training, validation


def find_cohort(request: TrainingRequest[TrainConfig]) -> Cohort:
    """The usable cases with a reference that are not excluded.

    Raises:
        RequestError: layout or label scheme are not recognised, an excluded id does not exist, or no case is left.
    """
    data = request.config.data
    try:
        cohort = find_cases(
            request.data[0],
            layout=data.layout,
            modalities=data.modalities,
            label_scheme=data.label_scheme,
            require_labels=True,
        )
    except DataError as error:
        raise as_request(error) from error
    if cohort.scheme is None:
        problem = next((problem for problem in cohort.problems if problem.is_fatal), None)
        raise RequestError(
            problem.found if problem else "the label scheme is not recognised",
            where=request.data[0],
            remedy=problem.remedy if problem else "Name it with --label-scheme",
        )
    cohort = with_patients(cohort, data.patients)
    known, excluded = {case.id for case in cohort.cases}, set(data.exclude)
    if unknown := [case_id for case_id in data.exclude if case_id not in known]:
        raise RequestError(f"cases to exclude do not exist: {', '.join(unknown[:5])}", where=request.data[0])
    cases = tuple(case for case in cohort.cases if case.id not in excluded)
    patients = {case.patient for case in cohort.cases if case.id in excluded}
    if related := [case.id for case in cases if case.patient in patients]:
        _log.warning("excluded cases have others of the same patient in training; exclude these too: %s", some(related))
    usable = usable_only(cohort, excluded)
    if not usable.cases:
        raise RequestError("no case is left to train on", where=request.data[0], remedy="See `segkit check`")
    return usable


def planning_request(config: TrainConfig) -> PlanningRequest:
    """The settings that planning needs."""
    return PlanningRequest(
        family=config.network.family,
        size=config.network.size,
        arguments=config.network.arguments,
        patch_size=config.planning.patch_size,
        patch_limit=config.planning.patch_limit,
        batch_size=config.planning.batch_size,
        batch_limit=config.planning.batch_limit,
        preprocessing=config.preprocessing,
        mirror_axes=config.augmentation.mirror_axes,
        modality_dropout=config.augmentation.modality_dropout,
        has_average=config.training.ema_decay > 0,
        precision=config.training.precision,
    )


def memory_to_plan_for(asked_gb: float | None, device: torch.device) -> float:
    """GiB per process to plan for: the requested number, else most of the process's part of the free memory."""
    parts = 1 if device.type == "cuda" else process_place().local_size
    return asked_gb or _SHARE_OF_FREE_MEMORY * available_memory_gb(device) / parts


def _decide(
    request: TrainingRequest[TrainConfig], cohort: Cohort
) -> tuple[TrainConfig, Mapping[str, str], Mapping[str, float]]:
    """The complete settings, the reasons by dotted key, and the expected peak memory."""
    config = request.config
    if cohort.scheme is None:
        raise ValueError("planning needs a label scheme")
    memory_gb = memory_to_plan_for(request.memory_gb, request.device)
    try:
        fingerprint = take_fingerprint(cohort)
    except DataError as error:
        raise as_request(error) from error
    asked = planning_request(config)
    fit = partial(plan_training, fingerprint, cohort.scheme, memory_gb=memory_gb, device=request.device)
    is_shared = config.training.sharding == "full"
    try:
        plan = fit(replace(asked, shards=request.ranks.size if is_shared else 1))
    except RequestError:
        if config.training.sharding != "auto" or request.ranks.size == 1 or not _has_units(config.network, cohort.dims):
            raise
        plan, is_shared = fit(replace(asked, shards=request.ranks.size)), True
        why = f"in a single process the network does not fit into {memory_gb:.1f} GB"
        plan = plan.model_copy(update={"reasons": {**plan.reasons, "training.sharding": why}})
    config = with_values(config, "planning", patch_size=plan.patch_size, batch_size=plan.batch_size)
    config = with_values(config, "network", arguments=plan.arguments)
    config = with_values(config, "training", sharding="full" if is_shared else config.training.sharding)
    config = with_values(config, "augmentation", mirror_axes=plan.mirror_axes, modality_dropout=plan.modality_dropout)
    config = config.model_copy(update={"preprocessing": plan.preprocessing})
    return config, plan.reasons, {"memory_gb": plan.memory_gb}


def _has_units(network: NetworkConfig, dims: int) -> bool:
    """Whether the network can be trained in parts, see `segkit.training.sharding`."""
    with torch.device("meta"):
        built = build_model(
            network.family, in_channels=1, out_channels=1, dims=dims, size=network.size, **network.arguments
        )
    return hasattr(built, "units")


def estimate_training(
    cohort: Cohort, scheme: LabelScheme, config: TrainConfig, memory_gb: float, device: torch.device | None = None
) -> tuple[Plan, float]:
    """The plan of a run on a cohort, and its minutes, from the time of a training step and an inference window.

    Raises:
        DataError: no case can be read.
        RequestError: see `plan_training`.
    """
    fingerprint, request = take_fingerprint(cohort), planning_request(config)
    plan = plan_training(fingerprint, scheme, request, memory_gb, device)
    network = replace(request, arguments=plan.arguments).network(fingerprint, scheme)
    device = device or torch.device("cpu")
    precision = pick_precision(config.training.precision, device) if device.type == "cuda" else None
    with autocast(device, precision):
        step_s, window_s = _measured(network, plan, device)
    return plan, estimate_minutes(fingerprint, plan, config, step_s, window_s)


def estimate_minutes(
    fingerprint: Fingerprint, plan: Plan, config: TrainConfig, seconds_per_step: float, seconds_per_window: float
) -> float:
    """Minutes of a run: preparing all cases, the steps and the validations; with a budget, the budget."""
    training = config.training
    if training.budget_minutes is not None:
        return training.budget_minutes
    sizes = prepared_shapes(fingerprint, plan.preprocessing)
    windows = float(np.mean([plan_windows(size, plan.patch_size, config.overlap).count for size in sizes]))
    epochs = -(-training.steps // training.steps_per_epoch)
    validations = -(-epochs // training.validate_every)
    fold = -(-fingerprint.cases // config.data.folds)
    windows *= min(fold, training.validation_cases or fold)
    steps_s = training.steps * training.accumulate * seconds_per_step
    validations_s = validations * windows * seconds_per_window
    if windows > FEW_WINDOWS:
        validations_s = min(validations_s, VALIDATION_SHARE * steps_s)
    return (fingerprint.cases * fingerprint.seconds_per_case + steps_s + validations_s) / 60


def _measured(network: CandidateNetwork, plan: Plan, device: torch.device) -> tuple[float, float]:
    """Seconds of a training step and of an inference window, both on noise."""
    model, loss = network.build().to(device), network.loss_function().to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)
    image = torch.randn(plan.batch_size, network.channels, *plan.patch_size, device=device)
    labels = torch.zeros(plan.batch_size, *plan.patch_size, dtype=torch.uint8, device=device)

    def step() -> None:
        torch.autograd.backward(loss(model(image), labels))
        optimiser.step()
        optimiser.zero_grad()

    @torch.inference_mode()
    def window() -> None:
        model(image[:1])

    def synchronised(work: Callable[[], None]) -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    model.train()
    step_s = seconds_of(partial(synchronised, step))
    model.eval()
    return step_s, seconds_of(partial(synchronised, window))


def seconds_of(work: Callable[[], object], repeats: int = 2) -> float:
    """Seconds that `work` takes: the smallest of `repeats` after one call to warm up."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
