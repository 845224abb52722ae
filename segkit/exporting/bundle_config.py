"""The documents of a MONAI bundle: segkit's pipeline of a model card in MONAI's transforms, and the metadata.

`inference.json` needs MONAI, nibabel and PyTorch, and for post-processing rules scipy; it does not need segkit. Text of
the card is untrusted: it enters no expression (`$...`) unless it is made of letters, digits and a few signs.
"""

import re
from importlib import metadata
from typing import Any

from segkit.checkpoint.card import ModelCard
from segkit.errors import RequestError
from segkit.inference.postprocessing import ROUNDING, label_beneath
from segkit.preparing.resampling import SAME_SPACING, TIE_DIGITS
from segkit.reading.case import SYNONYMS

IMAGE, PREDICTION = "image", "pred"
"""Keys of the dictionaries that the transforms pass on, and of the metadata."""

_SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
_IMPORTS = [f"$import {name}" for name in ("glob", "os", "re", "monai", "numpy", "torch")]
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.+-]*")


def inference_config(card: ModelCard) -> dict[str, Any]:
    """The document `configs/inference.json` of a segmentation model of volumes.

    Raises:
        RequestError: a modality has a name that cannot be part of a pattern of file names.
    """
    return {
        "imports": _IMPORTS + ["$from scipy import ndimage"] * bool(_rules(card)),
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "$@bundle_root + '/eval'",
        **({} if card.preprocessing.spacing_mm is None else {"spacing_mm": list(card.preprocessing.spacing_mm)}),
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        **_files(card),
        "network_def": "$torch.jit.load(@bundle_root + '/models/model.ts', map_location=@device)",
        "preprocessing": {"_target_": "Compose", "transforms": _preprocessing(card)},
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(card.patch_size),
            "sw_batch_size": 1,
            "overlap": card.overlap,
            "mode": "gaussian",
            "sigma_scale": 0.125,
            "padding_mode": "constant",
        },
        "postprocessing": {"_target_": "Compose", "transforms": _postprocessing(card)},
        "handlers": [{"_target_": "StatsHandler", "iteration_log": False}],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network_def",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": False,
        },
        "run": ["$@evaluator.run()"],
    }


def _files(card: ModelCard) -> dict[str, Any]:
    """The list of cases: NIfTI files, or a folder for each case if the network has several modalities."""
    if len(card.modalities) == 1:
        files = "$[{'image': file} for file in sorted(glob.glob(os.path.join(@dataset_dir, '*.nii.gz')))]"
        return {"datalist": files}
    return {
        "modalities": {name: _suffixes(name) for name in card.modalities},
        "file_of": "$lambda folder, modality: (lambda files: "
        "(files if len(files) == 1 else [f'{folder}: {len(files)} files of {modality}'])[0])"
        "([file for file in glob.glob(os.path.join(folder, '*.nii.gz')) "
        "if re.search('(^|[-_. ])(' + @modalities[modality] + r')\\.nii\\.gz$', os.path.basename(file), re.I)])",
        "datalist": "$[{'image': [@file_of(folder, modality) for modality in @modalities]} "
        "for folder in sorted(glob.glob(os.path.join(@dataset_dir, '*'))) if os.path.isdir(folder)]",
    }


def _suffixes(modality: str) -> str:
    """The usual endings of the names of its files, a regular expression."""
    if _PLAIN_NAME.fullmatch(modality) is None:
        raise RequestError(
            f"modality {modality!r} cannot be matched with file names by a bundle",
            expected="a name of letters, digits, spaces and _ . + -",
            remedy="Rename it in model.json",
        )
    # "ce t1" is left out: it ends like another modality.
    names = [name for name in SYNONYMS.get(modality, (modality,)) if not name.startswith(("ce ", "gd "))]
    return "|".join(re.escape(name).replace(r"\ ", "[-_. ]") for name in names)


def _preprocessing(card: ModelCard) -> list[dict[str, Any]]:
    config = card.preprocessing
    steps: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", "keys": IMAGE, "reader": "NibabelReader", "ensure_channel_first": True}
    ]
    axes = [0, 1, 2]
    if sorted(config.orientation.upper()) == ["I", "J", "K"]:
        axes = ["IJK".index(letter) for letter in config.orientation.upper()]
        steps.append({"_target_": "Transposed", "keys": IMAGE, "indices": [0, *(axis + 1 for axis in axes)]})
    else:
        steps.append({"_target_": "Orientationd", "keys": IMAGE, "axcodes": config.orientation.upper(), "labels": None})
    if config.crop == "nonzero":
        # Of an image that is 0 everywhere, all is kept.
        inside = "$lambda image: image != 0 if (image != 0).any() else image == 0"
        crop = {"_target_": "CropForegroundd", "keys": IMAGE, "source_key": IMAGE, "select_fn": inside}
        steps.append({**crop, "allow_smaller": True})
    steps += _normalisation(card)
    return steps + ([] if config.spacing_mm is None else _resampling(axes))


