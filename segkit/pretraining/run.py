"""Pre-training: an encoder from images without label maps, measured on held-out patients before and after."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.model import save_model
from segkit.checkpoint.run_folder import WEIGHTS_NAME
from segkit.checkpoint.tensors import load_weights_file, write_tensors
from segkit.errors import DataError, RequestError
from segkit.models.blocks import SegmentationNetwork
from segkit.pretraining.encoder import retrieval_accuracy
from segkit.pretraining.graph_matching import GraphMatching
from segkit.pretraining.matching_figures import draw_matching
from segkit.pretraining.methods import METHODS, Method, PretrainConfig
from segkit.pretraining.overlap import overlap_measures
from segkit.pretraining.sources import GroupDataset, Source
from segkit.reading.files import written_atomically
from segkit.reading.layouts.table import find_cases
from segkit.training.batches import ENDLESS, endless_batches, to_device
from segkit.training.distributed import Ranks
from segkit.training.task import Batch, RunPlan, Score, SplitData, borrowed, build_card
from segkit.training.unlabelled import UnlabelledKind, choose_dims, find_split, require_same_modalities

METHOD_WEIGHTS = "method.safetensors"
"""The best weights of the parts that a method adds to the network; its measures and figures need them."""

_NETWORK = "network."  # prefix of the network's tensors in a method
_VIEWS = ("first", "second")
_VIEW_SIZE = {2: 224, 3: 64}  # default voxels of a view along each axis
_GROUPS_LOOKED_AT = 4
_LEAST_ORACLE = 0.95
_HELD_OUT_SEED = 2**31  # seed of the groups of held-out images, different from that of any training group

_log = logging.getLogger(__name__)


@dataclass
class PretrainingTask:
    """A method with its network, training groups of images, and the held-out groups that choose its checkpoint."""

    model: nn.Module  # a `Method`
    method_name: str
    card: ModelCard
    groups: GroupDataset
    held_out: GroupDataset
    groups_per_batch: int
    workers: int | None = None
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def images(self) -> Mapping[str, int]:
        """Number of training images, by data folder."""
        return self.groups.image_counts

    @property
    def method(self) -> Method:
        """The model, by its methods."""
        return cast(Method, self.model)

    def batches(self, start: int) -> Iterator[Batch]:
        """Endless batches of (B, ...) tensors from number `start` on, groups one after the other."""
        device = next(self.model.parameters()).device
        for batch in endless_batches(self.groups, self.groups_per_batch, start, self.workers, self.ranks, device):
            yield {name: tensor.flatten(0, 1) for name, tensor in batch.items()}

    def loss(self, batch: Batch) -> Tensor:
        """The method's loss of a batch on the model's device."""
        return self.method.loss(batch)

    def validate(self, weights: Mapping[str, Tensor]) -> Score:
        """The method's measures on the held-out groups with these weights; one of them is the score."""
        measures = self.measure(weights)
        return Score(measures[self.method.score], {"measures": measures})

    def measure(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """The method's measures and, of methods with two views, `encoder_retrieval`.

        That is the share of held-out images whose nearest view, by the mean over the deepest feature map, is their own.
        Rank 0 computes it for all ranks, because all held-out images are compared with each other.
        """
        return self.ranks.from_first(lambda: self._measured(weights))

    @torch.no_grad()
    def _measured(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        with borrowed(self.model, weights):
            self.model.eval()
            batch = to_device(self.held_out_batch(), next(self.model.parameters()).device)
            measures = self.method.measures(batch)
            if self.method.views == 2:
                pooled = (self.method.network.encode(batch[view])[-1].flatten(2).mean(2) for view in _VIEWS)
                first, second = (features.float().cpu().numpy() for features in pooled)
                measures["encoder_retrieval"] = retrieval_accuracy(first, second)
        return measures

    def held_out_batch(self) -> Batch:
        """All held-out groups as one batch, always the same."""
        return _first_groups(self.held_out, len(self.held_out))

    def save(self, run: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write model.safetensors with the weights to transfer, method.safetensors and model.json."""
        kept = {name.removeprefix(_NETWORK): value for name, value in weights.items() if self._is_kept(name)}
        others = {name: value for name, value in weights.items() if not self._is_kept(name)}
        with written_atomically(run / METHOD_WEIGHTS) as path:
            write_tensors(path, others)
        training = self.card.training_data.model_copy(update=dict(facts))
        save_model(run, kept, self.card.model_copy(update={"training_data": training}))

    def take_best(self, run: Path) -> None:
        """Load the weights that `save` wrote last."""
        weights = load_weights_file(run / METHOD_WEIGHTS)
        weights |= {f"{_NETWORK}{name}": value for name, value in load_weights_file(run / WEIGHTS_NAME).items()}
        self.model.load_state_dict(weights)

    def _is_kept(self, name: str) -> bool:
        """Whether a tensor belongs to the encoder, or to a decoder that was trained, too."""
        network, own = self.method.network, name.removeprefix(_NETWORK)
        if own == name or own.startswith(network.head_prefixes):
            return False
        return self.method.keeps_decoder or own.startswith(network.encoder_prefix)


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
            found = f"batch_size {config.batch_size} is not a multiple of the {nodes} images of a group"
            remedy = "Change batch_size or graph_matching.nodes; training.accumulate makes larger batches of small ones"
            raise RequestError(found, remedy=remedy)
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
        model, nodes = METHODS[config.method](config, network, card), config.graph_matching.nodes
        groups_of = partial(
            GroupDataset,
            size=card.patch_size,
            images=config.images,
            views=config.views,
            nodes=nodes,
            view_count=cast(Method, model).views,
        )
        groups = groups_of(sources, seed=config.training.seed, length=ENDLESS)
        _log.info("images: %s", ", ".join(f"{count} of {name}" for name, count in groups.image_counts.items()))
        if groups.view_count == 2:
            _log_views(_first_groups(groups, _GROUPS_LOOKED_AT), nodes)
        return PretrainingTask(
            model=model,
            method_name=config.method,
            card=card,
            groups=groups,
            held_out=_held_out_groups(groups_of, held_out, sources, config.validation_groups),
            groups_per_batch=config.batch_size // nodes,
            workers=config.training.workers,
            ranks=plan.request.ranks,
        )

    def draw(self, folder: Path, task: PretrainingTask) -> None:
        """Figures of graph matching."""
        if isinstance(task.model, GraphMatching):
            draw_matching(folder, task.model, task.held_out_batch())


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


def _first_groups(groups: GroupDataset, count: int) -> Batch:
    collated = default_collate([groups[index] for index in range(count)])
    return {name: tensor.flatten(0, 1) for name, tensor in collated.items()}


def _log_views(batch: Batch, nodes: int) -> None:
    """Log the size of the voxels of views, and how much the views of a group overlap."""
    spacing = batch["first_frame"][:, :, :-1].norm(dim=1).median(0).values.tolist()
    _log.info("views: voxels of %s mm", " x ".join(f"{mm:.2f}" for mm in spacing))
    found = overlap_measures(batch, nodes)
    sentence = (
        "overlap of an image's views %(own).2f, with the nearest other image %(other).2f; matched by it %(oracle).2f"
    )
    _log.info(sentence, found)
    if found["oracle"] < _LEAST_ORACLE:
        _log.warning("the images of a group overlap so much that matching is ambiguous: lower images.crop_overlap")


def _held_out_groups(
    groups_of: Callable[..., GroupDataset], held_out: Sequence[Source], training: Sequence[Source], length: int
) -> GroupDataset:
    """Groups of held-out patients, of the sources that have enough of them; of the training images if none has."""
    usable = []
    for source in held_out:
        try:
            groups_of([source], seed=0, length=1)
            usable.append(source)
        except DataError as error:
            _log.warning("not measured on held-out images of %s: %s", source.name, error)
    if not usable:
        _log.warning("no patient can be held out: the measures do not generalise to other patients")
        usable = list(training)
    return groups_of(usable, seed=_HELD_OUT_SEED, length=length)
