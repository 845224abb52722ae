"""MONAI bundles in the format of MONAI's model zoo, made with MONAI alone, and MONAI's own evaluator for them."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai.networks.nets
import nibabel as nib
import numpy as np
import torch

SEGRESNET = {
    **{"_target_": "SegResNet", "blocks_down": [1, 1], "blocks_up": [1], "init_filters": 8},
    **{"in_channels": 4, "out_channels": 3, "dropout_prob": 0.2},
}
UNET = {
    **{"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [4, 8]},
    **{"strides": [2], "num_res_units": 2, "norm": "batch"},
}
SWINUNETR = {
    **{"_target_": "SwinUNETR", "spatial_dims": 3, "img_size": 96, "in_channels": 1, "out_channels": 4},
    **{"feature_size": 12, "use_checkpoint": False},
}
BRATS_LAMBDA = "$lambda x: torch.where(x[[2]] > 0, 4, torch.where(x[[0]] > 0, 1, torch.where(x[[1]] > 0, 2, 0)))"

_SAVING = {"output_dir": "@output_dir", "output_ext": ".nii.gz", "output_postfix": "seg", "separate_folder": False}


def transform(name: str, **arguments: object) -> dict[str, Any]:
    """One step of the preprocessing."""
    return {"_target_": name, "keys": "@image_key", **arguments}


LOADING = [transform("LoadImaged"), transform("EnsureChannelFirstd")]
CT = [
    *LOADING,
    transform("Orientationd", axcodes="RAS"),
    transform("Spacingd", pixdim=[1.5, 1.5, 2.0], mode="bilinear"),
    transform("ScaleIntensityRanged", a_min=-57, a_max=164, b_min=0, b_max=1, clip=True),
    transform("EnsureTyped"),
]
"""As in spleen_ct_segmentation."""
WHOLE_BODY = [
    *CT[:4],
    transform("NormalizeIntensityd", nonzero=True),
    transform("ScaleIntensityd", minv=-1.0, maxv=1.0),
]
"""As in wholeBody_ct_segmentation."""
BRATS = [transform("LoadImaged", image_only=False), transform("NormalizeIntensityd", nonzero=True, channel_wise=True)]
"""As in brats_mri_segmentation."""


def softmax_first(*, invert_labels: bool = False) -> list[dict[str, Any]]:
    """The steps of the postprocessing for classes, with labels instead of probabilities inverted if asked."""
    inversion = {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "@image_key"}
    steps = [
        {"_target_": "Activationsd", "keys": "pred", "softmax": True},
        {**inversion, "nearest_interp": invert_labels, "to_tensor": True},
        {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
    ]
    order = (0, 2, 1) if invert_labels else (0, 1, 2)
    return [*(steps[place] for place in order), {"_target_": "SaveImaged", "keys": "pred", **_SAVING}]


def regions() -> list[dict[str, Any]]:
    """The steps of the postprocessing of brats_mri_segmentation."""
    _, inversion, _, saving = softmax_first()
    return [
        {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
        {**inversion, "meta_keys": "pred_meta_dict"},
        {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5},
        {"_target_": "Lambdad", "keys": "pred", "func": BRATS_LAMBDA},
        {**saving, "meta_keys": "pred_meta_dict", "resample": False, "squeeze_end_dims": True},
    ]


def inference(
    network_def: Mapping[str, Any],
    preprocessing: Sequence[Mapping[str, Any]],
    postprocessing: Sequence[Mapping[str, Any]],
    **windows: object,
) -> dict[str, Any]:
    """`configs/inference.json` of a bundle; `@datalist` is a list of dictionaries with an image."""
    return copy.deepcopy(
        {
            "imports": ["$import glob", "$import numpy", "$import os"],
            "bundle_root": ".",
            "image_key": "image",
            "output_dir": "$@bundle_root + '/eval'",
            "load_pretrain": True,
            "datalist": "$list(sorted(glob.glob(@bundle_root + '/data/*.nii.gz')))",
            "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
            "network_def": dict(network_def),
            "network": "$@network_def.to(@device)",
            "preprocessing": {"_target_": "Compose", "transforms": list(preprocessing)},
            "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
            "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
            "inferer": {"_target_": "SlidingWindowInferer", "sw_batch_size": 1, **windows},
            "postprocessing": {"_target_": "Compose", "transforms": list(postprocessing)},
            "handlers": [{"_target_": "StatsHandler", "iteration_log": False}],
            "evaluator": {
                **{"_target_": "SupervisedEvaluator", "device": "@device", "val_data_loader": "@dataloader"},
                **{"network": "@network", "inferer": "@inferer", "postprocessing": "@postprocessing"},
                **{"val_handlers": "@handlers", "amp": True},
            },
            "checkpointloader": {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
            },
            "initialize": ["$@checkpointloader(@evaluator) if @load_pretrain else None"],
            "run": ["$@evaluator.run()"],
        }
    )


def write_bundle(
    folder: Path, document: Mapping[str, Any], channels: Sequence[str], outputs: Sequence[str], seed: int = 0
) -> Path:
    """A bundle with random weights, whose outputs are all somewhere the largest; returns its folder."""
    for name in ("configs", "models"):
        (folder / name).mkdir(parents=True)
    (folder / "configs" / "inference.json").write_text(json.dumps(document, indent=2))
    definitions = {
        name: {key: {"channel_def": {str(number): text for number, text in enumerate(texts)}}}
        for name, key, texts in (("inputs", "image", channels), ("outputs", "pred", outputs))
    }
    metadata = {"version": "0.1.0", "monai_version": "1.4.0", "name": "a bundle", "network_data_format": definitions}
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    torch.save(network_of(document["network_def"], seed).state_dict(), folder / "models" / "model.pt")
    return folder


def network_of(network_def: Mapping[str, Any], seed: int = 0) -> torch.nn.Module:
    """The network with random weights, its last bias small so that no output is the largest everywhere."""
    arguments = {name: value for name, value in network_def.items() if name not in ("_target_", "img_size")}
    torch.manual_seed(seed)
    network: torch.nn.Module = getattr(monai.networks.nets, network_def["_target_"])(**arguments)
    with torch.no_grad():
        list(network.parameters())[-1].fill_(-0.01)
    return network


def evaluate_with_monai(bundle: Path, images: Sequence[Path], out: Path) -> np.ndarray:
    """The mask that `python -m monai.bundle run` would write for one case, in the values and axes of its file."""
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    files = [str(path) for path in images]
    overrides = {"bundle_root": str(bundle), "output_dir": str(out), "device": "cpu"}
    for key, value in {**overrides, "datalist": [{"image": files if len(files) > 1 else files[0]}]}.items():
        parser.set(value, key)
    parser.config["network_def"].pop("img_size", None)  # MONAI 1.5 removed it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's own
        parser.parse(reset=True)
        for key in ("initialize", "run"):
            parser.get_parsed_content(key)
    (mask,) = out.rglob("*.nii.gz")
    array: np.ndarray = np.asanyarray(nib.load(mask).dataobj)
    return array
