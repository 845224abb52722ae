"""From folders of unlabelled images to a run folder with an encoder: find, split, prepare, fit, measure, draw.

Functions appear in the order in which they run. The run folder is that of `segkit train`, with what the method
measured before and after on held-out patients in `validation.json`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from segkit.checkpoint.card import ModelCard
from segkit.errors import DataError, RequestError
from segkit.preparing.cache import PreparedStore
from segkit.pretraining.matching_figures import draw_matching
from segkit.pretraining.methods import METHODS, PretrainConfig
from segkit.pretraining.sources import GroupDataset, Source
from segkit.pretraining.task import PretrainingTask
from segkit.training.batches import ENDLESS
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

_VIEW_SIZE = {2: 224, 3: 64}
"""Voxels of a view along each axis, where nobody says."""
_HELD_OUT_SEED = 2**31
"""Groups of held-out images are drawn by another seed than any training group."""


PretrainRequest = UnlabelledRequest[PretrainConfig]
"""What a user asks for."""


@settings_return_if_refused
def pretrain_run(request: PretrainRequest) -> UnlabelledSummary:
    """Train an encoder without labels and write its run folder.

    Raises:
        RequestError: the folder is in use, the settings do not fit each other or the data; nothing was changed.
        DataError: no case can be prepared, or a source has too few images.
        TrainingError: the training diverged.
    """
    require_usable_run(request)
    cohorts = [find_split(folder, request.config.data, request.config.preprocessing) for folder in request.data]
    request = replace(request, config=_settled(request.config, cohorts))
    config = request.config
    names = _modalities(config, cohorts)
    card = first_card("pretraining", config.network, cohorts, names, config.dims or 3, config.method)
    begun = first_weights(card, request.config, request.run, resume=request.resume)
    card = with_patch(begun.completed(card), request.config.views.size or 0, "views.size")
    open_run(request, cohorts, "unlabelled images in")
    request.ranks.from_first(lambda: begun.keep(request.run))
    task, skipped = _build_task(request, cohorts, card, begun.network)

    def draw() -> None:
        if request.config.method == "graph-matching":
            draw_matching(request.run / "figures", task)

    return learn(request, task, task.groups.image_counts, skipped, draw)


def _settled(config: PretrainConfig, cohorts: Sequence[SplitCohort]) -> PretrainConfig:
    """The settings with axes and size of the views decided.

    Raises:
        RequestError: a batch is no whole number of groups, or sources do not go together.
    """
    nodes = config.graph_matching.nodes
    if config.batch_size % nodes:
        raise RequestError(
            f"batch_size {config.batch_size} is no multiple of the {nodes} images of a group",
            remedy="Change batch_size or graph_matching.nodes; training.accumulate makes larger batches of small ones",
        )
    config.images.require_room_in(nodes)
    dims = axes_for(config.network, config.dims, cohorts, "crops")
    views = config.views if config.views.size else config.views.model_copy(update={"size": _VIEW_SIZE[dims]})
    return config.model_copy(update={"dims": dims, "views": views})


def _modalities(config: PretrainConfig, cohorts: Sequence[SplitCohort]) -> tuple[str, ...]:
    """Names of the image channels: those of the data where they go together, else one name for whatever it is."""
    are_pictures = all(found.cohort.dims == 2 for found in cohorts)
    names = {found.cohort.modalities for found in cohorts}
    if config.images.channels == "all" or (config.images.channels == "auto" and are_pictures):
        if len(names) > 1:
            shown = " and ".join(", ".join(modalities) for modalities in sorted(names))
            raise RequestError(
                f"the folders have different modalities: {shown}",
                remedy="Set images.channels=each, which makes every modality an image of its own",
            )
        return cohorts[0].cohort.modalities
    return cohorts[0].cohort.modalities if names == {cohorts[0].cohort.modalities[:1]} else ("image",)


def _build_task(
    request: PretrainRequest, cohorts: Sequence[SplitCohort], card: ModelCard, network: nn.Module
) -> tuple[PretrainingTask, dict[str, str]]:
    config = request.config
    store = PreparedStore(config.data.cache or request.run / "cache")
    sources: list[Source] = []
    held_out: list[Source] = []
    skipped: dict[str, str] = {}
    for found in cohorts:
        folders, reasons = prepare_cohort(found, store, request.memory_gb, request.ranks)
        skipped |= reasons
        sources.append(Source(found.name, *found.usable(found.training_ids, folders)))
        if any(case_id in folders for case_id in found.held_out_ids):
            held_out.append(Source(found.name, *found.usable(found.held_out_ids, folders)))
    entry, nodes = METHODS[config.method], config.graph_matching.nodes
    groups = _groups(config, card, sources, entry.views, seed=config.training.seed, length=ENDLESS)
    _log.info("images: %s", ", ".join(f"{count} of {name}" for name, count in groups.image_counts.items()))
    return PretrainingTask(
        model=entry.build(config, network, card),
        card=card,
        groups=groups,
        held_out=_held_out_groups(config, card, held_out, sources),
        groups_per_batch=config.batch_size // nodes,
        keeps_decoder=entry.keeps_decoder,
        workers=config.training.workers,
        ranks=request.ranks,
    ), skipped


def _groups(
    config: PretrainConfig, card: ModelCard, sources: Sequence[Source], views: int, *, seed: int, length: int
) -> GroupDataset:
    return GroupDataset(
        sources,
        card.patch_size,
        config.images,
        config.views,
        nodes=config.graph_matching.nodes,
        view_count=views,
        seed=seed,
        length=length,
    )


def _held_out_groups(
    config: PretrainConfig, card: ModelCard, held_out: Sequence[Source], training: Sequence[Source]
) -> GroupDataset:
    """Groups of held-out patients, of the sources that have enough of them; of the training images if none has."""
    views, usable = METHODS[config.method].views, []
    for source in held_out:
        try:
            _groups(config, card, [source], views, seed=0, length=1)
            usable.append(source)
        except DataError as error:
            _log.warning("not measured on held-out images of %s: %s", source.name, error)
    if not usable:
        _log.warning("no patient can be held out: what is measured says nothing about other patients")
        usable = list(training)
    return _groups(config, card, usable, views, seed=_HELD_OUT_SEED, length=config.validation_groups)
