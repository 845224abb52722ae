"""The pre-training task: an encoder from groups of unlabelled images, scored on images of held-out patients."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.model import save_model
from segkit.checkpoint.run_folder import WEIGHTS_NAME
from segkit.checkpoint.tensors import load_weights_file, write_tensors
from segkit.pretraining.encoder import retrieval_accuracy
from segkit.pretraining.methods import Method
from segkit.pretraining.sources import GroupDataset
from segkit.reading.files import written_atomically
from segkit.training.batches import endless_batches, to_device
from segkit.training.distributed import Ranks
from segkit.training.task import Batch, Score, borrowed

METHOD_WEIGHTS = "method.safetensors"
"""The best weights of the parts that a method adds to the network; its measures and figures need them."""

_NETWORK = "network."
"""Prefix of the network's tensors in a method."""


@dataclass
class PretrainingTask:
    """A method with its network, training groups of images, and the held-out groups that choose its checkpoint."""

    model: nn.Module
    """A `Method`."""
    method_name: str
    card: ModelCard
    groups: GroupDataset
    held_out: GroupDataset
    groups_per_batch: int
    keeps_decoder: bool
    """Whether the method trains the decoder, which is then saved; heads never are."""
    workers: int | None = None
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def images(self) -> Mapping[str, int]:
        """Number of training images, by data folder."""
        return self.groups.image_counts

    @property
    def method(self) -> Method:
        """The model."""
        return cast(Method, self.model)

    def batches(self, start: int) -> Iterator[Batch]:
        """Endless batches of (B, ...) tensors from number `start` on, groups one after the other."""
        for batch in endless_batches(self.groups, self.groups_per_batch, start, self.workers, self.ranks):
            yield {name: tensor.flatten(0, 1) for name, tensor in batch.items()}

    def loss(self, batch: Batch) -> Tensor:
        """Loss of a batch on the model's device."""
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
        collated = default_collate([self.held_out[index] for index in range(len(self.held_out))])
        return {name: tensor.flatten(0, 1) for name, tensor in collated.items()}

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
        return self.keeps_decoder or own.startswith(network.encoder_prefix)


_VIEWS = ("first", "second")