def _normalisation(card: ModelCard) -> list[dict[str, Any]]:
    config = card.preprocessing
    normalise: dict[str, Any] = {"_target_": "NormalizeIntensityd", "keys": IMAGE}
    if config.normalisation == "ct-window" and config.ct_window is not None:
        low, high = config.ct_window
        clip = {"_target_": "ThresholdIntensityd", "keys": IMAGE}
        return [
            {**clip, "threshold": low, "above": True, "cval": low},
            {**clip, "threshold": high, "above": False, "cval": high},
            {**normalise, "subtrahend": config.ct_mean, "divisor": max(config.ct_std or 0.0, 1e-8)},
        ]
    normalise["channel_wise"] = True
    if config.normalisation == "scale-nonzero":
        return [{**normalise, "nonzero": True, "subtrahend": [0.0] * len(card.modalities)}]
    return [{**normalise, "nonzero": config.normalisation == "zscore-nonzero"}]


def _resampling(axes: list[int]) -> list[dict[str, Any]]:
    """Linear resampling to the spacing of the card, as `segkit.preparing.resampling` does it.

    `Spacingd` aligns the centres of the first voxels and keeps the spacing exactly; the network was trained on volumes
    whose outer faces are aligned and whose spacing follows from a whole number of voxels. So the grid is made by
    `Resize`, one channel of it, and the image is resampled to it, which `Invertd` can undo.
    """
    size = (
        f"size if abs(old - new) <= {SAME_SPACING} * new else max(1, round(round(size * old / new, {TIE_DIGITS}))) "
        f"for size, old, new in zip(grid.shape[1:], [grid.pixdim.tolist()[axis] for axis in {axes}], @spacing_mm)"
    )
    grid = f"$lambda grid: monai.transforms.Resize([{size}], mode='nearest')(grid[:1])"
    return [
        {"_target_": "CopyItemsd", "keys": IMAGE, "names": "grid"},
        {"_target_": "Lambdad", "keys": "grid", "func": grid, "allow_missing_keys": True},
        {
            "_target_": "ResampleToMatchd",
            "keys": IMAGE,
            "key_dst": "grid",
            "mode": "bilinear",
            "padding_mode": "border",
        },
        {"_target_": "DeleteItemsd", "keys": "grid"},
    ]


def _postprocessing(card: ModelCard) -> list[dict[str, Any]]:
    """Logits back on the grid of the file, the label map, the rules of the card, the file."""
    steps: list[dict[str, Any]] = [
        {
            "_target_": "Invertd",
            "keys": PREDICTION,
            "transform": "@preprocessing",
            "orig_keys": IMAGE,
            "nearest_interp": False,
            "to_tensor": True,
        }
    ]
    labels = [output.label for output in card.outputs]
    if card.segmentation is not None and card.segmentation.activation == "softmax":
        steps.append({"_target_": "AsDiscreted", "keys": PREDICTION, "argmax": True})
        places = list(range(len(labels)))
        if labels != places:
            paint = {"_target_": "MapLabelValued", "keys": PREDICTION}
            steps.append({**paint, "orig_labels": places, "target_labels": labels})
    else:
        painted = "0"
        for place, label in enumerate(labels):
            painted = f"torch.where(logits[{place}:{place + 1}] > 0, {label}, {painted})"
        steps.append({"_target_": "Lambdad", "keys": PREDICTION, "func": f"$lambda logits: {painted}"})
    steps += _rules(card)
    save: dict[str, Any] = {
        "_target_": "SaveImaged",
        "keys": PREDICTION,
        "output_dir": "@output_dir",
        "output_postfix": "",
    }
    # The grid is that of the scan already; without `resample` MONAI 1.6 rejects some affines of rotated axes.
    save |= {"output_dtype": "uint8", "separate_folder": False, "resample": True}
    if len(card.modalities) > 1:
        folder = "os.path.dirname(meta['filename_or_obj'])"
        save["output_name_formatter"] = f"$lambda meta, _: {{'subject': {folder} + '.nii.gz', 'idx': None}}"
    return [*steps, save]


def _rules(card: ModelCard) -> list[dict[str, Any]]:
    """The post-processing rules of the card, see `segkit.inference.postprocessing`; their volumes are in mm3."""
    rules = None if card.segmentation is None else card.segmentation.postprocessing
    named = {output.name: output for output in card.outputs}
    steps = []
    for rule in () if rules is None else rules.rules:
        output = named[rule.output]
        smallest = f"{rule.smallest_mm3 * (1 - ROUNDING)} / labels.pixdim.prod().item()"
        parts = "ndimage.label(mask, numpy.ones((3, 3, 3)))[0]" if rule.part == "component" else "mask.astype(int)"
        # Part 0 is the background, which `mask` leaves out.
        removed = f"(lambda mask: (lambda parts: mask & (numpy.bincount(parts.ravel()) < {smallest})[parts])({parts}))"
        mask = f"numpy.isin(labels.numpy(), {list(output.members)})[0]"
        beneath = label_beneath(output, card.outputs)
        change = f"$lambda labels: torch.where(torch.as_tensor({removed}({mask}))[None], {beneath}, labels)"
        steps.append({"_target_": "Lambdad", "keys": PREDICTION, "func": change})
    return steps


