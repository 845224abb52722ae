"""MONAI bundles as model cards: the network, preparation, windows and painting that `configs/inference.json` describes.

Only `network_def`, `preprocessing`, `inferer`, `postprocessing` and the path of the weights are used. Everything else
that could change a mask (other handlers, code in `initialize`, modules of the bundle in `imports`) is refused by its
key. Nothing of the bundle is executed: see `segkit.checkpoint.bundle_config`; weights are read as tensors only.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from segkit.checkpoint.bundle_config import CONFIGS, METADATA, BundleConfig
from segkit.checkpoint.bundle_painting import read_painting
from segkit.checkpoint.card import (
    BundleCard,
    ModelCard,
    NetworkCard,
    PreprocessingCard,
    TrainingData,
)
from segkit.checkpoint.tensors import load_weights_file
from segkit.errors import CheckpointError, RequestError
from segkit.models.monai import NETWORKS, OF_THE_DATA, arguments_of
from segkit.models.table import build_model
from segkit.preparing.monai_transforms import (
    IMAGE,
    PREPARING,
    build_preparation,
    counterpart,
    has_spatial_transforms,
)
from segkit.reading.case import plain_name
from segkit.reading.files import file_sha256

_MODULES = ("glob", "ignite", "json", "monai", "numpy", "os", "pandas", "pathlib", "torch")
_IMPORT = re.compile(rf"\$import ({'|'.join(_MODULES)})( as \w+)?$")
_HARMLESS = re.compile(
    r"\$(setattr\(torch\.backends\.cudnn, 'benchmark', True\)|monai\.utils\.set_determinism\(seed=\d+\)"
    r"|@checkpointloader\(@evaluator\)( if @load_pretrain else None)?)$"
)
"""Expressions of `initialize` that change no mask; none is run."""
_HANDLERS = ("CheckpointLoader", "StatsHandler")

_FIXED = {
    "network": ("$@network_def.to(@device)", "@network_def", "$@network_def"),
    "evaluator::_target_": ("SupervisedEvaluator",),
    "evaluator::network": ("@network", "@network_def"),
    "evaluator::inferer": ("@inferer",),
    "evaluator::postprocessing": ("@postprocessing",),
    "dataset::transform": ("@preprocessing",),
    "load_pretrain": (True,),
}
"""Keys that connect the parts, with the values that may stand there; each may also be missing."""
_OF_EVALUATOR = (
    *("_target_", "device", "val_data_loader", "network", "inferer", "postprocessing", "val_handlers", "amp"),
    *("key_val_metric", "additional_metrics", "non_blocking"),
)

_LOADING = {
    "LoadImaged": ("reader", "image_only", "ensure_channel_first", "dtype"),
    "EnsureChannelFirstd": ("channel_dim", "strict_check"),
    "EnsureTyped": ("dtype", "data_type", "track_meta", "device"),
    "CastToTyped": ("dtype",),
}
"""Transforms that segkit's reading replaces, which gives channels first in float32."""
_FLOAT32 = ("$torch.float32", "$torch.float", "$numpy.float32", "$np.float32", "float32", "torch.float32", None)
_WITHOUT_EFFECT = ("keys", "device", "allow_missing_keys", "_desc_")

_OF_WINDOWS = ("roi_size", "overlap", "mode", "padding_mode", "cval", "sigma_scale")
_OF_SPEED = ("_target_", "sw_batch_size", "sw_device", "device", "progress", "cache_roi_weight_map", "cpu_thresh")
_PADDING = {"constant": "constant", "replicate": "edge", "reflect": "reflect", "circular": "wrap"}


def make_card(folder: Path) -> ModelCard:
    """The model card of a bundle.

    Raises:
        CheckpointError: the bundle does something that segkit does not do, with the key; or the weights are missing.
    """
    config = BundleConfig.read(folder, *CONFIGS)
    _require_plain_workflow(config)
    metadata = BundleConfig.read(folder, METADATA)
    network, dims = _network(config)
    transforms, image_key = _preparation(config)
    painting = read_painting(config, metadata, network, image_key, is_moved=has_spatial_transforms(transforms))
    if painting.order is not None:
        network = network.model_copy(update={"arguments": {**network.arguments, "output_order": painting.order}})
    windows, near = _windows(config, dims), counterpart(transforms, network.in_channels)
    without = tuple(f"preprocessing::{transforms[place]['_target_']}" for place in near.missing)
    try:
        return ModelCard(
            network=network,
            dims=dims,
            modalities=_modalities(metadata, network.in_channels),
            patch_size=windows.roi,
            overlap=windows.overlap,
            divisor=_divisor(network, dims),
            preprocessing=PreprocessingCard(**near.fields),
            segmentation=painting.segmentation,
            bundle=BundleCard(
                transforms=tuple(transforms),
                restores=painting.restores,
                blending=windows.blending,
                padding=windows.padding,
                sha256=file_sha256(config.file),
                without_counterpart=without,
            ),
            versions={"monai": str(metadata.raw("monai_version")), "bundle": str(metadata.raw("version"))},
            sha256=file_sha256(weights_path(folder, config)),
            training_data=TrainingData(identity=f"MONAI bundle {metadata.bundle_name}"),
        )
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise CheckpointError(
            f"describes a model that segkit does not accept ({problems})", where=config.file
        ) from error
    except RequestError as error:
        raise CheckpointError(f"network_def: {error.found}", where=config.file, remedy=error.remedy) from error


