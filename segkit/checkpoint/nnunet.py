"""Result folders of nnU-Net 1 and 2 with a STU-Net, used like run folders.

A result folder holds `fold_0`, `fold_1` ... (or `fold_all`), each with a checkpoint; version 2 keeps `plans.json` and
`dataset.json` beside the folds, version 1 a pickle of plans beside each checkpoint.

nnU-Net reverses the axes of the file (to z, y, x), then permutes them by `transpose_forward`; only some of its readers
reorient images. Spacings, patches and strides of a plan are in that order, which is expressed here as an orientation.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from segkit.checkpoint.card import (
    ModelCard,
    NetworkCard,
    OutputCard,
    PreprocessingCard,
    SchemeCard,
    SegmentationCard,
    TrainingData,
)
from segkit.checkpoint.tensors import named_tensors, read_plain_pickle, read_torch
from segkit.errors import CheckpointError, DataError
from segkit.labels import LabelScheme, classes_scheme
from segkit.models.stunet import SIZES
from segkit.reading.files import file_sha256, read_json
from segkit.reading.layouts.dataset_json import channel_names, document_scheme
from segkit.reading.layouts.layout import FolderOptions

_CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth", "model_final_checkpoint.model", "model_best.model")
"""In order of preference: version 2's, then version 1's."""

_NORMALISATIONS = {
    **dict.fromkeys(("ZScoreNormalization", "nonCT"), "zscore"),
    **dict.fromkeys(("CTNormalization", "CT"), "ct-window"),
}
"""Names of versions 2 and 1 -> the same normalisation in segkit."""

_MOST_LABELS = 256
_STEPS = 5
"""Downsampling steps of every STU-Net."""
_MISFITS = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""Errors from plans that nnU-Net did not write; a configuration may even inherit from itself."""


@dataclass(frozen=True)
class ResultPlan:
    """A result's plan; sizes in voxels and spacings in mm, in the axis order of `orientation`.

    `dataset` is the `dataset.json` or a substitute made from the plans.
    """

    version: int
    trainer: str
    name: str
    patch_size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    strides: tuple[tuple[int, ...], ...]
    orientation: str
    normalisations: tuple[tuple[str, bool], ...]
    """Name by channel, and whether it uses the statistics of nonzero voxels only."""
    intensities: tuple[tuple[float, float, float, float], ...]
    """Mean, standard deviation, 0.5 and 99.5 percentile of foreground voxels by channel; empty if not in the plan."""
    mirror_axes: tuple[int, ...]
    dataset: Mapping[str, Any]


def fold_folders(folder: Path) -> list[Path]:
    """The folds with a checkpoint: the folder itself, its numbered folds, else `fold_all`; none in other folders."""
    if checkpoint_path(folder) is not None:
        return [folder]
    found = [fold for fold in folder.glob("fold_*") if checkpoint_path(fold) is not None]
    numbered = [fold for fold in found if fold.name.removeprefix("fold_").isdigit()]
    return sorted(numbered, key=lambda fold: int(fold.name.removeprefix("fold_"))) or found


def checkpoint_path(fold: Path) -> Path | None:
    """The checkpoint of a fold: the final one, else the best one, else the only one of version 1; None without one."""
    for name in _CHECKPOINTS:
        if (fold / name).is_file():
            return fold / name
    # The released weights have names of their own, such as base_ep4k.model.
    beside = (".pkl", ".json")
    others = [p for p in sorted(fold.glob("*.model")) if any(p.with_name(p.name + s).is_file() for s in beside)]
    return others[0] if len(others) == 1 else None


def make_card(checkpoint: Path) -> ModelCard:
    """The model card of a checkpoint, from its plans and the shapes of its tensors.

    Raises:
        CheckpointError: the network is not STU-Net, the plans are missing or unsafe to read, or the images are
            normalised in a way that segkit does not have.
    """
    with plans_understood(checkpoint):
        return _make_card(checkpoint)