def bundle_metadata(card: ModelCard) -> dict[str, Any]:
    """The document `configs/metadata.json`."""
    versions = {name: metadata.version(name).split("+")[0] for name in ("monai", "torch", "numpy", "nibabel")}
    packages = {"nibabel": versions["nibabel"], "pytorch-ignite": "0.5"}
    if _rules(card):
        packages["scipy"] = metadata.version("scipy")
    is_ct = card.preprocessing.normalisation == "ct-window"
    names = [plain_text(output.name) for output in card.outputs]
    shape = {"spatial_shape": list(card.patch_size), "dtype": "float32", "is_patch_data": True}
    return {
        "schema": _SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": "exported by segkit"},
        "monai_version": versions["monai"],
        "pytorch_version": versions["torch"],
        "numpy_version": versions["numpy"],
        "required_packages_version": packages,
        "name": f"{card.network.family} of segkit",
        "task": "Segmentation of " + ", ".join(names),
        "description": f"A {card.network.family} network trained by segkit on {_training_data(card)}",
        "authors": "see the training data",
        "copyright": "see LICENSE",
        "data_source": plain_text(card.training_data.identity),
        "data_type": "nifti",
        "image_classes": ", ".join(map(plain_text, card.modalities)),
        "pred_classes": _classes(card),
        "intended_use": "Research only; not a medical device",
        "network_data_format": {
            "inputs": {
                IMAGE: {
                    "type": "image",
                    "format": "hounsfield" if is_ct else "magnitude",
                    "modality": "CT" if is_ct else "MR",
                    "num_channels": len(card.modalities),
                    **shape,
                    "value_range": [],
                    "channel_def": {str(place): plain_text(name) for place, name in enumerate(card.modalities)},
                }
            },
            "outputs": {
                PREDICTION: {
                    "type": "image",
                    "format": "segmentation",
                    "num_channels": len(names),
                    **shape,
                    "value_range": [],
                    "channel_def": {str(place): name for place, name in enumerate(names)},
                }
            },
        },
    }


def licence_text(card: ModelCard) -> str:
    """The file LICENSE."""
    licence = card.training_data.licence
    known = plain_text(licence) if licence else "not known to segkit: ask the owner of the training data"
    return (
        f"The network was trained on {_training_data(card)}.\n"
        f"Licence of the training data: {known}.\n\n"
        "The configuration files were written by segkit (Apache-2.0).\n"
    )


def readme_text(card: ModelCard) -> str:
    """The file docs/README.md."""
    config = card.preprocessing
    if len(card.modalities) == 1:
        data = "the scans, `*.nii.gz`"
    else:
        names = ", ".join(f"`{name}`" for name in card.modalities)
        data = f"a folder for each case with one `.nii.gz` for each of {names}, whose name ends in the usual suffix"
        data += " (listed under `modalities` in `configs/inference.json`)"
    spacing = "as it is" if config.spacing_mm is None else " x ".join(f"{mm:g}" for mm in config.spacing_mm) + " mm"
    packages = "monai nibabel fire pytorch-ignite" + " scipy" * bool(_rules(card))
    return f"""# {card.network.family}: {", ".join(plain_text(output.name) for output in card.outputs)}

Trained by segkit on {_training_data(card)}. Research only; not a medical device.

    pip install {packages}
    python -m monai.bundle run --config_file configs/inference.json --bundle_root . --dataset_dir DATA --output_dir OUT

`DATA` holds {data}. `OUT` gets one mask for each case, on the grid of its scan; values: {_classes(card)}.

| step | setting |
|---|---|
| orientation | {config.orientation} |
| crop | {config.crop} |
| normalisation | {config.normalisation} |
| spacing | {spacing} |
| window | {" x ".join(map(str, card.patch_size))} voxels, overlap {card.overlap:g} |

The masks are those of `segkit infer` without `--tta`: mirrored inputs are not part of the bundle. Images are read in
the main thread; MONAI's NibabelReader mixes up lists of files that several threads read (as `CacheDataset` does).
"""


def plain_text(text: str) -> str:
    """Text of a card without the signs that MONAI's configurations interpret."""
    return re.sub(r"[^\w .,:;()+/-]", "_", text)


def _training_data(card: ModelCard) -> str:
    cases = f" ({card.training_data.cases} cases)" if card.training_data.cases else ""
    return plain_text(card.training_data.identity) + cases


def _classes(card: ModelCard) -> str:
    values = {value: name for name, value in card.scheme().values.items()}
    return ", ".join(f"{value} {plain_text(name)}" for value, name in sorted(values.items()))