def read_bundle_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """The weights of a bundle by their names in segkit's network, and their file.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than tensors.
    """
    path = weights_path(folder, BundleConfig.read(folder, *CONFIGS))
    return {f"network.{name}": tensor for name, tensor in load_weights_file(path).items()}, path


def weights_path(folder: Path, config: BundleConfig) -> Path:
    """The file that the bundle's CheckpointLoader loads, by default `models/model.pt`; inside the bundle.

    Raises:
        CheckpointError: the file is missing or elsewhere.
    """
    handlers = [f"handlers::{place}" for place in range(len(config.raw("handlers") or []))]
    loaders = [key for key in ("checkpointloader", *handlers) if config.raw(f"{key}::_target_") == "CheckpointLoader"]
    key = f"{loaders[0]}::load_path" if loaders else "checkpointloader::load_path"
    name = config.literal(key) if loaders else "models/model.pt"
    path = (folder / str(name)).resolve()
    if not path.is_relative_to(folder.resolve()):
        config.refuse(key, name, "a file inside the bundle")
    if not path.is_file():
        raise CheckpointError(
            f"holds no {name}", where=folder, remedy="Download the weights: large_files.yml of the bundle names them"
        )
    return path


def _require_plain_workflow(config: BundleConfig) -> None:
    """Refuse what happens around the parts that are read, where it could change a mask."""
    for place, text in enumerate(config.raw("imports") or []):
        if not _IMPORT.match(str(text)):
            remedy = "If the parts that segkit reads do not need it, remove it in a copy of the bundle"
            config.refuse(f"imports::{place}", text, f"imports of {', '.join(_MODULES)} only", remedy)
    for place, text in enumerate(config.raw("initialize") or []):
        if not _HARMLESS.match(str(text)):
            config.refuse(f"initialize::{place}", text, "the checkpoint loader, determinism and cudnn settings only")
    for place, handler in enumerate(config.raw("handlers") or []):
        if not isinstance(handler, Mapping) or handler.get("_target_") not in _HANDLERS:
            config.refuse(f"handlers::{place}", handler, f"one of {', '.join(_HANDLERS)}")
    for key, values in _FIXED.items():
        if (found := config.raw(key)) is not None and found not in values:
            config.refuse(key, found, " or ".join(map(str, values)))
    for key in config.raw("evaluator") or {}:
        if key not in _OF_EVALUATOR:
            config.refuse(f"evaluator::{key}", config.raw(f"evaluator::{key}"), "no such key")


def _network(config: BundleConfig) -> tuple[NetworkCard, int]:
    """The network, and its number of spatial axes."""
    target = config.target("network_def", tuple(NETWORKS))
    definition = {**config.literal("network_def"), "_target_": target}
    definition.pop("_desc_", None)
    sizes = {
        name: definition.get(name, inspect.signature(NETWORKS[target]).parameters[name].default) for name in OF_THE_DATA
    }
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool):
            config.refuse(f"network_def::{name}", value, "a whole number")
    if (dims := sizes.pop("spatial_dims")) != 3:
        config.refuse("network_def::spatial_dims", dims, "3: bundles of pictures and of slices are not read")
    try:
        return NetworkCard(family="monai", **sizes, arguments={"network_def": arguments_of(definition)}), dims
    except ValidationError as error:
        config.refuse("network_def", error.errors()[0]["msg"], "a network of common size")


def _divisor(network: NetworkCard, dims: int) -> tuple[int, ...]:
    inputs, outputs = network.in_channels, network.out_channels
    with torch.device("meta"):
        return build_model("monai", in_channels=inputs, out_channels=outputs, dims=dims, **network.arguments).divisor