def _make_card(path: Path) -> ModelCard:
    document = read_torch(path, is_mapped=True)
    plan = read_plan(path, document if isinstance(document, Mapping) else {})
    if not plan.trainer.startswith("STUNetTrainer"):
        raise CheckpointError(
            f"the network of {plan.trainer} is not STU-Net",
            where=path,
            expected="a result of one of the STUNetTrainers",
            remedy="Segment with nnU-Net itself, or train on the data with `segkit train`",
        )
    dataset_path = path.parent.parent / "dataset.json"
    try:
        modalities = channel_names(plan.dataset, dataset_path)
        scheme = document_scheme(plan.dataset, modalities, FolderOptions(), dataset_path).scheme
    except DataError as error:
        raise CheckpointError(error.found, where=error.where, expected=error.expected) from error
    if scheme is None:
        raise CheckpointError("its dataset.json names no labels", where=path)
    outputs = _outputs(plan.dataset, scheme, path)
    network = _network(named_tensors(document, path), plan, path)
    channels = (network.in_channels, len(modalities), "image channels")
    for found, expected, what in (channels, (network.out_channels, len(outputs), "outputs")):
        if found != expected:
            sentence = f"the network has {found} {what}, but its dataset.json names {expected}"
            remedy = "Copy the result folder again: checkpoint and dataset.json do not belong together"
            raise CheckpointError(sentence, where=path, remedy=remedy)
    return ModelCard(
        network=network,
        modalities=modalities,
        patch_size=plan.patch_size,
        divisor=tuple(prod(axis) for axis in zip(*plan.strides, strict=True)),
        preprocessing=PreprocessingCard(
            spacing_mm=plan.spacing_mm, orientation=plan.orientation, crop="nonzero", **_normalisation(plan, path)
        ),
        segmentation=SegmentationCard(
            mirror_axes=plan.mirror_axes,
            activation="softmax" if outputs[0].label == 0 else "sigmoid",
            outputs=outputs,
            label_scheme=SchemeCard.model_validate(scheme.to_json()),
        ),
        versions={"nnunet": str(plan.version), "trainer": plan.trainer},
        sha256=file_sha256(path),
        training_data=TrainingData(
            identity=f"nnU-Net: {plan.name}",
            licence=str(plan.dataset.get("licence") or plan.dataset.get("license") or "") or None,
            cases=int(plan.dataset.get("numTraining") or 0),
        ),
    )


def _network(tensors: Mapping[str, Tensor], plan: ResultPlan, path: Path) -> NetworkCard:
    """The STU-Net of these tensors, by their shapes: the trainer's name can be chosen freely."""
    first, last = tensors.get("conv_blocks_context.0.0.conv1.weight"), tensors.get("seg_outputs.4.weight")
    if first is None or last is None or first.dim() != 5 or last.dim() != 5:
        raise CheckpointError("holds no STU-Net of volumes", where=path)
    depth = sum(name.startswith("conv_blocks_context.0.") and name.endswith(".conv1.weight") for name in tensors)
    shape = {"width": first.shape[0], "depth": depth}
    size = next((name for name, values in SIZES.items() if values == shape), None)
    return NetworkCard(
        family="stunet",
        size=size or "B",
        in_channels=first.shape[1],
        out_channels=last.shape[0],
        arguments={"strides": plan.strides, **({} if size else shape)},
    )


def _outputs(dataset: Mapping[str, Any], scheme: LabelScheme, path: Path) -> tuple[OutputCard, ...]:
    """Regions in painting order, or background and classes by value."""
    labels = {name: value for name, value in dataset["labels"].items() if str(name).lower() != "ignore"}
    if any(isinstance(value, list) and len(value) > 1 for value in labels.values()):
        regions = {name: value if isinstance(value, list) else [value] for name, value in labels.items()}
        regions = {name: sorted(int(v) for v in value) for name, value in regions.items() if set(value) != {0}}
        return tuple(
            OutputCard(name=name, label=int(paints), members=tuple(members))
            for (name, members), paints in zip(regions.items(), dataset["regions_class_order"], strict=True)
        )
    classes = {0: "background"} | {value: name for name, value in scheme.values.items()}
    if sorted(classes) != list(range(len(classes))) or len(classes) > _MOST_LABELS:
        raise CheckpointError("its label values have gaps, or are too many", where=path, expected="0, 1, 2 ... to 255")
    return tuple(OutputCard(name=classes[value], label=value, members=(value,)) for value in sorted(classes))


def _normalisation(plan: ResultPlan, path: Path) -> dict[str, Any]:
    used = set(plan.normalisations)
    kinds = {_NORMALISATIONS.get(name) for name, _ in used}
    measured = set(plan.intensities) if kinds == {"ct-window"} else set()
    is_uniform = len(used) == 1 and len(measured) <= 1
    if None in kinds or not is_uniform or (kinds == {"ct-window"} and not measured):
        how = "" if is_uniform else ", which differs from channel to channel"
        found = f"images are normalised with {', '.join(sorted({name for name, _ in used}))}{how}"
        expected = "z-score or a CT window, the same for every channel"
        raise CheckpointError(found, where=path, expected=expected, remedy="Segment with nnU-Net itself")
    ((_, is_masked),) = used
    if kinds == {"zscore"}:
        return {"normalisation": "zscore-nonzero" if is_masked else "zscore"}
    ((mean, std, low, high),) = measured
    return {"normalisation": "ct-window", "ct_window": (low, high), "ct_mean": mean, "ct_std": std}


