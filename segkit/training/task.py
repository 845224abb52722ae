"""Types of the trainings.

`segkit.training.run.train` turns a `TrainingRequest` into a run folder and a `Summary`. A `Kind` of training
(segmentation, pre-training, inpainting) finds the cases, completes the settings and builds the `Task` for the loop.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from monai.transforms import Compose
from torch import Tensor, nn

from segkit.checkpoint.card import ModelCard, NetworkCard, PreprocessingCard, TrainingData
from segkit.models.blocks import SegmentationNetwork
from segkit.preparing.cache import PreparedStore, StoredCases
from segkit.preparing.preprocessing import PreprocessingConfig
from segkit.reading.case import Case, Cohort
from segkit.runtime import environment
from segkit.training.config import LoopConfig, RunConfig
from segkit.training.distributed import Ranks

ConfigT = TypeVar("ConfigT", bound=RunConfig)
TaskT = TypeVar("TaskT", bound="Task")

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class TrainingRequest(Generic[ConfigT]):
    """Data folders, run folder, settings, and device of a training."""

    data: tuple[Path, ...]
    run: Path
    config: ConfigT
    device: torch.device
    memory_gb: float | None = None
    started_s: float = field(default_factory=time.monotonic)
    resume: bool = False
    overwrite: bool = False
    allow_changes: bool = False
    """Whether a resumed run may have other settings than before."""
    on_progress: Callable[[float, str], None] | None = None
    """Called after each step with the progress, 0 to 1, and a message; None writes log lines."""
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that train together."""
    transforms: Compose | None = None
    """Transforms of patches from Python; their names are `training.python_transforms`."""

    @property
    def deadline_s(self) -> float | None:
        """End of the budget, as `time.monotonic` seconds; None without a budget."""
        budget = self.config.training.budget_minutes
        return None if budget is None else self.started_s + 60 * budget


@dataclass(frozen=True)
class Summary:
    """Result of a run; the keys of `scores` depend on the kind of training."""

    run: Path
    scores: Mapping[str, Any]
    steps: int
    minutes: float
    peak_rss_mb: float
    skipped: Mapping[str, str]
    """Why cases were left out, by id."""
    left_out: tuple[str, ...] = ()
    """Files that belong to no usable case, see `Cohort.left_out`."""

    def to_json(self) -> dict[str, Any]:
        """The document printed by `--json` and written to validation.json."""
        return {
            "run": str(self.run),
            **self.scores,
            "steps": self.steps,
            "minutes": round(self.minutes, 2),
            "peak_rss_mb": round(self.peak_rss_mb),
            "skipped": dict(self.skipped),
            "left_out": list(self.left_out),
        }


@dataclass(frozen=True)
class SplitData:
    """A data folder: its cases, their preprocessing, and the ids of training and validation cases."""

    cohort: Cohort
    preprocessing: PreprocessingConfig
    training_ids: tuple[str, ...]
    validation_ids: tuple[str, ...]
    folders: Mapping[str, Path] = field(default_factory=dict)
    """Folder of each prepared case, by id; cases that cannot be prepared are removed from the ids."""

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.cohort.root.resolve().name

    def cases(self, ids: Sequence[str]) -> list[Case]:
        """The cases of these ids, in their order."""
        by_id = {case.id: case for case in self.cohort.cases}
        return [by_id[case_id] for case_id in ids]

    def prepared(self, ids: Sequence[str]) -> StoredCases:
        """The prepared cases of these ids."""
        return StoredCases([self.folders[case_id] for case_id in ids])


@dataclass(frozen=True)
class RunPlan(Generic[ConfigT]):
    """A run with its split and complete settings."""

    request: TrainingRequest[ConfigT]
    data: tuple[SplitData, ...]
    heading: str
    """Description of the data: the first line of config.yaml."""
    patch_setting: str
    """Name of the setting that is `patch_size`."""
    patch_size: int | tuple[int, ...]
    """Voxels along each axis, or along all."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Reasons of planned settings, by dotted key."""
    estimate: Mapping[str, float] = field(default_factory=dict)
    copies: tuple[Case, ...] = ()
    """Lesion-free copies of training cases, if the settings name a lesion bank."""

    @property
    def config(self) -> ConfigT:
        """The settings."""
        return self.request.config

    @property
    def store(self) -> PreparedStore:
        """Where prepared cases are."""
        return PreparedStore(self.config.data.cache or self.request.run / "cache")


