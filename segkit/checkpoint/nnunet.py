"""Results folders of nnU-Net 1 and 2, opened into a plain record, and used like run folders.

A results folder holds `fold_0`, `fold_1` ... (or `fold_all`), each with a checkpoint; version 2 keeps `plans.json` and
`dataset.json` beside the folds, version 1 a pickle of plans beside each checkpoint.

nnU-Net reverses the axes of the file (to z, y, x), then permutes them by `transpose_forward`; only some of its readers
reorient images. Spacings, patches and strides of a plan are in that order, which is expressed here as an orientation.
"""

import functools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from segkit.checkpoint.card import OutputCard
from segkit.checkpoint.tensors import read_plain_pickle, read_torch
from segkit.errors import CheckpointError, DataError
from segkit.labels import LabelScheme, classes_scheme
from segkit.reading.files import read_json
from segkit.reading.layouts.dataset_json import channel_names, document_scheme
from segkit.reading.layouts.layout import FolderOptions

_log = logging.getLogger(__name__)

_CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth", "model_final_checkpoint.model", "model_best.model")
"""In order of preference: version 2's, then version 1's."""
_OF_VERSION_1 = {"nonCT": "ZScoreNormalization", "CT": "CTNormalization"}
"""Names of normalisations in version 1 -> those of version 2."""
_RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}

_KNOWN = {
    "preprocessor_name": {"DefaultPreprocessor"},
    "image_reader_writer": {
        *("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient", "NaturalImage2DIO")
    },
    "label_manager": {"LabelManager"},
    "normalization_schemes": {
        *("ZScoreNormalization", "CTNormalization", "NoNormalization"),
        *("RescaleTo01Normalization", "RGBTo01Normalization"),
    },
    **{
        f"resampling_fn_{kind}": {"resample_data_or_seg_to_shape", "resample_torch_fornnunet", "no_resampling_hack"}
        for kind in ("data", "seg", "probabilities")
    },
}
"""Entries of plans that name code of nnU-Net, and the names that segkit has code for. Others are refused."""
_TRAINERS = re.compile(
    r"STUNetTrainer.*|nnUNetTrainer(BN|NoDeepSupervision|NoMirroring|_onlyMirror01|_?DA(5|Seg|[oO]rd0)+|NoDA|_noDummy2DDA"
    r"|(Vanilla)?Ada[mn]|\den\d|CELoss|DiceLoss|DiceCELoss_noSmooth|(Dice)?Top[kK]\d+Loss|LS01|CosAnneal|_warmup"
    r"|_probabilisticOversampling(_\d+)?|Benchmark|_\d+ep(och)?s?|_NoMirroring|_noDataLoading)*|nnUNet_Trainer_BS8"
)
"""Names of nnU-Net's own trainers whose networks and preparation are those of the plans."""