def read_plan(checkpoint: Path, document: Mapping[str, Any]) -> ResultPlan:
    """The plan of a fold from its checkpoint, whose contents are `document`, and the files beside it.

    Raises:
        CheckpointError: plans are missing, unsafe to read, not written by nnU-Net, or of slices or of a cascade.
    """
    with plans_understood(checkpoint):
        return _version_1(checkpoint) if checkpoint.suffix == ".model" else _version_2(checkpoint, document)


@contextmanager
def plans_understood(checkpoint: Path) -> Iterator[None]:
    """Report plans that nnU-Net did not write as a CheckpointError."""
    try:
        yield
    except _MISFITS as error:
        found = f"its plans cannot be understood ({type(error).__name__}: {error})"
        raise CheckpointError(found, where=checkpoint, expected="those of nnU-Net 1 or 2") from error


def _version_2(checkpoint: Path, document: Mapping[str, Any]) -> ResultPlan:
    arguments, result = document["init_args"], checkpoint.parent.parent
    plans = _read_json(result / "plans.json") or arguments["plans"]
    dataset = _read_json(result / "dataset.json") or arguments["dataset_json"]
    chosen = _configuration(plans, arguments["configuration"])
    if stage := chosen.get("previous_stage"):
        found = f"{arguments['configuration']} needs the masks of {stage} as input"
        expected = "a network that needs the images only, such as 3d_fullres"
        raise CheckpointError(found, where=checkpoint, expected=expected)
    strides = chosen.get("pool_op_kernel_sizes") or chosen["architecture"]["arch_kwargs"]["strides"]
    properties = plans.get("foreground_intensity_properties_per_channel")
    properties = properties or plans.get("foreground_intensity_properties_by_modality", {})
    schemes = [str(name) for name in chosen["normalization_schemes"]]
    return ResultPlan(
        version=2,
        trainer=str(document["trainer_name"]),
        name=str(plans["dataset_name"]),
        patch_size=_volume_sizes(chosen["patch_size"], checkpoint),
        spacing_mm=tuple(float(mm) for mm in chosen["spacing"]),
        strides=_five(strides[1:]),
        orientation=_orientation(str(plans["image_reader_writer"]), plans["transpose_forward"]),
        normalisations=tuple(zip(schemes, map(bool, chosen["use_mask_for_norm"]), strict=True)),
        intensities=_intensities(properties, len(schemes), "std"),
        mirror_axes=tuple(int(axis) for axis in document.get("inference_allowed_mirroring_axes") or ()),
        dataset=dataset,
    )


