"""Model cards of nnU-Net's results: the networks of its plans and trainers as those of segkit."""

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor

from segkit.checkpoint.card import (
    ModelCard,
    NetworkCard,
    PreprocessingCard,
    SchemeCard,
    SegmentationCard,
    TrainingData,
)
from segkit.checkpoint.nnunet import Results, numbered, plans_understood
from segkit.checkpoint.tensors import named_tensors, read_torch
from segkit.errors import CheckpointError
from segkit.models.stunet import SIZES
from segkit.preparing.nnunet import NnUnetConfig, ResamplingConfig
from segkit.reading.files import file_sha256

_FAMILIES = {"PlainConvUNet": "plainunet", "ResidualEncoderUNet": "resencunet"}
"""Class names in plans -> families of `segkit models`."""
_FIRST = (
    "conv_blocks_context.0.0.conv1.weight",
    "encoder.stem.convs.0.conv.weight",
    "encoder.stages.0.0.convs.0.conv.weight",
)
"""The first kernel of a STU-Net, a ResidualEncoderUNet and a PlainConvUNet."""
_HEAD = re.compile(r"(decoder\.seg_layers|seg_outputs)\.\d+\.weight")
_ARGUMENTS = {
    *("n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage"),
    *("n_conv_per_stage_decoder", "conv_bias", "norm_op", "norm_op_kwargs", "nonlin", "nonlin_kwargs", "block"),
    *("bottleneck_channels", "stem_channels"),
    # Without effect on the trained network: on the training only.
    *("dropout_op", "dropout_op_kwargs", "stochastic_depth_p", "deep_supervision"),
}
"""Arguments of the networks that segkit has too."""
_PARTS = {
    "conv_op": "Conv.d",
    "norm_op": "(Instance|Batch)Norm.d",
    "nonlin": "(Leaky)?ReLU",
    "block": "(BasicBlock|Bottleneck)D",
}
"""Patterns of the classes of the networks' parts that segkit has too."""
_CHOSEN = ("force_separate_z", "separate_z_anisotropy_threshold", "num_threads", "device")
"""Arguments of resampling that plans may choose; the last two change no result."""
_RESAMPLED = {"order_z": 0, "memefficient_seg_resampling": False, "mode": "linear", "aniso_axis_mode": "nearest-exact"}
"""The only values of the others."""

_STEPS = 5
"""Downsampling steps of every STU-Net."""


def make_card(results: Results) -> ModelCard:
    """The model card of the first fold of a results folder, from its plans and the shapes of its tensors.

    `preprocessing.normalisation` is null where segkit has no such normalisation for all channels.

    Raises:
        CheckpointError: the network is not known, or plans and weights do not belong together.
    """
    path, configuration = results.checkpoints[0], results.configuration
    with plans_understood(path):
        tensors = named_tensors(read_torch(path, is_mapped=True), path)
        network = _network(tensors, results)
        more = len(results.foreground) if results.previous_stage else 0
        channels = (network.in_channels, len(results.channels) + more, "image channels")
        for found, expected, what in (channels, (network.out_channels, len(results.outputs), "outputs")):
            if found != expected:
                sentence = f"the network has {found} {what}, but its dataset.json names {expected}"
                remedy = "Copy the results folder again: checkpoint and dataset.json do not belong together"
                raise CheckpointError(sentence, where=path, remedy=remedy)
        reader, transpose = str(results.plans["image_reader_writer"]), results.plans["transpose_forward"]
        stored = "RAS" if "WithReorient" in reader else "IJK"
        orientation = "".join(stored[::-1][int(axis)] for axis in transpose)
        dataset = results.dataset
        return ModelCard(
            network=network,
            dims=2 if results.dims == 2 else 3,
            modalities=results.channels,
            patch_size=tuple(int(size) for size in configuration["patch_size"]),
            divisor=tuple(prod(axis) for axis in zip(*network.arguments["strides"], strict=True)),
            preprocessing=PreprocessingCard(
                spacing_mm=tuple(float(mm) for mm in configuration["spacing"]),
                orientation=orientation,
                crop="nonzero",
                **_normalisation(results),
            ),
            segmentation=SegmentationCard(
                mirror_axes=results.mirror_axes,
                activation="sigmoid" if results.has_regions else "softmax",
                outputs=results.outputs,
                label_scheme=SchemeCard.model_validate(results.scheme.to_json()),
            ),
            nnunet=_preparation(results),
            versions={"nnunet": str(results.version), "trainer": results.trainer},
            sha256=file_sha256(path),
            training_data=TrainingData(
                identity=f"nnU-Net: {results.plans['dataset_name']}",
                licence=str(dataset.get("licence") or dataset.get("license") or "") or None,
                cases=int(dataset.get("numTraining") or 0),
            ),
        )


