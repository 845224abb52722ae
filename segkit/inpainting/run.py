"""From folders of scans to a run folder with a network that fills holes: find, split, prepare, fit, measure.

Functions appear in the order in which they run. The run folder is that of `segkit train`, with what was measured on
holes in scans of held-out patients in `validation.json`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from segkit.checkpoint.card import InpaintingCard, ModelCard
from segkit.errors import RequestError
from segkit.inpainting.config import InpaintingConfig
from segkit.inpainting.dataset import HoleDataset, HoleRules
from segkit.inpainting.task import InpaintingTask, Restoration
from segkit.models.generator import build_discriminator
from segkit.preparing.cache import PreparedStore
from segkit.preparing.holes import HoleMaker, tumour_components
from segkit.preparing.preprocessing import PreparedCase
from segkit.reading.case import Cohort
from segkit.reading.layouts.synthesis import SYNTHESIS_LAYOUT, find_known
from segkit.reading.layouts.table import PLAIN_CLASSES, find_cases
from segkit.training.batches import ENDLESS
from segkit.training.config import DataConfig
from segkit.training.folder import settings_return_if_refused
from segkit.training.request import UnlabelledRequest
from segkit.training.unlabelled import (
    UnlabelledSummary,
    axes_for,
    first_card,
    learn,
    open_run,
    require_usable_run,
    with_patch,
)
from segkit.training.unlabelled_data import SplitCohort, find_split, prepare_cohort
from segkit.training.weights import first_weights

_log = logging.getLogger(__name__)

_PATCH = {2: 256, 3: 64}
"""Voxels of a patch along each axis, where nobody says."""
_HELD_OUT_SEED = 2**31
"""Held-out holes are drawn by another seed than any of the training."""
_MOST_SHAPES = 200
"""Shapes of lesions that are kept to be drawn from."""


InpaintingRequest = UnlabelledRequest[InpaintingConfig]
"""What a user asks for."""


@settings_return_if_refused
def inpainting_run(request: InpaintingRequest) -> UnlabelledSummary:
    """Train a network that fills holes and write its run folder.

    Raises:
        RequestError: the folder is in use, the settings do not fit each other or the data; nothing was changed.
        DataError: no case can be prepared.
        TrainingError: the training diverged.
    """
    require_usable_run(request)
    cohorts = [_find(folder, request.config) for folder in request.data]
    request = replace(request, config=_settled(request.config, cohorts))
    card = _card(request.config, cohorts)
    begun = first_weights(card, request.config, request.run, resume=request.resume)
    card = with_patch(begun.completed(card), request.config.patches.size or 0, "patches.size")
    open_run(request, cohorts, "inpainting of scans in")
    request.ranks.from_first(lambda: begun.keep(request.run))
    task, cases, skipped = _build_task(request, cohorts, card, begun.network)
    return learn(request, task, cases, skipped)


def _find(folder: Path, config: InpaintingConfig) -> SplitCohort:
    """The cases of a folder; what any reference marks, of whatever value, is not healthy."""

    def find(root: Path, data: DataConfig) -> Cohort:
        scheme = data.label_scheme or PLAIN_CLASSES
        cohort = find_cases(root, layout=data.layout, modalities=data.modalities, label_scheme=scheme)
        if cohort.layout == SYNTHESIS_LAYOUT:
            cohort = find_known(root)
        return cohort if config.modalities is None else _only(cohort, config.modalities)

    return find_split(folder, config.data, config.preprocessing, find=find, keeps_references=config.spares_marked)


def _only(cohort: Cohort, modalities: tuple[str, ...]) -> Cohort:
    """The cohort with these modalities only.

    Raises:
        RequestError: it does not have them.
    """
    lacking = [name for name in modalities if name not in cohort.modalities]
    if lacking:
        raise RequestError(
            f"has no modality {', '.join(lacking)}",
            where=cohort.root,
            expected=f"modalities among {', '.join(cohort.modalities)}",
        )
    cases = tuple(
        replace(case, images={name: case.images[name] for name in modalities if name in case.images})
        for case in cohort.cases
    )
    return replace(cohort, modalities=modalities, cases=cases)


def _settled(config: InpaintingConfig, cohorts: Sequence[SplitCohort]) -> InpaintingConfig:
    """The settings with axes, patch and what the network sees decided.

    Raises:
        RequestError: the folders do not go together, or the network cannot be told what it is to see.
    """
    names = {found.cohort.modalities for found in cohorts}
    if len(names) > 1:
        shown = " and ".join(", ".join(modalities) for modalities in sorted(names))
        raise RequestError(f"the folders have different modalities: {shown}", remedy="Choose with modalities=[...]")
    if config.preprocessing.normalisation != "scale-nonzero":
        raise RequestError(
            f"preprocessing.normalisation {config.preprocessing.normalisation} puts background amid tissue",
            expected="scale-nonzero: what is filled in is one or the other by its intensity alone",
        )
    are_volumes = all(found.cohort.dims == 3 for found in cohorts)
    network = config.network
    dims = axes_for(network, config.dims, cohorts, "patches")
    if network.arguments.get("learning") == "supervised" and network.arguments.get("context", "none") == "none":
        raise RequestError(
            "network.arguments.learning=supervised tells RN-L a hole that the network is not shown",
            remedy="Set network.arguments.context to hole or mirror",
        )
    if not are_volumes and network.arguments.get("context") == "mirror":
        # Only heads are known to have two like halves.
        network = network.model_copy(update={"arguments": {**network.arguments, "context": "hole"}})
    patches = config.patches
    updates: dict[str, Any] = {}
    if patches.size is None:
        updates["size"] = _PATCH[dims]
    if patches.mirror_axes is None:
        updates["mirror_axes"] = (0,) if are_volumes else (1,)
    return config.model_copy(update={"dims": dims, "network": network, "patches": patches.model_copy(update=updates)})


def _card(config: InpaintingConfig, cohorts: Sequence[SplitCohort]) -> ModelCard:
    network, names = config.network, cohorts[0].cohort.modalities
    card = first_card("inpainting", network, cohorts, names, config.dims or 3, config.method)
    usual = "hole" if network.family == "generator" else "none"
    part = InpaintingCard().model_copy(update={"context": network.arguments.get("context", usual)})
    return card.model_copy(update={"inpainting": part})


def _build_task(
    request: InpaintingRequest, cohorts: Sequence[SplitCohort], card: ModelCard, network: nn.Module
) -> tuple[InpaintingTask, dict[str, int], dict[str, str]]:
    config = request.config
    store = PreparedStore(config.data.cache or request.run / "cache")
    training: list[PreparedCase] = []
    held_out: list[PreparedCase] = []
    cases: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for found in cohorts:
        folders, reasons = prepare_cohort(found, store, request.memory_gb, request.ranks)
        skipped |= reasons
        learnt, _ = found.usable(found.training_ids, folders)
        training += learnt
        held_out += found.usable(found.held_out_ids, folders)[0]
        cases[found.name] = len(learnt)
    if not held_out:
        _log.warning("no patient can be held out: what is measured says nothing about other patients")
    shapes = lesion_shapes(training) if card.dims == 3 else ()
    _log.info("holes: %d shapes of lesions", len(shapes))
    rules = HoleRules(HoleMaker(config.holes, shapes), config.holes.margin_voxels, config.hidden_lesions)
    changing = replace(
        rules,
        mirror_axes=config.patches.mirror_axes or (),
        gain=config.patches.gain,
        shift=config.patches.shift,
    )
    discriminator = None
    if config.adversarial.weight > 0:
        discriminator = build_discriminator(len(card.modalities), card.dims, config.adversarial.width)
    task = InpaintingTask(
        model=Restoration(network, discriminator),
        card=card,
        patches=HoleDataset(
            training, card.patch_size, card.context, changing, seed=config.training.seed, length=ENDLESS
        ),
        held_out=HoleDataset(
            held_out or training,
            card.patch_size,
            card.context,
            rules,
            seed=_HELD_OUT_SEED,
            length=config.validation_holes,
        ),
        restoration=config.loss,
        batch_size=config.batch_size,
        supervision=config.supervision,
        adversarial_weight=config.adversarial.weight,
        workers=config.training.workers,
        ranks=request.ranks,
    )
    return task, cases, skipped


def lesion_shapes(cases: Sequence[PreparedCase]) -> list[NDArray[np.bool_]]:
    """Shapes of the lesions of the cases, cropped, as holes may take them; the first ones, where there are many."""
    shapes: list[NDArray[np.bool_]] = []
    for case in cases:
        if case.labels is None or len(shapes) >= _MOST_SHAPES:
            continue
        lesion = np.asarray(case.labels) > 0
        brain = np.asarray(case.image != 0).any(0) | lesion
        shapes += [component.mask for component in tumour_components(lesion, brain)]
    return shapes[:_MOST_SHAPES]
