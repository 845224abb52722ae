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
Context = Literal["none", "hole", "mirror"]


_UNUSED: tuple[Any, ...] = (None, False, 0, "", "none", [], {})
"""Values by which a card says that a model does without something."""


class CardPart(Config):
    """A part of the card. An unknown key, such as a later version adds, is ignored where its value is unused.

    With any other value, a later version may compute the model in another way: the card is refused.
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
    arguments: Annotated[dict[str, Any], AfterValidator(_is_of_modest_size)] = Field(default_factory=dict)


class OutputCard(CardPart):
    """One output: its name, the label value it paints, the label values it covers (empty: only `label`)."""

    name: Name
    label: LabelValue
    members: tuple[LabelValue, ...] = ()


class SchemeCard(CardPart):
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


class GraphCard(CardPart):
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


class ExportCard(CardPart):
    """What `segkit export` wrote beside the card, and how it was checked."""

    opset: int
    graphs: tuple[GraphCard, ...] = Field(min_length=1)
    """fp32 first."""
    parity: dict[str, Any] = Field(default_factory=dict)
    """Largest logit difference to the trained network and Dice of the decoded masks, by backend."""


Part = Literal["component", "total"]
"""Each connected component by itself (voxels that touch at a corner are connected), or a region as a whole."""


class SizeRule(CardPart):
    """What of one output is too small to be believed, and what not believing it did on the validation cases."""

    output: str
    """Name of the output whose region is measured."""
    part: Part
    smallest_mm3: float = Field(gt=0)
    """Volumes below this are removed, in mm³; on pictures, which have no spacing, in pixels."""
    dice: tuple[float, float] | None = None
    """Mean Dice of the output, and of those inside it, before and after."""


class PostprocessingCard(CardPart):
    """Rules applied to a label map one after the other; `segkit.inference.postprocessing` applies them."""

    rules: tuple[SizeRule, ...]
    """Outer regions before those inside them."""
    cases: int = 0
    """Validation cases that the rules were chosen on."""


class PreprocessingCard(PreprocessingConfig):
    """How a case is prepared for the network; nothing is left to planning."""

    spacing_mm: tuple[Annotated[float, Field(ge=1e-3, le=1e3)], ...] | None = None
    orientation: str = Field(default="RAS", pattern="^[RLAPSIJKrlapsijk]{3}$")
    normalisation: Normalisation = "zscore-nonzero"
    crop: Crop = "nonzero"


class SegmentationCard(CardPart):
    """How logits become a label map, and how the training prepared the network for it."""

    mirror_axes: tuple[int, ...] | None = None
    """Axes that training mirrored, which test-time mirroring may use; null means all of them."""
    activation: Literal["sigmoid", "softmax"]
    outputs: tuple[OutputCard, ...] = ()
    """In painting order."""
    label_scheme: SchemeCard
    """The label scheme in which the outputs are defined."""
    postprocessing: PostprocessingCard | None = None
    """What is removed from a label map, chosen on the validation cases; null removes nothing."""
    modality_dropout: float = 0.0
    """Part of the training patches that lacked a modality; where it is 0, the network never was without one."""

    @model_validator(mode="after")
    def _paints_known_labels(self) -> SegmentationCard:
        unknown = {output.label for output in self.outputs} - {0, *self.label_scheme.labels.values()}
        if unknown:
            raise ValueError(f"outputs paint {sorted(unknown)}, for which label_scheme has no names")
        return self


class InpaintingCard(CardPart):
    """What an inpainting network is given besides the image, see `ModelCard.input_channels`."""

    context: Context = "none"


PARTS: dict[str, type[Config]] = {
    "preprocessing": PreprocessingCard,
    "segmentation": SegmentationCard,
    "inpainting": InpaintingCard,
}
"""Parts of the card whose keys lie beside each other in `model.json`."""


class ModelCard(CardPart):
    """The contents of `model.json`: everything needed to use the weights beside it.

    Sizes and patches are in voxels, spacings in mm, both in the axis order of `segkit.shapes` after orientation.
    The file has the keys of the parts `preprocessing`, `segmentation` and `inpainting` beside the others.
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
    preprocessing: PreprocessingCard
    """`spacing_mm` is the grid on which the network works; null keeps the spacing of the source."""
    segmentation: SegmentationCard | None = None
    """None for the other tasks."""
    inpainting: InpaintingCard | None = None
    """None for the other tasks."""
    versions: dict[str, str] = Field(default_factory=dict)
    sha256: Sha256 = ""
    """Digest of `model.safetensors`."""
    export: ExportCard | None = None
    """The ONNX files beside the card, where `segkit export` wrote it."""
    training_data: TrainingData

    @model_validator(mode="before")
    @classmethod
    def _sort_into_parts(cls, document: Any) -> Any:
        """The keys of `model.json` in the parts that the task has; those of other tasks are left out."""
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
            if values and len(values) != self.dims:  # of a network that is yet to be built, sizes are not known
                raise ValueError(f"{key} has {len(values)} values for {self.dims} axes")
        spacing_mm = self.preprocessing.spacing_mm
        if spacing_mm is not None and len(spacing_mm) not in (self.dims, 3):  # slices of a volume have 3
            raise ValueError(f"spacing_mm has {len(spacing_mm)} values for {self.dims} axes")
        if prod(self.patch_size) > _LARGEST_PATCH_VOXELS:
            raise ValueError(f"patches of {self.patch_size} voxels are too large for any machine")
        mirror_axes = None if self.segmentation is None else self.segmentation.mirror_axes
        if mirror_axes and not set(mirror_axes) <= set(range(self.dims)):
            raise ValueError(f"mirror_axes are {mirror_axes} of {self.dims} axes")
        return self

    @property
    def input_channels(self) -> int:
        """Channels of the one tensor that the network is called with.

        Those of the image; for an inpainting network then the hole, and the mirrored image with where it is known.
        """
        channels = self.network.in_channels
        return channels + {"none": 0, "hole": 1, "mirror": 2 + channels}[self.context]

    @property
    def context(self) -> Context:
        """What the network is given besides the image; "none" unless the task is inpainting."""
        return "none" if self.inpainting is None else self.inpainting.context

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
        return scheme_from_json(self._segmentation().label_scheme.model_dump())

    def with_postprocessing(self, rules: PostprocessingCard | None) -> ModelCard:
        """The card with other rules for its label maps.

        Raises:
            CheckpointError: the task is not segmentation.
        """
        segmentation = self._segmentation().model_copy(update={"postprocessing": rules})
        return self.model_copy(update={"segmentation": segmentation})

    def _segmentation(self) -> SegmentationCard:
        if self.segmentation is None:
            raise CheckpointError(f"a {self.task} model has no label scheme", expected="a segmentation model")
        return self.segmentation

    def to_json(self) -> dict[str, Any]:
        """The document written as `model.json`."""
        unused: dict[str, Any] = {"mirror_axes": None}
        if self.task == "segmentation":
            unused |= {"activation": None, "outputs": [], "label_scheme": None, "postprocessing": None}
        elif self.task == "inpainting":
            unused["context"] = self.context
        unused["modality_dropout"] = 0.0
        document: dict[str, Any] = {}
        for key, value in self.model_dump(mode="json", exclude={"inpainting"}).items():
            if key == "preprocessing":
                crop = value.pop("crop")
                document |= {**value, "crop": crop}
            elif key == "segmentation":
                document |= value or unused
            elif key != "export" or value is not None:
                document[key] = value
        return document
