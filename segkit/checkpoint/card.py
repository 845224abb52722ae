"""The model card `model.json`: what a weight file is, and everything needed to use it.

A card comes from whoever made the model, so that its numbers are held to what a network can have before anything is
built from them, and the files it names are files beside it.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from segkit.config import Config
from segkit.errors import CheckpointError
from segkit.labels import LabelScheme, Output, scheme_from_json
from segkit.preparing.preprocessing import Crop, Normalisation, PreprocessingConfig
from segkit.reading.case import is_file_name

_LARGEST_ARGUMENT = 8192
"""Beyond any width, depth or number of steps; a network of more would fill the memory before its weights are read."""
_MOST_CHANNELS = 1024
_LARGEST_PATCH_VOXELS = 2**30


def _is_beside(name: str) -> str:
    if not is_file_name(name):
        raise ValueError(f"{name!r} is not the name of a file beside the card")
    return name


def _is_shown(name: str) -> str:
    if not name or not name.isprintable():
        raise ValueError(f"{name!r} is no name that can be shown")
    return name


def _is_of_modest_size(arguments: dict[str, Any]) -> dict[str, Any]:
    left: list[Any] = [*arguments.values()]
    for _ in range(_LARGEST_ARGUMENT):
        if not left:
            return arguments
        value = left.pop()
        if isinstance(value, (list, tuple)):
            left += value
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (int, float)) and not -_LARGEST_ARGUMENT <= value <= _LARGEST_ARGUMENT:
            raise ValueError(f"no network is built with {value}")
    raise ValueError(f"holds more than {_LARGEST_ARGUMENT} values")


FileName = Annotated[str, AfterValidator(_is_beside)]
Name = Annotated[str, AfterValidator(_is_shown)]
LabelValue = Annotated[int, Field(ge=0, le=255)]
Sha256 = Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]
Size = Annotated[int, Field(ge=1, le=65536)]


class NetworkCard(Config):
    """The network to build: a family and size of `segkit models`, its channels and its other arguments."""

    family: str
    size: str | None = None
    in_channels: int = Field(ge=1, le=_MOST_CHANNELS)
    out_channels: int = Field(ge=1, le=_MOST_CHANNELS)
    arguments: Annotated[dict[str, Any], AfterValidator(_is_of_modest_size)] = Field(default_factory=dict)


class OutputCard(Config):
    """One output: its name, the label value it paints, the label values it covers (empty: only `label`)."""

    name: Name
    label: LabelValue
    members: tuple[LabelValue, ...] = ()


class SchemeCard(Config):
    """The label scheme of the training data: tissue names with their values, background left out."""

    name: Name
    labels: dict[Name, LabelValue]


class TrainingData(Config):
    """What the weights were trained on; further facts (fold, seed ...) may be added."""

    model_config = ConfigDict(extra="allow")

    identity: str
    """Name or digest by which the data can be told again."""
    licence: str | None = None
    cases: int = 0


class GraphCard(Config):
    """One ONNX file of an export: one window in, logits out."""

    file: FileName
    """Name of the ONNX file in the folder of the card."""
    precision: Literal["fp32", "fp16", "int8"]
    sha256: dict[FileName, Sha256]
    """Digest of the file, and of each file with its external data, by name."""
    dice_change: float | None = None
    """Mean Dice against the reference minus that of fp32, on the cases it was measured on; null where none was."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Seconds of one window by backend, measured at export."""
    is_approved: bool = True
    """Whether `--backend auto` may take it: fast enough and true enough. The fp32 graph always is."""


class ExportCard(Config):
    """What `segkit export` wrote beside the card, and how it was checked."""

    opset: int
    graphs: tuple[GraphCard, ...] = Field(min_length=1)
    """fp32 first."""
    parity: dict[str, Any] = Field(default_factory=dict)
    """Largest logit difference to the trained network and Dice of the decoded masks, by backend."""


Part = Literal["component", "total"]
"""Each connected component by itself (voxels that touch at a corner are connected), or a region as a whole."""


class SizeRule(Config):
    """What of one output is too small to be believed, and what not believing it did on the validation cases."""

    output: str
    """Name of the output whose region is measured."""
    part: Part
    smallest_mm3: float = Field(gt=0)
    """Volumes below this are removed, in mm³; on pictures, which have no spacing, in pixels."""
    dice: tuple[float, float] | None = None
    """Mean Dice of the output, and of those inside it, before and after."""


class PostprocessingCard(Config):
    """Rules applied to a label map one after the other; `segkit.inference.postprocessing` applies them."""

    rules: tuple[SizeRule, ...]
    """Outer regions before those inside them."""
    cases: int = 0
    """Validation cases that the rules were chosen on."""


