"""The model card `model.json`, which describes a weight file and how to use it.

Cards are untrusted: their numbers are limited before anything is built from them, and files must be in their folder.
"""

from __future__ import annotations

import json
from math import prod
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from segkit.config import Config
from segkit.errors import CheckpointError
from segkit.labels import LabelScheme, Output, scheme_from_json
from segkit.preparing.nnunet import NnUnetConfig
from segkit.preparing.preprocessing import Crop, Normalisation, PreprocessingConfig
from segkit.reading.case import is_file_name

_LARGEST_ARGUMENT = 8192
"""Above any width, depth or number of steps: a larger network could fill the memory before weights are read."""
_MOST_CHANNELS = 1024
_LARGEST_PATCH_VOXELS = 2**30


def _beside(name: str) -> str:
    if not is_file_name(name):
        raise ValueError(f"{name!r} is not the name of a file beside the card")
    return name


def _printable(name: str) -> str:
    if not name or not name.isprintable():
        raise ValueError(f"{name!r} is not a printable name")
    return name


def _of_modest_size(arguments: dict[str, Any]) -> dict[str, Any]:
    left: list[Any] = [*arguments.values()]
    for _ in range(_LARGEST_ARGUMENT):
        if not left:
            return arguments
        value = left.pop()
        if isinstance(value, (list, tuple, dict)):
            left += value.values() if isinstance(value, dict) else value
        elif isinstance(value, (int, float)) and not -_LARGEST_ARGUMENT <= value <= _LARGEST_ARGUMENT:
            raise ValueError(f"no network is built with {value}")
    raise ValueError(f"holds more than {_LARGEST_ARGUMENT} values")


FileName = Annotated[str, AfterValidator(_beside)]
Name = Annotated[str, AfterValidator(_printable)]
LabelValue = Annotated[int, Field(ge=0, le=255)]
Sha256 = Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]
Size = Annotated[int, Field(ge=1, le=65536)]
Context = Literal["none", "hole", "mirror"]
Fill = Literal["constant", "biharmonic", "mirrored-detail"]
"""What an inpainting network sees in a hole: 0; a smooth fill; that with detail of the mirrored image."""
Blending = Literal["gaussian", "constant"]
"""Weights of a window's voxels where windows overlap."""
Padding = Literal["constant", "edge", "reflect", "wrap"]
"""Voxels around a volume that is smaller than the window: 0, or a mode of `numpy.pad`."""

_UNUSED: tuple[Any, ...] = (None, False, 0, "", "none", [], {})
"""Values of a key whose feature the model does not use."""


class CardPart(Config):
    """A part of the card. Unknown keys, such as those of a later version, are ignored if their value is unused.

    With any other value the later version may compute the model differently, so the card is refused.
    """

    @model_validator(mode="before")
    @classmethod
    def _ignore_unused(cls, document: Any) -> Any:
        if not isinstance(document, dict):
            return document
        return {key: value for key, value in document.items() if key in cls.model_fields or value not in _UNUSED}


class NetworkCard(CardPart):
    """The network to build: a family and size of `segkit models`, its channels and its other arguments."""

    family: str
    size: str | None = None
    in_channels: int = Field(ge=1, le=_MOST_CHANNELS)
    out_channels: int = Field(ge=1, le=_MOST_CHANNELS)
    arguments: Annotated[dict[str, Any], AfterValidator(_of_modest_size)] = Field(default_factory=dict)


class OutputCard(CardPart):
    """One output: its name, the label value it paints, the label values it covers (empty: only `label`)."""

    name: Name
    label: LabelValue
    members: tuple[LabelValue, ...] = ()


class SchemeCard(CardPart):
    """The label scheme of the training data: tissue names with their values, background left out."""

    name: Name
    labels: dict[Name, LabelValue]
    ignore: LabelValue | None = None
    """Value of voxels of unknown tissue in the references."""


class TrainingData(Config):
    """What the weights were trained on; other facts (fold, seed ...) may be added."""

    model_config = ConfigDict(extra="allow")

    identity: str
    """Name or digest of the data."""
    licence: str | None = None
    cases: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the forward pass: a GPU infers in it."""


class GraphCard(CardPart):
    """One ONNX file of an export: one window in, logits out."""

    file: FileName
    precision: Literal["fp32", "fp16", "int8"]
    sha256: dict[FileName, Sha256]
    """Digests by name: of `file` and of its files of external data."""
    dice_change: float | None = None
    """Mean Dice minus that of fp32 on the cases of the export; null if not measured."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Seconds per window by backend, measured at export."""
    is_approved: bool = True
    """Whether `--backend auto` may use it: fast and accurate enough, as fp32 always is."""


