"""Result folders of nnU-Net 1 and 2 with a STU-Net, used like run folders.

A result folder holds `fold_0`, `fold_1` ... (or `fold_all`), each with a checkpoint; version 2 keeps `plans.json` and
`dataset.json` beside the folds, version 1 a pickle of plans beside each checkpoint.
"""

from collections.abc import Mapping
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
from segkit.checkpoint.nnunet_plans import ResultPlan, plans_understood, read_plan
from segkit.checkpoint.tensors import named_tensors, read_torch
from segkit.errors import CheckpointError, DataError
from segkit.labels import LabelScheme
from segkit.models.stunet import SIZES
from segkit.reading.files import file_sha256
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
    for found, expected, what in (
        (network.in_channels, len(modalities), "image channels"),
        (network.out_channels, len(outputs), "outputs"),
    ):
        if found != expected:
            raise CheckpointError(
                f"the network has {found} {what}, but its dataset.json names {expected}",
                where=path,
                remedy="Copy the result folder again: checkpoint and dataset.json do not belong together",
            )
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
            label_scheme=SchemeCard(name=scheme.name, labels=dict(scheme.values)),
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
    """The normalisation as fields of the card."""
    used = set(plan.normalisations)
    kinds = {_NORMALISATIONS.get(name) for name, _ in used}
    measured = set(plan.intensities) if kinds == {"ct-window"} else set()
    is_uniform = len(used) == 1 and len(measured) <= 1
    if None in kinds or not is_uniform or (kinds == {"ct-window"} and not measured):
        how = "" if is_uniform else ", which differs from channel to channel"
        raise CheckpointError(
            f"images are normalised with {', '.join(sorted({name for name, _ in used}))}{how}",
            where=path,
            expected="z-score or a CT window, the same for every channel",
            remedy="Segment with nnU-Net itself",
        )
    ((_, is_masked),) = used
    if kinds == {"zscore"}:
        return {"normalisation": "zscore-nonzero" if is_masked else "zscore"}
    ((mean, std, low, high),) = measured
    return {"normalisation": "ct-window", "ct_window": (low, high), "ct_mean": mean, "ct_std": std}