class ModelCard(Config):
    """The contents of `model.json`: everything needed to use the weights beside it.

    Sizes and patches are in voxels, spacings in mm, both in the axis order of `segkit.shapes` after orientation.
    `activation`, `outputs` and `label_scheme` belong to segmentation only, `context` to inpainting.
    """

    task: Literal["segmentation", "pretraining", "inpainting"] = "segmentation"
    network: NetworkCard
    dims: Literal[2, 3] = 3
    modalities: tuple[Name, ...] = Field(min_length=1)
    """Names of the input channels, in order."""
    patch_size: tuple[Size, ...]
    overlap: float = Field(default=0.5, ge=0, lt=1)
    """Fraction of a window shared with its neighbour."""
    divisor: tuple[Size, ...]
    """The network takes sizes that are multiples of this."""
    spacing_mm: tuple[Annotated[float, Field(ge=1e-3, le=1e3)], ...] | None = None
    """Grid on which the network works; null keeps the spacing of the source."""
    orientation: str = Field(default="RAS", pattern="^[RLAPSIJKrlapsijk]{3}$")
    normalisation: Normalisation = "zscore-nonzero"
    ct_window: tuple[float, float] | None = None
    ct_mean: float | None = None
    ct_std: float | None = None
    crop: Crop = "nonzero"
    mirror_axes: tuple[int, ...] | None = None
    """Axes that training mirrored, which test-time mirroring may use; null means all of them."""
    context: Literal["none", "hole", "mirror"] = "none"
    """What an inpainting network is given besides the image, see `input_channels`."""
    activation: Literal["sigmoid", "softmax"] | None = None
    outputs: tuple[OutputCard, ...] = ()
    label_scheme: SchemeCard | None = None
    postprocessing: PostprocessingCard | None = None
    """What is removed from a label map, chosen on the validation cases; null removes nothing."""
    modality_dropout: float = 0.0
    """Part of the training patches that lacked a modality; where it is 0, the network never was without one."""
    versions: dict[str, str] = Field(default_factory=dict)
    sha256: Sha256 = ""
    """Digest of `model.safetensors`."""
    export: ExportCard | None = None
    """The ONNX files beside the card, where `segkit export` wrote it."""
    training_data: TrainingData

    @model_validator(mode="after")
    def _agrees(self) -> ModelCard:
        for key, values in {"patch_size": self.patch_size, "divisor": self.divisor}.items():
            if values and len(values) != self.dims:  # of a network that is yet to be built, sizes are not known
                raise ValueError(f"{key} has {len(values)} values for {self.dims} axes")
        if self.spacing_mm is not None and len(self.spacing_mm) not in (self.dims, 3):  # slices of a volume have 3
            raise ValueError(f"spacing_mm has {len(self.spacing_mm)} values for {self.dims} axes")
        if prod(self.patch_size) > _LARGEST_PATCH_VOXELS:
            raise ValueError(f"patches of {self.patch_size} voxels are too large for any machine")
        if self.mirror_axes and not set(self.mirror_axes) <= set(range(self.dims)):
            raise ValueError(f"mirror_axes are {self.mirror_axes} of {self.dims} axes")
        if self.label_scheme is not None:
            unknown = {output.label for output in self.outputs} - {0, *self.label_scheme.labels.values()}
            if unknown:
                raise ValueError(f"outputs paint {sorted(unknown)}, for which label_scheme has no names")
        return self

    @property
    def input_channels(self) -> int:
        """Channels of the one tensor that the network is called with.

        Those of the image; for an inpainting network then the hole, and the mirrored image with where it is known.
        """
        return self.network.in_channels + {"none": 0, "hole": 1, "mirror": 2 + self.network.in_channels}[self.context]

    def preprocessing(self) -> PreprocessingConfig:
        """How a case is prepared for this network."""
        return PreprocessingConfig(
            spacing_mm=self.spacing_mm,
            orientation=self.orientation,
            normalisation=self.normalisation,
            ct_window=self.ct_window,
            ct_mean=self.ct_mean,
            ct_std=self.ct_std,
            crop=self.crop,
        )

    def scheme(self) -> LabelScheme:
        """The label scheme in which the outputs are defined.

        Raises:
            CheckpointError: the task is not segmentation.
        """
        if self.label_scheme is None:
            raise CheckpointError(f"a {self.task} model has no label scheme", expected="a segmentation model")
        return scheme_from_json(self.label_scheme.model_dump())

    def output_list(self) -> tuple[Output, ...]:
        """The outputs in painting order."""
        return tuple(Output(output.name, output.label, output.members or (output.label,)) for output in self.outputs)

    def to_json(self) -> dict[str, Any]:
        """The document written as `model.json`."""
        document = self.model_dump(mode="json")
        if self.export is None:
            del document["export"]
        if self.task != "inpainting":
            del document["context"]
        if self.task != "segmentation":
            for key in ("activation", "outputs", "label_scheme", "postprocessing"):
                del document[key]
        return document