def _preparation(results: Results) -> NnUnetConfig:
    plans, configuration = results.plans, results.configuration
    return NnUnetConfig(
        reader=str(plans["image_reader_writer"]).rpartition(".")[2],
        transpose_forward=tuple(int(axis) for axis in plans["transpose_forward"]),
        normalization_schemes=tuple(str(name).rpartition(".")[2] for name in configuration["normalization_schemes"]),
        use_mask_for_norm=tuple(map(bool, configuration["use_mask_for_norm"])),
        intensities=tuple(intensities(results)),
        **{kind: _resampling(results, kind) for kind in ("data", "seg", "probabilities")},
        previous_stage=results.previous_stage,
        previous_labels=results.foreground if results.previous_stage else (),
    )


def _resampling(results: Results, kind: str) -> ResamplingConfig:
    function = str(results.configuration.get(f"resampling_fn_{kind}", "resample_data_or_seg_to_shape"))
    given = dict(results.configuration.get(f"resampling_fn_{kind}_kwargs") or {})
    order = int(given.get("order", 3)) if kind == "data" else 1
    usual = {**_RESAMPLED, "is_seg": kind == "seg", "order": order}
    odd = [f"{key} {value}" for key, value in given.items() if key not in _CHOSEN and value != usual.get(key)]
    if odd:
        found, remedy = f"resamples {kind} with {', '.join(odd)}", "Segment with nnU-Net itself"
        expected = ", ".join(f"{key} {value}" for key, value in usual.items())
        raise CheckpointError(found, where=results.checkpoints[0], expected=expected, remedy=remedy)
    options = {key: given[key] for key in _CHOSEN[:2] if key in given}
    return ResamplingConfig(function=function.rpartition(".")[2], order=order, **options)


def _network(tensors: Mapping[str, Tensor], results: Results) -> NetworkCard:
    """The network of these tensors. STU-Net is known by its names: its plans name another network."""
    where, configuration = results.checkpoints[0], results.configuration
    is_stunet = "conv_blocks_context.0.0.conv1.weight" in tensors
    name = "STU-Net" if is_stunet else _class_name(configuration)
    family = "stunet" if is_stunet else _FAMILIES.get(name)
    if family is None:
        expected, remedy = f"STU-Net or one of {', '.join(_FAMILIES)}", "Segment with nnU-Net itself"
        raise CheckpointError(f"the network {name} is not known", where=where, expected=expected, remedy=remedy)
    first = next((tensors[key] for key in _FIRST if key in tensors), None)
    heads = [tensor for key, tensor in tensors.items() if _HEAD.fullmatch(key)]
    if first is None or not heads or first.dim() != results.dims + 2:
        raise CheckpointError(f"holds no {name} of {results.dims} axes", where=where, expected="that of its plans")
    arguments = _stunet(tensors, configuration) if is_stunet else _arguments(results, name, tensors)
    size = next((size for size, values in SIZES.items() if is_stunet and values.items() <= arguments.items()), None)
    if size is not None:
        arguments = {"strides": arguments["strides"]}
    channels = {"in_channels": first.shape[1], "out_channels": heads[-1].shape[0]}
    return NetworkCard(family=family, size=size or ("B" if is_stunet else None), arguments=arguments, **channels)


def _stunet(tensors: Mapping[str, Tensor], configuration: Mapping[str, Any]) -> dict[str, Any]:
    depth = sum(name.startswith("conv_blocks_context.0.") and name.endswith(".conv1.weight") for name in tensors)
    strides = configuration.get("pool_op_kernel_sizes") or configuration["architecture"]["arch_kwargs"]["strides"]
    # Cut, or extended with ones, to the steps of a STU-Net, as its trainers do.
    given = [tuple(int(step) for step in stride) for stride in strides[1:]][:_STEPS]
    strides = (*given, *((1, 1, 1),) * (_STEPS - len(given)))
    return {"strides": strides, "width": tensors[_FIRST[0]].shape[0], "depth": depth}


