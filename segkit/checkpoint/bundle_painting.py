"""The `postprocessing` of a MONAI bundle: how the outputs of its network become a label map."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from segkit.checkpoint.bundle_config import BundleConfig
from segkit.checkpoint.card import NetworkCard, OutputCard, SchemeCard, SegmentationCard
from segkit.labels import SCHEMES

_BRATS_LAMBDA = "$lambda x: torch.where(x[[2]] > 0, 4, torch.where(x[[0]] > 0, 1, torch.where(x[[1]] > 0, 2, 0)))"
"""How brats_mri_segmentation paints its outputs TC, WT, ET."""
_BRATS_ORDER = (1, 0, 2)
_BRATS_OUTPUTS = (("WT", 2, (1, 2, 4)), ("TC", 1, (1, 4)), ("ET", 4, (4,)))
_BRATS_SCHEME = SCHEMES["brats2017"]

_OF_INVERSION = (
    *("_target_", "keys", "transform", "orig_keys", "meta_keys", "orig_meta_keys", "meta_key_postfix"),
    *("nearest_interp", "to_tensor", "device"),
)
_OF_SAVING = (
    *("_target_", "keys", "meta_keys", "output_dir", "output_ext", "output_dtype", "output_postfix", "dtype"),
    *("separate_folder", "data_root_dir", "resample", "squeeze_end_dims", "print_log"),
)
_MOST_LABELS = 256

Activation: TypeAlias = Literal["sigmoid", "softmax"]
Restores: TypeAlias = Literal["logits", "probabilities", "labels"]


@dataclass(frozen=True)
class Painting:
    """How logits become a mask; `order` is the position in the bundle's output of each output of `segmentation`."""

    segmentation: SegmentationCard
    restores: Restores
    order: tuple[int, ...] | None


def read_painting(
    config: BundleConfig, metadata: BundleConfig, network: NetworkCard, image_key: str, *, is_moved: bool
) -> Painting:
    """The painting of `postprocessing`, in which each kind of transform may be once.

    `is_moved`: the preprocessing changes the grid.

    Raises:
        CheckpointError: a transform or an argument is not known, or its place in the list.
    """
    activation: Activation = "softmax"
    restores: Restores = "logits"
    done: dict[str, str] = {}
    for key in config.steps("postprocessing"):
        name = config.target(key, ("Activationsd", "Invertd", "AsDiscreted", "Lambdad", "SaveImaged"))
        if name in done or "SaveImaged" in done:
            config.refuse(key, name, f"one {name}, before SaveImaged")
        if (keys := config.literal(f"{key}::keys")) not in ("pred", ["pred"]):
            config.refuse(f"{key}::keys", keys, "pred")
        if name == "Activationsd":
            activation = _activation(config, key, done)
        elif name == "Invertd":
            restores = "labels" if "AsDiscreted" in done else "probabilities" if done else "logits"
            _require_inversion(config, key, image_key, of_labels=restores == "labels", is_moved=is_moved)
        elif name == "AsDiscreted":
            _require_decision(config, key, activation, done)
        elif name == "Lambdad":
            func = config.raw(f"{key}::func")
            if func != _BRATS_LAMBDA or activation != "sigmoid" or list(done)[-1:] != ["AsDiscreted"]:
                config.refuse(f"{key}::func", func, f"after a threshold of sigmoid outputs, exactly {_BRATS_LAMBDA}")
        else:
            config.require_arguments(key, _OF_SAVING)
        done[name] = key
    if is_moved and "Invertd" not in done:
        config.refuse("postprocessing::transforms", "without Invertd", "Invertd, as the preprocessing changes the grid")
    if "AsDiscreted" not in done:
        config.refuse("postprocessing::transforms", "without AsDiscreted", "AsDiscreted")
    if activation == "sigmoid" and restores == "labels":
        config.refuse(done["Invertd"], "after AsDiscreted", "Invertd of the outputs of a sigmoid before the threshold")
    if "Lambdad" in done:
        segmentation, order = _of_brats(config, network), _BRATS_ORDER
    else:
        segmentation, order = _of_classes(config, metadata, network, activation), None
    return Painting(segmentation, restores, order)


