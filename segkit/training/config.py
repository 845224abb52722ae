"""The settings of a training run: what a YAML file or `--set` can say.

A field that is None is decided by planning from the data and the memory at hand; `config.yaml` in the run folder
holds what was chosen and why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from segkit.checkpoint.transfer import InputAdapt
from segkit.config import Config
from segkit.losses.compound import LossConfig
from segkit.preparing.augmentation import AugmentationConfig
from segkit.preparing.preprocessing import PreprocessingConfig


class DataConfig(Config):
    """Which cases are trained on."""

    layout: str | None = None
    """Data layout; None recognises it."""
    label_scheme: str | None = None
    """Label scheme; None takes it from the layout."""
    modalities: dict[str, str] | None = None
    """Modality name to file suffix, for folders that follow no known naming."""
    folds: int = Field(default=5, ge=2)
    """Number of patient-wise folds; one of them validates."""
    fold: int = Field(default=0, ge=0)
    """The fold that validates."""
    split_seed: int = 0
    """Seed of the patient-wise split."""
    exclude: tuple[str, ...] = ()
    """Case ids kept out of training, validation and checkpoint choice."""
    cache: Path | None = None
    """Folder for prepared cases; None is `cache` in the run folder."""


class NetworkConfig(Config):
    """Which network is trained."""

    family: str = "revmbunet"
    """Family name, see `segkit models`."""
    size: str | None = None
    """Named size of the family; None is the family's usual one."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the family laid over its size, such as widths or blocks."""
    weights: Path | None = None
    """Weights to begin with: a run folder, nnU-Net's results, a .safetensors, .pth or .model file; None is random."""
    input_adapt: InputAdapt = "mean"
    """How those weights are made for other image channels. mean: kernels of the same modality where both sides name
    theirs, else repeated and scaled so that the output keeps its size; repeat: repeated, unscaled (as STU-Net does);
    zero: further channels start at zero."""
    weights_share: float = Field(default=1.0, ge=0, le=1)
    """Least share of the encoder, by number of parameters, that those weights must hold. 1: everything must fit, of the
    decoder too where the file has one; below 1 what does not fit is left out and reported."""


class PlanningConfig(Config):
    """Bounds within which planning chooses."""

    patch_size: tuple[int, ...] | None = None
    """Patch in voxels; None is planned from sizes, spacing and memory."""
    patch_limit: int = Field(default=128, ge=16)
    """Longest side that planning may give a patch, in voxels; patches of pictures may be twice as long."""
    batch_size: int | None = Field(default=None, ge=1)
    """Patches per step and process; None is planned."""
    batch_limit: int = Field(default=2, ge=1)
    """Largest batch that planning may choose; of pictures twice as many."""


class OptimiserConfig(Config):
    """AdamW and its schedule."""

    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate."""
    encoder_lr: float = Field(default=1.0, ge=0)
    """Learning rate of the encoder as a share of lr: below 1 it keeps more of the weights it began with; 0 freezes it,
    the running statistics of its norms included."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Decoupled weight decay, on weights with more than one axis."""
    schedule: Literal["cosine", "poly", "halving"] = "cosine"
    """Decay after warm-up: to zero by half a cosine or by (1 - progress) ** 0.9, or halved after each fifth."""
    warmup: float = Field(default=0.02, ge=0, lt=1)
    """Part of the run in which the rate rises linearly."""
    gradient_clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient; None does not clip."""


class LoopConfig(Config):
    """Length of a training and what it keeps; the same for every task."""

    steps: int = Field(default=50_000, ge=1)
    """Optimisation steps; a budget replaces them."""
    budget_minutes: float | None = Field(default=None, gt=0)
    """Wall time of the whole command, which the schedule follows."""
    steps_per_epoch: int = Field(default=250, ge=1)
    """Steps of an epoch, which ends with a checkpoint."""
    checkpoint_minutes: float = Field(default=10.0, gt=0)
    """Longest time between two checkpoints within an epoch."""
    validate_every: int = Field(default=1, ge=1)
    """Epochs between validations; under a budget validation takes a tenth of the time at most."""
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients are summed for one step; each process has as many."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay per step of the moving average of the weights, which is what is validated and kept; 0 switches it off."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass; auto is bf16 on a GPU that has it."""
    rank_timeout_s: float = Field(default=600.0, gt=0)
    """Longest time that one of several processes may hold up the others, within a step or a case that is validated."""
    sharding: Literal["auto", "none", "full"] = "auto"
    """full: each of several processes keeps a part of the network and of the optimiser's state (stunet); none: each
    keeps all of it; auto: a part where all of it does not fit."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that prepare patches; None chooses by the cores, 0 prepares them in the training process."""
    seed: int = 0
    """Seed of weights, sampling and augmentation."""
    live_page: bool = True
    """Whether report.html in the run folder is updated during the training."""
    trackers: tuple[Literal["tensorboard", "mlflow"], ...] = ()
    """Programs that also get the metrics, in the run folder; MLflow uses MLFLOW_TRACKING_URI instead, if set."""


class TrainingConfig(LoopConfig):
    """How long and how a segmentation network is trained."""

    validation_cases: int | None = Field(default=None, ge=1)
    """Most cases validated during training; the final validation takes all of the fold."""
    foreground_fraction: float = Field(default=0.5, ge=0, le=1)
    """Part of the patches that is centred on foreground."""


class RunConfig(Config):
    """The settings that every kind of training has."""

    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    training: LoopConfig = LoopConfig()


RunConfigT = TypeVar("RunConfigT", bound=RunConfig)


class TrainConfig(RunConfig):
    """A whole training run."""

    training: TrainingConfig = TrainingConfig()
    planning: PlanningConfig = PlanningConfig()
    augmentation: AugmentationConfig = Field(default_factory=AugmentationConfig)
    loss: LossConfig = LossConfig()
    overlap: float = Field(default=0.5, ge=0, lt=1)
    """Overlap of inference windows, as a part of the patch."""
    postprocessing: Literal["auto", "none"] = "auto"
    """auto: sizes below which a component or a whole region is removed are tried on the validation cases after the
    training, and kept where they help; none: masks are left as they are painted."""


def with_values(config: RunConfigT, section: str, **values: Any) -> RunConfigT:
    """The settings with some values of one section changed."""
    changed = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: changed})