class ExportCard(CardPart):
    """The graphs of `segkit export` in the folder of the card, and their checks."""

    opset: int
    graphs: tuple[GraphCard, ...] = Field(min_length=1)
    """fp32 first."""
    parity: dict[str, Any] = Field(default_factory=dict)
    """`segkit.inference.parity.Parity` by backend, and the seconds of torch."""


Part = Literal["component", "total"]
"""Each connected component (voxels that touch at a corner are connected), or a region as a whole."""


class SizeRule(CardPart):
    """Removal of small parts of one output, and its effect on the validation cases."""

    output: str
    part: Part
    smallest_mm3: float = Field(gt=0)
    """Smaller volumes are removed, in mm³; on pictures in pixels."""
    dice: tuple[float, float] | None = None
    """Mean Dice of the output and those inside it, before and after."""


class PostprocessingCard(CardPart):
    """Rules for label maps in their order, outer regions first; see `segkit.inference.postprocessing`."""

    rules: tuple[SizeRule, ...]
    cases: int = 0
    """Number of validation cases on which the rules were chosen."""


class PreprocessingCard(PreprocessingConfig):
    """How a case is prepared for the network, without the choices that are left to planning."""

    spacing_mm: tuple[Annotated[float, Field(ge=1e-3, le=1e3)], ...] | None = None
    orientation: str = Field(default="RAS", pattern="^[RLAPSIJKrlapsijk]{3}$")
    normalisation: Normalisation | None = "zscore-nonzero"
    crop: Crop = "nonzero"


class SegmentationCard(CardPart):
    """How logits become a label map, and what the training prepared the network for."""

    mirror_axes: tuple[int, ...] | None = None
    """Axes that training mirrored, so test-time augmentation may; null means all of them."""
    activation: Literal["sigmoid", "softmax"]
    outputs: tuple[OutputCard, ...] = ()
    """In painting order."""
    label_scheme: SchemeCard
    postprocessing: PostprocessingCard | None = None
    """Chosen on the validation cases."""
    modality_dropout: float = 0.0
    """Share of the training patches without one of the modalities."""

    @model_validator(mode="after")
    def _paints_known_labels(self) -> SegmentationCard:
        unknown = {output.label for output in self.outputs} - {0, *self.label_scheme.labels.values()}
        if unknown:
            raise ValueError(f"outputs paint {sorted(unknown)}, for which label_scheme has no names")
        return self


class InpaintingCard(CardPart):
    """The input of an inpainting network: what it sees in a hole, and further channels (`ModelCard.input_channels`)."""

    context: Context = "none"
    fill: Fill = "biharmonic"


class BundleCard(CardPart):
    """What a MONAI bundle does otherwise than segkit, see `segkit.checkpoint.monai_bundle`."""

    transforms: tuple[dict[str, Any], ...]
    """MONAI's dictionary transforms that prepare an image: `_target_` and literal arguments each."""
    restores: Literal["logits", "probabilities", "labels"]
    """What is brought back to the grid of the input."""
    blending: Blending
    padding: Padding
    sha256: Sha256
    """Digest of the configuration file."""
    without_counterpart: tuple[str, ...] = ()
    """Keys of transforms that `preprocessing` of the card cannot express: it is then near to them only."""


PARTS: dict[str, type[Config]] = {
    "preprocessing": PreprocessingCard,
    "segmentation": SegmentationCard,
    "inpainting": InpaintingCard,
}
"""Parts of the card that are not nested in `model.json`: their keys are on its top level."""