_MOST_LABELS = 256
_MISFITS = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""Errors from plans that nnU-Net did not write; a configuration may even inherit from itself."""


@dataclass(frozen=True)
class Results:
    """An opened results folder; keys of plans and configuration are those of version 2, also for version 1.

    Sizes are in voxels and spacings in mm, in the axis order of nnU-Net: z, y, x, then `transpose_forward`.
    """

    folder: Path
    """The folder of trainer, plans and configuration, above the folds."""
    version: int
    trainer: str
    plans: Mapping[str, Any] = field(repr=False)
    configuration_name: str
    configuration: Mapping[str, Any] = field(repr=False)
    """The configuration of the plans with all that it inherits."""
    dataset: Mapping[str, Any] = field(repr=False)
    """`dataset.json`, or a substitute made from the plans."""
    checkpoints: tuple[Path, ...]
    """The weight file of each fold in use."""
    mirror_axes: tuple[int, ...] = ()
    """Axes along which inference may mirror, 0 is the first spatial one."""

    @property
    def dims(self) -> int:
        """Axes of the network: 2 for a network of slices."""
        return len(self.configuration["patch_size"])

    @property
    def previous_stage(self) -> str | None:
        """The configuration whose masks are further input channels, of a cascade."""
        return self.configuration.get("previous_stage") or None

    @functools.cached_property
    def channels(self) -> tuple[str, ...]:
        """Names of the image channels; channel n is in the files that end in _000n."""
        return channel_names(self.dataset, self.folder / "dataset.json")

    @functools.cached_property
    def scheme(self) -> LabelScheme:
        """The labels by name, without background and `ignore`."""
        where = self.folder / "dataset.json"
        scheme = document_scheme(self.dataset, self.channels, FolderOptions(), where).scheme
        if scheme is None:
            raise CheckpointError("its dataset.json names no labels", where=self.checkpoints[0])
        return scheme

    @functools.cached_property
    def outputs(self) -> tuple[OutputCard, ...]:
        """Regions in painting order (nnU-Net's regions_class_order), or background and classes by value."""
        return _outputs(self.dataset, self.scheme, self.checkpoints[0])

    @property
    def has_regions(self) -> bool:
        """Whether outputs are regions (sigmoid, threshold 0.5) rather than exclusive classes (largest logit)."""
        return self.outputs[0].label != 0

    @property
    def foreground(self) -> tuple[int, ...]:
        """Label values but for background and `ignore`, ascending: the channels of a previous stage's masks."""
        return tuple(sorted({value for output in self.outputs for value in output.members} - {0}))

    @functools.cached_property
    def notices(self) -> tuple[str, ...]:
        """What users should know and what is not honoured, a sentence each."""
        found = []
        if not _TRAINERS.fullmatch(self.trainer):
            found.append(f"trainer {self.trainer} is not known: masks differ if it changes more than the training")
        if pickled := sorted(path.relative_to(self.folder) for path in self.folder.rglob("postprocessing.pkl")):
            names = ", ".join(map(str, pickled))
            found.append(f"{names}: ignored, as nnUNetv2_predict does; it holds pickled functions, which are not read")
        dropout = self.configuration.get("architecture", {}).get("arch_kwargs", {}).get("dropout_op")
        if dropout is not None:
            found.append(f"{dropout}: trained further without dropout")
        return tuple(found)


def open_results(path: Path, folds: Sequence[str] | None = None, checkpoint: str | None = None) -> Results:
    """The record of a results folder, or of one of its folds; the weights stay in their files.

    `folds` are names such as "0" or "all"; None: all numbered ones, else `fold_all`. `checkpoint` is the name of a file
    such as "checkpoint_best"; None: the final one, else the best one. What concerns all folds is that of the first.

    Raises:
        CheckpointError: a fold or file is missing or unsafe to read, or plans name code that segkit does not have.
    """
    chosen = fold_folders(path) if folds is None else [path / f"fold_{fold}" for fold in folds]
    if not chosen:
        raise CheckpointError("holds no fold with a checkpoint", where=path, expected="a results folder of nnU-Net")
    files = []
    for fold in chosen:
        found = checkpoint_path(fold, checkpoint)
        if found is None:
            raise CheckpointError(f"has no {checkpoint or 'checkpoint'}", where=fold, remedy="Name another fold")
        files.append(found)
    document = read_torch(files[0], is_mapped=True)
    results = read_results(files[0], document if isinstance(document, Mapping) else {})
    with plans_understood(files[0]):
        _require_known(results)
        for notice in results.notices:
            _warn_once(results.folder, notice)
    return replace(results, checkpoints=tuple(files))


@functools.cache
def _warn_once(folder: Path, notice: str) -> None:
    _log.warning("%s: %s", folder, notice)


def _require_known(results: Results) -> None:
    where = results.checkpoints[0]
    for key, known in _KNOWN.items():
        named = results.configuration.get(key, results.plans.get(key, []))
        for name in [named] if isinstance(named, str) else named:
            if str(name).rpartition(".")[2] not in known:
                expected = f"one of {', '.join(sorted(known))}"
                remedy = "Segment with nnU-Net itself"
                raise CheckpointError(
                    f"{key} is {name}, which segkit lacks", where=where, expected=expected, remedy=remedy
                )
    try:
        _ = results.outputs
    except DataError as error:
        raise CheckpointError(error.found, where=error.where, expected=error.expected) from error


def fold_folders(folder: Path) -> list[Path]:
    """The folds with a checkpoint: the folder itself, its numbered folds, else `fold_all`; none in other folders."""
    if checkpoint_path(folder) is not None:
        return [folder]
    found = [fold for fold in folder.glob("fold_*") if checkpoint_path(fold) is not None]
    numbered = [fold for fold in found if fold.name.removeprefix("fold_").isdigit()]
    return sorted(numbered, key=lambda fold: int(fold.name.removeprefix("fold_"))) or found


def checkpoint_path(fold: Path, name: str | None = None) -> Path | None:
    """The checkpoint of a fold: of that name, else the final, the best, or the only one of version 1; None without.

    `fold` may be the checkpoint itself.
    """
    if fold.is_file():
        return fold if fold.suffix in (".pth", ".model") else None
    for known in _CHECKPOINTS if name is None else (name, f"{name}.pth", f"{name}.model"):
        if (fold / known).is_file():
            return fold / known
    # The released weights have names of their own, such as base_ep4k.model.
    beside = (".pkl", ".json")
    others = [p for p in sorted(fold.glob("*.model")) if any(p.with_name(p.name + s).is_file() for s in beside)]
    return others[0] if len(others) == 1 and name is None else None


def _outputs(dataset: Mapping[str, Any], scheme: LabelScheme, path: Path) -> tuple[OutputCard, ...]:
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


def read_results(checkpoint: Path, document: Mapping[str, Any]) -> Results:
    """The record of a fold from its checkpoint, whose contents are `document`, and the files beside it.

    Raises:
        CheckpointError: plans are missing, unsafe to read, or not written by nnU-Net.
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


def _version_2(checkpoint: Path, document: Mapping[str, Any]) -> Results:
    arguments, folder = document["init_args"], checkpoint.parent.parent
    plans = _read_json(folder / "plans.json") or arguments["plans"]
    name = str(arguments["configuration"])
    return Results(
        folder=folder,
        version=2,
        trainer=str(document["trainer_name"]),
        plans=plans,
        configuration_name=name,
        configuration=_configuration(plans, name),
        dataset=_read_json(folder / "dataset.json") or arguments["dataset_json"],
        checkpoints=(checkpoint,),
        mirror_axes=tuple(int(axis) for axis in document.get("inference_allowed_mirroring_axes") or ()),
    )


def _configuration(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    own = dict(plans["configurations"][name])
    parent = own.pop("inherits_from", None)
    return own if parent is None else {**_configuration(plans, parent), **own}


def _version_1(checkpoint: Path) -> Results:
    """Version 1 has the trainer's name and the plans in a pickle beside each checkpoint."""
    beside = checkpoint.with_name(checkpoint.name + ".json")
    document = _read_json(beside) or read_plain_pickle(checkpoint.with_name(checkpoint.name + ".pkl"))
    plans = document["plans"]
    channels = range(int(plans["num_modalities"]))
    stage = numbered(plans["plans_per_stage"], int(document["init"][5]))
    folder = checkpoint.parent.parent
    own_names = {str(channel): str(numbered(plans["modalities"], channel)) for channel in channels}
    labels = {"background": 0, **_classes(checkpoint, str(document["name"]), plans["all_classes"])}
    schemes = [str(numbered(plans["normalization_schemes"], channel)) for channel in channels]
    properties = plans["dataset_properties"].get("intensityproperties") or {}
    found = {str(channel): numbered(properties, channel) for channel in channels if properties}
    transpose = [int(axis) for axis in plans["transpose_forward"]]
    return Results(
        folder=folder,
        version=1,
        trainer=str(document["name"]),
        plans={
            "dataset_name": folder.parent.name,
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": transpose,
            "transpose_backward": [transpose.index(axis) for axis in range(len(transpose))],
            "foreground_intensity_properties_per_channel": {c: {**one, "std": one["sd"]} for c, one in found.items()},
        },
        configuration_name="3d_fullres",
        configuration={
            "patch_size": [int(size) for size in stage["patch_size"]],
            "spacing": [float(mm) for mm in stage["current_spacing"]],
            "pool_op_kernel_sizes": [[1, 1, 1], *stage["pool_op_kernel_sizes"]],
            "normalization_schemes": [_OF_VERSION_1.get(name, name) for name in schemes],
            "use_mask_for_norm": [bool(numbered(plans["use_mask_for_norm"], channel)) for channel in channels],
            **{f"resampling_fn_{kind}": "resample_data_or_seg_to_shape" for kind in ("data", "seg", "probabilities")},
            "resampling_fn_data_kwargs": _RESAMPLING,
            "resampling_fn_probabilities_kwargs": {**_RESAMPLING, "order": 1},
            "resampling_fn_seg_kwargs": {**_RESAMPLING, "is_seg": True, "order": 1},
        },
        dataset=_read_json(folder / "dataset.json") or {"modality": own_names, "labels": labels},
        checkpoints=(checkpoint,),
        mirror_axes=(0, 1, 2),
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


def numbered(mapping: Mapping[Any, Any], number: int) -> Any:
    """The entry of a number, which JSON writes as text."""
    return mapping[number] if number in mapping else mapping[str(number)]


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