@dataclass(frozen=True)
class Score:
    """Result of a validation: `value` chooses the best checkpoint (higher is better); the journal gets `details`."""

    value: float
    details: Mapping[str, Any] = field(default_factory=dict)
    final_s: float | None = None
    """Forecast of the scoring after the last step, in seconds; None: as long as this validation."""


class Task(Protocol):
    """The task of the training loop: model, batches, loss, validation."""

    model: nn.Module

    def batches(self, start: int) -> Iterator[Batch]:
        """Endless batches from number `start` on; batch n is the same in every run with the same settings."""

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch on the model's device, a scalar."""

    def validate(self, weights: Mapping[str, Tensor]) -> Score:
        """The score of these weights on the validation cases."""

    def save(self, run: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write model.safetensors and model.json atomically; `facts` are step and score."""


class Kind(ABC, Generic[ConfigT, TaskT]):
    """A kind of training; the methods are called in this order."""

    config_type: type[ConfigT]
    """Its settings."""
    is_supervised = False
    """Whether it needs references and validation cases."""

    @abstractmethod
    def plan(self, request: TrainingRequest[ConfigT]) -> RunPlan[ConfigT]:
        """Find the cases, split them by patient, and complete the settings; nothing is written.

        Raises:
            RequestError: data or settings do not fit.
        """

    @abstractmethod
    def card(self, plan: RunPlan[ConfigT]) -> ModelCard:
        """The card before the network is built, see `build_card`."""

    @abstractmethod
    def build_task(self, plan: RunPlan[ConfigT], card: ModelCard, network: SegmentationNetwork) -> TaskT:
        """The task of the training loop, once the cases are prepared."""

    def pace(self, plan: RunPlan[ConfigT], task: TaskT) -> LoopConfig:
        """The settings of the loop, with validations that are not too frequent for the task."""
        return plan.config.training

    def measure_before(self, plan: RunPlan[ConfigT], task: TaskT) -> dict[str, float]:
        """Measures of the first weights; empty by default."""
        return {}

    @abstractmethod
    def score(self, plan: RunPlan[ConfigT], task: TaskT, before: Mapping[str, float]) -> dict[str, Any]:
        """Scores of the best weights for the summary; figures are written."""


def build_card(
    plan: RunPlan[Any], *, dims: int, modalities: tuple[str, ...], out_channels: int, identity: str, **others: Any
) -> ModelCard:
    """The card of a run before its network is built: patch and divisor are still missing.

    `identity` names the data that the run is trained on; `others` are further fields of `ModelCard`.
    """
    network, licences = plan.config.network, {split.cohort.licence for split in plan.data if split.cohort.licence}
    return ModelCard(
        network=NetworkCard(
            family=network.family,
            size=network.size,
            in_channels=len(modalities),
            out_channels=out_channels,
            arguments=network.arguments,
        ),
        dims=2 if dims == 2 else 3,
        modalities=modalities,
        patch_size=(),
        divisor=(),
        preprocessing=PreprocessingCard(**plan.data[0].preprocessing.model_dump()),
        versions=environment(),
        training_data=TrainingData(
            identity=identity,
            licence="; ".join(sorted(licences)) or None,
            cases=sum(len(split.training_ids) for split in plan.data),
        ),
        **others,
    )


@contextmanager
def borrowed(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other weights inside the block; its own are restored even if a signal interrupts that."""
    present = model.state_dict()
    if all(present[name] is value or present[name].data_ptr() == value.data_ptr() for name, value in weights.items()):
        yield
        return
    own = {name: value.detach().clone() for name, value in present.items()}
    try:
        model.load_state_dict(weights)
        yield
    finally:
        try:
            model.load_state_dict(own)
        except KeyboardInterrupt:  # else weights restored by half would be written as the state of the training
            model.load_state_dict(own)
            raise
