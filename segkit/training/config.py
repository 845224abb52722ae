"""The settings of a training run, as a YAML file or `--set` gives them.

Fields that are None are planned from the data and the available memory; `config.yaml` in the run folder has the chosen
values and the reasons.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field

from segkit.checkpoint.transfer import InputAdapt
from segkit.config import Config
from segkit.losses.dice_cross_entropy import LossConfig
from segkit.preparing.augmentation import AugmentationConfig
from segkit.preparing.preprocessing import PreprocessingConfig
from segkit.preparing.user_transforms import checked_setting


class DataConfig(Config):
    """Which cases are trained on."""

    layout: str | None = None
    """Data layout; None: recognised."""
    label_scheme: str | None = None
    """Label scheme; with ",ignore=255" voxels of that value are left out; None: that of the layout."""
    modalities: dict[str, str] | None = None
    """Modality name to file suffix, for folders in an unknown layout."""
    folds: int = Field(default=5, ge=2)
    """Number of patient-wise folds."""
    fold: int = Field(default=0, ge=0)
    """The fold for validation, from 0."""
    split_seed: int = 0
    """Seed of the patient-wise split."""
    patients: Path | None = None
    """Table of case and patient, for cases whose names do not hold their patient."""
    split: Path | None = None
    """Folds in a JSON file (nnU-Net's splits_final.json); None: patient-wise folds."""
    exclude: tuple[str, ...] = ()
    """Case ids excluded from training and validation."""
    cache: Path | None = None
    """Folder for prepared cases; None: `cache` in the run folder."""


class NetworkConfig(Config):
    """Which network is trained."""

    family: str = "revmbunet"
    """Family name, see `segkit models`."""
    size: str | None = None
    """Named size of the family; None: its usual size."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the family that replace those of the size, such as widths or blocks."""
    weights: Path | None = None
    """First weights: a run folder, nnU-Net results, a .safetensors, .pth or .model file; None: random."""
    input_adapt: InputAdapt = "mean"
    """How these weights are adapted to other image channels. mean: kernels of the same modality if both sides name
    modalities, else repeated and scaled to keep the size of the output; repeat: repeated, unscaled (as STU-Net); zero:
    additional channels start at zero."""
    weights_share: float = Field(default=1.0, ge=0, le=1)
    """Least share of the encoder's parameters that these weights must contain. 1: all tensors must fit, including those
    of a decoder in the file; below 1 tensors that do not fit are skipped and reported."""


class PlanningConfig(Config):
    """Bounds within which planning chooses."""

    patch_size: tuple[int, ...] | None = None
    """Patch in voxels; None: planned from sizes, spacing and memory."""
    patch_limit: int = Field(default=128, ge=16)
    """Longest side of a planned patch, in voxels; twice as long for pictures."""
    batch_size: int | None = Field(default=None, ge=1)
    """Patches per step and process; None: planned."""
    batch_limit: int = Field(default=2, ge=1)
    """Largest planned batch; twice as large for pictures."""


class OptimiserConfig(Config):
    """AdamW and its schedule."""

    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate."""
    encoder_lr: float = Field(default=1.0, ge=0)
    """Learning rate of the encoder as a share of lr: below 1 it stays closer to its first weights; 0 freezes it, with
    the running statistics of its norms."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Decoupled weight decay, on weights with more than one axis."""
    schedule: Literal["cosine", "poly", "halving"] = "cosine"
    """Decay after warm-up: to zero by half a cosine or by (1 - progress) ** 0.9, or halved after each fifth."""
    warmup: float = Field(default=0.02, ge=0, lt=1)
    """Share of the run with linear warm-up."""
    gradient_clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient; None: no clipping."""


class LoopConfig(Config):
    """Length and computation of a training, for every task."""

    steps: int = Field(default=50_000, ge=1)
    """Optimisation steps; a budget replaces them."""
    budget_minutes: float | None = Field(default=None, gt=0)
    """Wall time of the whole command; the learning rate schedule follows it."""
    steps_per_epoch: int = Field(default=250, ge=1)
    """Steps per epoch; each epoch ends with a checkpoint."""
    checkpoint_minutes: float = Field(default=10.0, gt=0)
    """Longest time between two checkpoints within an epoch."""
    validate_every: int = Field(default=1, ge=1)
    """Fewest epochs between validations, which take about a tenth of the time at most, see `SegmentationTask.paced`."""
    accumulate: int = Field(default=1, ge=1)
    """Batches per step and process whose gradients are summed."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay per step of the moving average of the weights, which is validated and saved; 0: no average."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the forward pass; auto: bf16 where it is native (GPUs since 2020, CPUs with avx512_bf16 or AMX),
    else fp32. A resumed run keeps its precision."""
    compile: bool | None = None
    """Whether torch compiles the network, which takes a minute or more; None: on NVIDIA GPUs, in runs of at least 2000
    steps or 30 minutes. A network that does not become one graph is not compiled."""
    rank_timeout_s: float = Field(default=600.0, gt=0)
    """Longest time that one of several processes may block the others, in a step or a validation case."""
    sharding: Literal["auto", "none", "full"] = "auto"
    """full: each of several processes has a part of the network and of the optimiser state (stunet only); none: each
    has all of it; auto: full if all of it does not fit into memory."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that prepare patches; None: chosen by the cores and the device; 0: the training process."""
    seed: int = 0
    """Seed of weights, sampling and augmentation."""
    live_page: bool = True
    """Whether report.html in the run folder is updated during the training."""
    trackers: tuple[Literal["tensorboard", "mlflow"], ...] = ()
    """Programs that also get the metrics, in the run folder; for MLflow, MLFLOW_TRACKING_URI may name a server."""


class TrainingConfig(LoopConfig):
    """Length and computation of the training of a segmentation network."""

    validation_cases: int | None = Field(default=None, ge=1)
    """Most cases of a validation during training; the final validation uses all of the fold."""
    foreground_fraction: float = Field(default=0.5, ge=0, le=1)
    """Share of patches centred on foreground."""
    transforms: tuple[Annotated[dict[str, Any], AfterValidator(checked_setting)], ...] = ()
    """Further changes of patches by MONAI's dictionary transforms, such as {name: RandBiasFieldd, prob: 0.2}: the name
    and plain arguments; `place: before` instead of after our own. With augmentation.enabled false they replace ours."""
    python_transforms: tuple[str, ...] = ()
    """Names of the transforms that `segkit.train(transforms=...)` was given; they cannot be set."""


class RunConfig(Config):
    """The settings of every kind of training."""

    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    training: LoopConfig = LoopConfig()


RunConfigT = TypeVar("RunConfigT", bound=RunConfig)


class TrainConfig(RunConfig):
    """The settings of `segkit train`."""

    training: TrainingConfig = TrainingConfig()
    planning: PlanningConfig = PlanningConfig()
    augmentation: AugmentationConfig = Field(default_factory=AugmentationConfig)
    loss: LossConfig = LossConfig()
    overlap: float = Field(default=0.5, ge=0, lt=1)
    """Overlap of inference windows, as a share of the patch."""
    postprocessing: Literal["auto", "none"] = "auto"
    """auto: after the training, minimum sizes of components and regions are tried on the validation cases and used if
    they improve the Dice; none: no post-processing."""


def with_values(config: RunConfigT, section: str, **values: Any) -> RunConfigT:
    """The settings with other values in one section."""
    changed = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: changed})