def _preparation(config: BundleConfig) -> tuple[list[dict[str, Any]], str]:
    """The transforms after loading, with literal arguments, and the bundle's key of the image."""
    image_key, transforms = None, []
    for key in config.steps("preprocessing"):
        name = config.target(key, (*_LOADING, *PREPARING))
        image_key = _require_keys(config, key, image_key)
        arguments = {}
        for argument in config.raw(key):
            if argument in ("_target_", *_WITHOUT_EFFECT):
                continue
            place, known = f"{key}::{argument}", _LOADING.get(name)
            if argument not in (PREPARING[name].arguments if known is None else known):
                config.refuse(place, config.raw(place), f"{name} without {argument}")
            if argument == "dtype" and config.raw(place) not in _FLOAT32:
                config.refuse(place, config.raw(place), "float32")
            if known is None:
                arguments[argument] = config.literal(place)
        if name in _LOADING:
            continue
        if "source_key" in arguments:
            if arguments["source_key"] != image_key:
                config.refuse(f"{key}::source_key", arguments["source_key"], str(image_key))
            arguments["source_key"] = IMAGE
        transforms.append({"_target_": name, **arguments})
        _require_usable(config, key, transforms[-1])
    return transforms, str(image_key)


def _require_usable(config: BundleConfig, key: str, transform: Mapping[str, Any]) -> None:
    """Refuse arguments of a transform that MONAI rejects, or accepts at first only."""
    axcodes, pixdim = transform.get("axcodes", "RAS"), transform.get("pixdim", 1.0)
    if not isinstance(axcodes, str) or not re.fullmatch("[RLAPSI]{3}", axcodes):
        config.refuse(f"{key}::axcodes", axcodes, "three letters, such as RAS")
    if not all(isinstance(mm, (int, float)) and mm > 0 for mm in (pixdim if isinstance(pixdim, list) else [pixdim])):
        config.refuse(f"{key}::pixdim", pixdim, "mm above 0")
    try:
        build_preparation([transform])
    except RequestError as error:
        config.refuse(key, error.found, error.expected or "arguments that MONAI accepts")


def _require_keys(config: BundleConfig, key: str, image_key: str | None) -> str:
    """The one key that a transform works on, which must be the same for all."""
    found = config.literal(f"{key}::keys")
    keys = found if isinstance(found, list) else [found]
    if len(keys) != 1 or not isinstance(keys[0], str) or image_key not in (None, keys[0]):
        config.refuse(f"{key}::keys", found, "one image, the same in all transforms")
    return keys[0]


@dataclass(frozen=True)
class _Windows:
    roi: tuple[int, ...]
    overlap: float
    blending: Literal["constant", "gaussian"]
    padding: Any


def _windows(config: BundleConfig, dims: int) -> _Windows:
    config.target("inferer", ("SlidingWindowInferer",))
    for key in config.raw("inferer"):
        if key not in (*_OF_WINDOWS, *_OF_SPEED):
            config.refuse(f"inferer::{key}", config.raw(f"inferer::{key}"), "no such key")
    given = {key: config.literal(f"inferer::{key}") for key in _OF_WINDOWS if config.raw(f"inferer::{key}") is not None}
    roi, overlap = given.get("roi_size"), given.get("overlap", 0.25)
    roi = [roi] * dims if isinstance(roi, int) else roi
    if not isinstance(roi, list) or len(roi) != dims or not all(isinstance(size, int) and size > 0 for size in roi):
        config.refuse("inferer::roi_size", roi, f"{dims} numbers of voxels above 0")
    if isinstance(overlap, list) and len(set(overlap)) == 1:
        overlap = overlap[0]
    if not isinstance(overlap, (int, float)) or not 0 <= overlap < 1:
        config.refuse("inferer::overlap", overlap, "one share from 0 to below 1 for all axes")
    mode, padding = given.get("mode", "constant"), given.get("padding_mode", "constant")
    for key, found, known in (("mode", mode, ("constant", "gaussian")), ("padding_mode", padding, tuple(_PADDING))):
        if found not in known:
            config.refuse(f"inferer::{key}", found, " or ".join(known))
    for key, usual in (("sigma_scale", 0.125), ("cval", 0)):
        if given.get(key, usual) != usual:
            config.refuse(f"inferer::{key}", given[key], f"{usual}")
    return _Windows(tuple(roi), float(overlap), mode, _PADDING[padding])


def _modalities(metadata: BundleConfig, channels: int) -> tuple[str, ...]:
    """Names of the input channels: those of `metadata.json`, a single one may lack a name."""
    inputs = metadata.raw("network_data_format::inputs")
    key = next(iter(inputs), IMAGE) if isinstance(inputs, Mapping) else IMAGE
    path = f"network_data_format::inputs::{key}::channel_def"
    names = metadata.channel_names(path)
    if len(names) != channels and channels == 1:
        return (IMAGE,)
    if len(names) != channels or len({plain_name(name) for name in names}) != channels:
        metadata.refuse(path, names, f"{channels} different names, as the network has {channels} inputs")
    return tuple(names)
