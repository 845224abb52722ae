"""Pre-training: an encoder from images without label maps, measured on held-out patients before and after."""

import logging
from collections.abc import Sequence
from pathlib import Path

from segkit.checkpoint.card import ModelCard
from segkit.errors import DataError, RequestError
from segkit.models.blocks import SegmentationNetwork
from segkit.pretraining.matching_figures import draw_matching
from segkit.pretraining.methods import METHODS, PretrainConfig
from segkit.pretraining.sources import GroupDataset, Source
from segkit.pretraining.task import PretrainingTask
from segkit.reading.layouts.table import find_cases
from segkit.training.batches import ENDLESS
from segkit.training.task import RunPlan, SplitData, build_card
from segkit.training.unlabelled import UnlabelledKind, choose_dims, find_split, require_same_modalities

_log = logging.getLogger(__name__)

_VIEW_SIZE = {2: 224, 3: 64}
"""Default voxels of a view along each axis."""
_HELD_OUT_SEED = 2**31
"""Seed of the groups of held-out images, different from that of any training group."""


class PretrainingKind(UnlabelledKind[PretrainConfig, PretrainingTask]):
    """Pre-training by one of `segkit.pretraining.methods`."""

    config_type = PretrainConfig
    what = "unlabelled images"

    def find(self, folder: Path, config: PretrainConfig) -> SplitData:
        """The cases of a folder in any layout, without their references."""
        data = config.data
        cohort = find_cases(folder, layout=data.layout, modalities=data.modalities, label_scheme=data.label_scheme)
        return find_split(folder, cohort, data, config.preprocessing)

    def settle(self, config: PretrainConfig, data: Sequence[SplitData]) -> PretrainConfig:
        """The settings with axes and size of the views.

        Raises:
            RequestError: `batch_size` is not a multiple of the group size, or a group is too small for its neighbours.
        """
        nodes = config.graph_matching.nodes
        if config.batch_size % nodes:
            raise RequestError(
                f"batch_size {config.batch_size} is not a multiple of the {nodes} images of a group",
                remedy="Change batch_size or graph_matching.nodes; training.accumulate makes larger batches of "
                "small ones",
            )
        config.images.require_room_in(nodes)
        dims = choose_dims(config.network, config.dims, data, "crops")
        views = config.views if config.views.size else config.views.model_copy(update={"size": _VIEW_SIZE[dims]})
        return config.model_copy(update={"dims": dims, "views": views})

    def card(self, plan: RunPlan[PretrainConfig]) -> ModelCard:
        """The card of a network for the image channels of the data."""
        config, names = plan.config, _modalities(plan.config, plan.data)
        identity = f"{config.method}: " + ", ".join(split.name for split in plan.data)
        return build_card(
            plan,
            task="pretraining",
            dims=config.dims or 3,
            modalities=names,
            out_channels=len(names),
            identity=identity,
        )

    def patch(self, config: PretrainConfig) -> tuple[str, int | tuple[int, ...]]:
        """The size of the views."""
        return "views.size", config.views.size or 0

    def build_task(
        self, plan: RunPlan[PretrainConfig], card: ModelCard, network: SegmentationNetwork
    ) -> PretrainingTask:
        """The task with the method and groups of images of all folders."""
        config = plan.config
        sources = [_source(data, data.training_ids) for data in plan.data]
        held_out = [_source(data, data.validation_ids) for data in plan.data if data.validation_ids]
        entry = METHODS[config.method]
        groups = _groups(config, card, sources, entry.views, seed=config.training.seed, length=ENDLESS)
        _log.info("images: %s", ", ".join(f"{count} of {name}" for name, count in groups.image_counts.items()))
        return PretrainingTask(
            model=entry.build(config, network, card),
            method_name=config.method,
            card=card,
            groups=groups,
            held_out=_held_out_groups(config, card, held_out, sources),
            groups_per_batch=config.batch_size // config.graph_matching.nodes,
            keeps_decoder=entry.keeps_decoder,
            workers=config.training.workers,
            ranks=plan.request.ranks,
        )

    def draw(self, folder: Path, task: PretrainingTask) -> None:
        """Figures of graph matching."""
        draw_matching(folder, task)


def _modalities(config: PretrainConfig, data: Sequence[SplitData]) -> tuple[str, ...]:
    """Names of the image channels: those of the data if all folders agree, else "image"."""
    are_pictures = all(split.cohort.dims == 2 for split in data)
    names = {split.cohort.modalities for split in data}
    first = data[0].cohort.modalities
    if config.images.channels == "all" or (config.images.channels == "auto" and are_pictures):
        require_same_modalities(data, "Set images.channels=each to use every modality as a separate image")
        return first
    return first if names == {first[:1]} else ("image",)


def _source(data: SplitData, ids: Sequence[str]) -> Source:
    return Source(data.name, data.prepared(ids), tuple(case.patient for case in data.cases(ids)))


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
        _log.warning("no patient can be held out: the measures do not generalise to other patients")
        usable = list(training)
    return _groups(config, card, usable, views, seed=_HELD_OUT_SEED, length=config.validation_groups)