def _configuration(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    own = dict(plans["configurations"][name])
    parent = own.pop("inherits_from", None)
    return own if parent is None else {**_configuration(plans, parent), **own}


def _version_1(checkpoint: Path) -> ResultPlan:
    """Version 1 has the trainer's name and the plans in a pickle beside each checkpoint."""
    beside = checkpoint.with_name(checkpoint.name + ".json")
    document = _read_json(beside) or read_plain_pickle(checkpoint.with_name(checkpoint.name + ".pkl"))
    plans = document["plans"]
    channels = range(int(plans["num_modalities"]))
    stage = _numbered(plans["plans_per_stage"], int(document["init"][5]))
    properties = plans["dataset_properties"].get("intensityproperties") or {}
    result = checkpoint.parent.parent
    own_names = {str(channel): str(_numbered(plans["modalities"], channel)) for channel in channels}
    labels = {"background": 0, **_classes(checkpoint, str(document["name"]), plans["all_classes"])}
    schemes, masks = plans["normalization_schemes"], plans["use_mask_for_norm"]
    return ResultPlan(
        version=1,
        trainer=str(document["name"]),
        name=result.parent.name,
        patch_size=_volume_sizes(stage["patch_size"], checkpoint),
        spacing_mm=tuple(float(mm) for mm in stage["current_spacing"]),
        strides=_five(stage["pool_op_kernel_sizes"]),
        orientation=_orientation("SimpleITKIO", plans["transpose_forward"]),
        normalisations=tuple((str(_numbered(schemes, c)), bool(_numbered(masks, c))) for c in channels),
        intensities=_intensities(properties, len(channels), "sd"),
        mirror_axes=(0, 1, 2),
        dataset=_read_json(result / "dataset.json") or {"modality": own_names, "labels": labels},
    )


def _classes(checkpoint: Path, trainer: str, values: Sequence[Any]) -> Mapping[str, int]:
    """Label names, which version 1 does not save: known for the released weights, else numbers."""
    released: Mapping[str, int] = {}
    if checkpoint.stem.endswith("_ep4k"):
        released = RELEASED_LABELS["stunet-totalsegmentator"].values
    elif trainer.endswith("_ep2k"):
        released = RELEASED_LABELS["stunet-abdomenatlas"].values
    numbers = [int(value) for value in values]
    return released if sorted(released.values()) == numbers else {f"label_{number}": number for number in numbers}


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except DataError as error:
        raise CheckpointError(error.found, where=path, expected=error.expected) from error


def _numbered(mapping: Mapping[Any, Any], number: int) -> Any:
    return mapping[number] if number in mapping else mapping[str(number)]  # JSON writes numbers as text


def _volume_sizes(sizes: Sequence[Any], where: Path) -> tuple[int, ...]:
    if len(sizes) != 3:
        raise CheckpointError("is a network of slices", where=where, expected="one of volumes, such as 3d_fullres")
    return tuple(int(size) for size in sizes)


def _five(strides: Sequence[Sequence[Any]]) -> tuple[tuple[int, ...], ...]:
    """Strides cut, or extended with ones, to the steps of a STU-Net, as its trainers do."""
    given = [tuple(int(step) for step in stride) for stride in strides][:_STEPS]
    return (*given, *((1, 1, 1),) * (_STEPS - len(given)))


def _orientation(reader: str, transpose: Sequence[Any]) -> str:
    stored = "RAS" if "WithReorient" in reader else "IJK"
    return "".join(stored[::-1][int(axis)] for axis in transpose)


def _intensities(
    properties: Mapping[Any, Any], channels: int, std: str
) -> tuple[tuple[float, float, float, float], ...]:
    found = [_numbered(properties, channel) for channel in range(channels)] if properties else []
    return tuple(
        (float(p["mean"]), float(p[std]), float(p["percentile_00_5"]), float(p["percentile_99_5"])) for p in found
    )


_TOTALSEGMENTATOR = """
adrenal_gland_left adrenal_gland_right aorta autochthon_left autochthon_right brain clavicula_left clavicula_right colon
duodenum esophagus face femur_left femur_right gallbladder gluteus_maximus_left gluteus_maximus_right
gluteus_medius_left gluteus_medius_right gluteus_minimus_left gluteus_minimus_right heart_atrium_left heart_atrium_right
heart_myocardium heart_ventricle_left heart_ventricle_right hip_left hip_right humerus_left humerus_right
iliac_artery_left iliac_artery_right iliac_vena_left iliac_vena_right iliopsoas_left iliopsoas_right inferior_vena_cava
kidney_left kidney_right liver lung_lower_lobe_left lung_lower_lobe_right lung_middle_lobe_right lung_upper_lobe_left
lung_upper_lobe_right pancreas portal_vein_and_splenic_vein pulmonary_artery rib_left_1 rib_left_10 rib_left_11
rib_left_12 rib_left_2 rib_left_3 rib_left_4 rib_left_5 rib_left_6 rib_left_7 rib_left_8 rib_left_9 rib_right_1
rib_right_10 rib_right_11 rib_right_12 rib_right_2 rib_right_3 rib_right_4 rib_right_5 rib_right_6 rib_right_7
rib_right_8 rib_right_9 sacrum scapula_left scapula_right small_bowel spleen stomach trachea urinary_bladder
vertebrae_C1 vertebrae_C2 vertebrae_C3 vertebrae_C4 vertebrae_C5 vertebrae_C6 vertebrae_C7 vertebrae_L1 vertebrae_L2
vertebrae_L3 vertebrae_L4 vertebrae_L5 vertebrae_T1 vertebrae_T10 vertebrae_T11 vertebrae_T12 vertebrae_T2 vertebrae_T3
vertebrae_T4 vertebrae_T5 vertebrae_T6 vertebrae_T7 vertebrae_T8 vertebrae_T9
"""
_ABDOMENATLAS = ("aorta", "gallbladder", "IVC", "left kidney", "liver", "pancreas", "right kidney", "spleen", "stomach")

RELEASED_LABELS: dict[str, LabelScheme] = {
    name: classes_scheme(name, {structure: value for value, structure in enumerate(structures, start=1)})
    for name, structures in (
        ("stunet-totalsegmentator", _TOTALSEGMENTATOR.split()),
        ("stunet-abdomenatlas", _ABDOMENATLAS),
    )
}
"""Scheme name -> labels of one release in the order of its outputs: 104 structures (105 outputs) and 9 (10 outputs).

From `label_orders.json` and `AbdomenAtlas/label_orders.json` of uni-medical/STU-Net. The 104 structures are those of
TotalSegmentator's first version in alphabetical order, so rib 10 comes before rib 2, and TotalSegmentator's own numbers
would be wrong for nearly every mask.
"""