def _class_name(configuration: Mapping[str, Any]) -> str:
    """Without its module, which has moved between versions."""
    named = configuration.get("architecture", {}).get("network_class_name") or configuration["UNet_class_name"]
    return str(named).rpartition(".")[2]


def _arguments(results: Results, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of segkit's network, each given for all stages."""
    given = _given(results.configuration)
    strides = given["strides"]
    parts = {key: str(given.get(key) or "").rpartition(".")[2] for key in _PARTS}
    first, *further = (_each(stride, results.dims) for stride in strides)
    odd = [key for key, value in given.items() if key not in _ARGUMENTS and value not in (None, False, 0)]
    odd += ["a stride in the first stage"] * (set(first) != {1})
    odd += [f"{key} {part}" for key, part in parts.items() if part and not re.fullmatch(_PARTS[key], part)]
    odd += ["another eps"] * (float((given.get("norm_op_kwargs") or {}).get("eps", 1e-5)) != 1e-5)
    if odd:
        found, remedy = f"{name} has {', '.join(odd)}, which segkit lacks", "Segment with nnU-Net itself"
        raise CheckpointError(found, where=results.checkpoints[0], remedy=remedy)
    stages, slope = len(strides), float((given.get("nonlin_kwargs") or {}).get("negative_slope", 0.01))
    arguments = {
        "widths": _each(given["features_per_stage"], stages),
        "blocks": _each(given.get("n_blocks_per_stage") or given["n_conv_per_stage"], stages),
        "decoder_blocks": _each(given["n_conv_per_stage_decoder"], stages - 1),
        "strides": tuple(further),
        "kernels": tuple(_each(kernel, results.dims) for kernel in _each(given["kernel_sizes"], stages)),
        "bias": bool(given.get("conv_bias", False)),
        "slope": 0.0 if parts["nonlin"] == "ReLU" else slope,
        # nnUNetTrainerBN: the plans name instance norm.
        "norm": "batch" if any(key.endswith(".running_mean") for key in tensors) else "instance",
    }
    if parts["block"] == "BottleneckD":
        arguments["bottleneck_widths"] = _each(given["bottleneck_channels"], stages)
    if given.get("stem_channels"):
        arguments["stem_width"] = int(given["stem_channels"])
    return arguments


def _given(configuration: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of nnU-Net's network; those of plans before version 2.4 in the same form."""
    if architecture := configuration.get("architecture"):
        given: Mapping[str, Any] = architecture["arch_kwargs"]
        return given
    base, most = int(configuration["UNet_base_num_features"]), int(configuration["unet_max_num_features"])
    return {
        "features_per_stage": [
            min(base * 2**stage, most) for stage in range(len(configuration["pool_op_kernel_sizes"]))
        ],
        "kernel_sizes": configuration["conv_kernel_sizes"],
        "strides": configuration["pool_op_kernel_sizes"],
        "n_conv_per_stage": configuration["n_conv_per_stage_encoder"],
        "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
        "conv_bias": True,
    }


def _each(value: Any, count: int) -> tuple[Any, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)


def _normalisation(results: Results) -> dict[str, Any]:
    """The settings of segkit's own normalisation; null where they cannot express that of the plans."""
    configuration = results.configuration
    schemes = [str(name) for name in configuration["normalization_schemes"]]
    used = set(zip(schemes, map(bool, configuration["use_mask_for_norm"]), strict=True))
    if used == {("ZScoreNormalization", True)} or used == {("ZScoreNormalization", False)}:
        return {"normalisation": "zscore-nonzero" if used == {("ZScoreNormalization", True)} else "zscore"}
    measured = set(intensities(results)) if set(schemes) == {"CTNormalization"} else set()
    if len(measured) != 1:
        return {"normalisation": None}
    ((mean, std, low, high),) = measured
    return {"normalisation": "ct-window", "ct_window": (low, high), "ct_mean": mean, "ct_std": std}


def intensities(results: Results) -> list[tuple[float, float, float, float]]:
    """Mean, standard deviation, 0.5 and 99.5 percentile of foreground voxels by channel; empty if not in the plans."""
    plans = results.plans
    by_channel = plans.get("foreground_intensity_properties_per_channel")
    by_channel = by_channel or plans.get("foreground_intensity_properties_by_modality") or {}
    keys = ("mean", "std", "percentile_00_5", "percentile_99_5")
    found = [numbered(by_channel, channel) for channel in range(len(by_channel))]
    return [tuple(float(one[key]) for key in keys) for one in found]  # type: ignore[misc]
