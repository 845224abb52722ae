"""Plans of nnU-Net versions 1 and 2, and label names of the released STU-Net weights.

nnU-Net reverses the axes of the file (to z, y, x), then permutes them by `transpose_forward`; only some of its readers
reorient images. Spacings, patches and strides of a plan are in that order, which is expressed here as an orientation.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segkit.checkpoint.tensors import read_plain_pickle
from segkit.errors import CheckpointError, DataError
from segkit.labels import LabelScheme, classes_scheme
from segkit.reading.files import read_json

_MISFITS = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""Errors from plans that nnU-Net did not write; a configuration may even inherit from itself."""

_STEPS = 5
"""Downsampling steps of every STU-Net."""


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
    if chosen.get("previous_stage"):
        raise CheckpointError(
            f"{arguments['configuration']} needs the masks of {chosen['previous_stage']} as input",
            where=checkpoint,
            expected="a network that needs the images only, such as 3d_fullres",
        )
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
    """A configuration, with the values that it inherits."""
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
    is_released = sorted(released.values()) == [int(value) for value in values]
    return released if is_released else {f"label_{int(value)}": int(value) for value in values}


def _read_json(path: Path) -> Any:
    """A JSON document; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except DataError as error:
        raise CheckpointError(error.found, where=path, expected=error.expected) from error


def _numbered(mapping: Mapping[Any, Any], number: int) -> Any:
    """An entry by its number, which JSON writes as text."""
    return mapping[number] if number in mapping else mapping[str(number)]


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
