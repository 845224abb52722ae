"""The segmentation task: patches and labels in, masks scored by the product's own predictor."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.model import save_model
from segkit.inference.backends import TorchBackend
from segkit.inference.predictor import Predictor
from segkit.losses.compound import SegmentationLoss
from segkit.metrics.overlap import dice_by_region
from segkit.preparing.cache import StoredCases
from segkit.preparing.patch_sampling import PatchDataset
from segkit.preparing.preprocessing import PreparedCase
from segkit.training.batches import endless_batches
from segkit.training.distributed import Ranks
from segkit.training.task import Batch, Score, borrowed


@dataclass
class SegmentationTask:
    """A network, the cases it learns from, and the cases that choose its checkpoint."""

    model: nn.Module
    card: ModelCard
    loss_function: SegmentationLoss
    patches: PatchDataset
    validation: StoredCases
    batch_size: int
    workers: int | None = None
    validation_limit_s: float | None = None
    """Longest time that a validation may take; fixes the number of cases at the first one."""
    frozen: nn.Module | None = None
    """Part of the model that does not learn: no gradient reaches it, and its norms keep their running statistics."""
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self) -> None:
        if self.frozen is not None:
            self.frozen.requires_grad_(False)

    def batches(self, start: int) -> Iterator[Batch]:
        """Endless batches {"image": (B, C, *patch), "labels": (B, *patch)} from the `start`-th on."""
        return endless_batches(self.patches, self.batch_size, start, self.workers, self.ranks)

    def loss(self, batch: Batch) -> Tensor:
        """Loss of a batch on the model's device."""
        if self.frozen is not None:
            self.frozen.eval()  # the loop puts the whole model into training mode before each step
        self.loss_function.to(batch["image"].device)
        loss: Tensor = self.loss_function(self.model(batch["image"]), batch["labels"])
        return loss

    def validate(self, weights: Mapping[str, Tensor]) -> Score:
        """Mean Dice over outputs and validation cases, on the prepared grid, with these weights.

        An output that is in no case and was predicted in none has nothing to say; if none has, all is right: 1.
        """
        with borrowed(self.model, weights):
            predictor = Predictor(TorchBackend(self.model, next(self.model.parameters()).device), self.card)
            if self.validation_limit_s is not None:
                began = time.monotonic()
                self._dice(predictor, self.validation[0])
                count = self.ranks.size * self.validation_limit_s / max(time.monotonic() - began, 1e-6)
                self.validation = self.validation[: max(1, int(self.ranks.from_first(lambda: count)))]
                self.validation_limit_s = None
            per_case = self.ranks.map(
                lambda number: self._dice(predictor, self.validation[number]), range(len(self.validation))
            )
        found = {name: [d[name] for d in per_case if not math.isnan(d[name])] for name in self._regions()}
        by_output = {name: sum(values) / len(values) for name, values in found.items() if values}
        return Score(sum(by_output.values()) / len(by_output) if by_output else 1.0, {"dice": by_output})

    def save(self, run: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write model.safetensors and model.json."""
        training = self.card.training_data.model_copy(update=dict(facts))
        save_model(run, weights, self.card.model_copy(update={"training_data": training}))

    def _regions(self) -> dict[str, tuple[int, ...]]:
        return {output.name: output.members for output in self.card.outputs if output.label != 0}

    def _dice(self, predictor: Predictor, case: PreparedCase) -> dict[str, float]:
        if case.labels is None:
            raise ValueError(f"validation case {case.id} has no reference")
        labels = predictor.label_prepared(case)
        return dice_by_region(labels, np.asarray(case.labels), self._regions())