class ModelCard(CardPart):
    """The contents of `model.json`.

    Sizes and patches are in voxels, spacings in mm, both in the axis order of `segkit.shapes` after orientation.
    In the file the keys of `preprocessing`, `segmentation` and `inpainting` are on the top level.
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
    """Sizes of windows must be multiples of this."""
    preprocessing: PreprocessingCard
    segmentation: SegmentationCard | None = None
    inpainting: InpaintingCard | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    sha256: Sha256 = ""
    """Digest of `model.safetensors`."""
    export: ExportCard | None = None
    bundle: BundleCard | None = None
    nnunet: NnUnetConfig | None = None
    """How nnU-Net prepares cases for its models; `preprocessing` is then near to it only."""
    training_data: TrainingData

    @model_validator(mode="before")
    @classmethod
    def _sort_into_parts(cls, document: Any) -> Any:
        """Move the keys of `model.json` into the parts of the task; those of other tasks are dropped."""
        if not isinstance(document, dict):
            return document
        in_parts = dict(document)
        for name, part in PARTS.items():
            if isinstance(document.get(name), Config):
                continue
            if document.get(name) is not None:
                raise ValueError(f"`{name}` is not a key of a model card")
            keys = {key: in_parts.pop(key) for key in part.model_fields if key in document}
            is_used = name != "segmentation" or any(value not in _UNUSED for value in keys.values())
            if is_used and name in ("preprocessing", document.get("task", "segmentation")):
                in_parts[name] = keys
        return in_parts

    @model_validator(mode="after")
    def _agrees(self) -> ModelCard:
        for key, values in {"patch_size": self.patch_size, "divisor": self.divisor}.items():
            if values and len(values) != self.dims:  # empty before the network is built
                raise ValueError(f"{key} has {len(values)} values for {self.dims} axes")
        spacing_mm = self.preprocessing.spacing_mm
        if spacing_mm is not None and len(spacing_mm) not in (self.dims, 3):  # 3 for slices of volumes
            raise ValueError(f"spacing_mm has {len(spacing_mm)} values for {self.dims} axes")
        if prod(self.patch_size) > _LARGEST_PATCH_VOXELS:
            raise ValueError(f"patches of {self.patch_size} voxels are too large for any machine")
        mirror_axes = None if self.segmentation is None else self.segmentation.mirror_axes
        if mirror_axes and not set(mirror_axes) <= set(range(self.dims)):
            raise ValueError(f"mirror_axes are {mirror_axes} of {self.dims} axes")
        return self

    @property
    def input_channels(self) -> int:
        """Channels of the network's input: the image and, for inpainting, its `context`.

        Context hole adds the hole; mirror adds the hole, the mirrored image and the mask of its known voxels.
        """
        channels = self.network.in_channels
        return channels + {"none": 0, "hole": 1, "mirror": 2 + channels}[self.context]

    @property
    def context(self) -> Context:
        """Further input of an inpainting network; "none" for other tasks."""
        return "none" if self.inpainting is None else self.inpainting.context

    @property
    def fill(self) -> Fill:
        """What an inpainting network sees in a hole."""
        return "biharmonic" if self.inpainting is None else self.inpainting.fill

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The outputs in painting order; none unless the task is segmentation."""
        outputs = () if self.segmentation is None else self.segmentation.outputs
        return tuple(Output(output.name, output.label, output.members or (output.label,)) for output in outputs)

    def scheme(self) -> LabelScheme:
        """The label scheme in which the outputs are defined.

        Raises:
            CheckpointError: the task is not segmentation.
        """
        if self.segmentation is None:
            raise CheckpointError(f"a {self.task} model has no label scheme", expected="a segmentation model")
        return scheme_from_json(self.segmentation.label_scheme.model_dump())

    def with_postprocessing(self, rules: PostprocessingCard | None) -> ModelCard:
        """The card of a segmentation model with other rules for its label maps."""
        segmentation = self.segmentation and self.segmentation.model_copy(update={"postprocessing": rules})
        return self.model_copy(update={"segmentation": segmentation})

    def to_text(self) -> str:
        """The text of `model.json`; NaN and infinity, which JSON does not have, are null."""
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_json(self) -> dict[str, Any]:
        """The document written as `model.json`."""
        unused: dict[str, Any] = {"mirror_axes": None}
        if self.task == "segmentation":
            unused |= {"activation": None, "outputs": [], "label_scheme": None, "postprocessing": None}
        elif self.task == "inpainting":
            unused["context"] = self.context
            if self.fill != "biharmonic":  # which earlier versions read
                unused["fill"] = self.fill
        unused["modality_dropout"] = 0.0
        document: dict[str, Any] = {}
        for key, value in self.model_dump(mode="json", exclude={"inpainting"}).items():
            if key == "preprocessing":
                crop = value.pop("crop")
                document |= {**value, "crop": crop}
            elif key == "segmentation":
                if value and value["label_scheme"]["ignore"] is None:
                    del value["label_scheme"]["ignore"]
                document |= value or unused
            elif key not in ("export", "bundle", "nnunet") or value is not None:
                document[key] = value
        return document