def _activation(config: BundleConfig, key: str, done: Mapping[str, str]) -> Activation:
    config.require_arguments(key, ("_target_", "keys", "sigmoid", "softmax"))
    used = [name for name in ("sigmoid", "softmax") if config.literal(f"{key}::{name}")]
    if len(used) != 1 or "AsDiscreted" in done:
        config.refuse(key, used, "either sigmoid or softmax, before AsDiscreted")
    return "sigmoid" if used == ["sigmoid"] else "softmax"


def _require_decision(config: BundleConfig, key: str, activation: str, done: Mapping[str, str]) -> None:
    config.require_arguments(key, ("_target_", "keys", "argmax", "threshold"))
    argmax, threshold = config.literal(f"{key}::argmax"), config.literal(f"{key}::threshold")
    if activation == "softmax" and not (argmax is True and threshold is None):
        config.refuse(key, config.raw(key), "argmax: true")
    if activation == "sigmoid" and (argmax or threshold != 0.5 or "Activationsd" not in done):
        config.refuse(key, config.raw(key), "threshold: 0.5 after a sigmoid")


def _require_inversion(config: BundleConfig, key: str, image_key: str, *, of_labels: bool, is_moved: bool) -> None:
    config.require_arguments(key, _OF_INVERSION)
    if config.raw(f"{key}::transform") not in ("@preprocessing", "$@preprocessing"):
        config.refuse(f"{key}::transform", config.raw(f"{key}::transform"), "@preprocessing")
    original = config.literal(f"{key}::orig_keys")
    if original not in (image_key, [image_key]):
        config.refuse(f"{key}::orig_keys", original, image_key)
    nearest = config.literal(f"{key}::nearest_interp")
    if is_moved and nearest not in (of_labels, [of_labels], *((None,) if of_labels else ())):
        expected = f"{str(of_labels).lower()}: " + (
            "after AsDiscreted, values between those of two labels would be labels of neither"
            if of_labels
            else "before AsDiscreted, probabilities are interpolated"
        )
        config.refuse(f"{key}::nearest_interp", nearest, expected, "Correct it in a copy of the bundle, or use MONAI")


def _of_brats(config: BundleConfig, network: NetworkCard) -> SegmentationCard:
    if network.out_channels != len(_BRATS_OUTPUTS):
        config.refuse("network_def::out_channels", network.out_channels, "3: TC, WT and ET")
    return SegmentationCard(
        mirror_axes=(),
        activation="sigmoid",
        outputs=tuple(OutputCard(name=name, label=value, members=of) for name, value, of in _BRATS_OUTPUTS),
        label_scheme=SchemeCard(name=_BRATS_SCHEME.name, labels=dict(_BRATS_SCHEME.values)),
    )


def _of_classes(
    config: BundleConfig, metadata: BundleConfig, network: NetworkCard, activation: Activation
) -> SegmentationCard:
    """The classes of a softmax, or the label 1 of a single sigmoid, with their names in `metadata.json`."""
    count, first = network.out_channels, int(activation == "sigmoid")
    if count > _MOST_LABELS or (first and count > 1):
        expected = f"at most {_MOST_LABELS} classes, or one output of a sigmoid"
        config.refuse("network_def::out_channels", count, expected, "Paint the outputs as brats_mri_segmentation does")
    names = metadata.channel_names("network_data_format::outputs::pred::channel_def")[-count:]
    names += [f"class_{place}" for place in range(len(names), count)]
    names = [name if names.count(name) == 1 else f"{name}_{place}" for place, name in enumerate(names)]
    return SegmentationCard(
        mirror_axes=(),
        activation=activation,
        outputs=tuple(OutputCard(name=name, label=value) for value, name in enumerate(names, start=first)),
        label_scheme=SchemeCard(
            name=metadata.bundle_name,
            labels={name: value for value, name in enumerate(names, start=first) if value},
        ),
    )
