"""Settings, descriptions of data sets, runs and models."""

from __future__ import annotations

import json
from typing import Any

CONFIG = """
# a run
data:
  fold: 0
  layout: msd
  modalities: {t1c: _t1ce, label: _seg}
network: {family: revmbunet, size: base}
training:
  steps: 200
  budget_minutes: 30
optimiser: {lr: 1.0e-3}
"""

SETTINGS = """data.fold=1
data.modalities={t1c: _t1ce}
data.exclude=[a, b]
network.family=unet
network.arguments={widths: [8, 16]}
planning.patch_limit=48
optimiser.lr=1e-3
optimiser.schedule=cosine
training.steps=200
training.budget_minutes=30"""

DATASET_MSD = {
    "name": "stairs",
    "modality": {"0": "FLAIR"},
    "labels": {"0": "background", "1": "edema", "2": "tumour"},
    "training": [
        {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"},
        {"image": "./imagesTr/b.nii.gz", "label": "./labelsTr/b.nii.gz"},
    ],
    "test": ["./imagesTs/c.nii.gz"],
    "licence": "CC0",
}

DATASET_NNUNET = {
    "channel_names": {"0": "FLAIR"},
    "labels": {"background": 0, "whole": [1, 2], "core": [2]},
    "regions_class_order": [1, 2],
    "numTraining": 2,
    "file_ending": ".nii.gz",
    "dataset": {
        "a": {"images": ["imagesTr/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz"},
        "b": {"images": ["imagesTr/b_0000.nii.gz"], "label": "labelsTr/b.nii.gz"},
    },
}

MANIFEST = {
    "cases": [
        {"case": "a", "status": "done", "error": None, "label_scheme": "brats2017", "missing_modalities": []},
        {"case": "b", "status": "failed", "error": "why", "label_scheme": "brats2023", "missing_modalities": ["t1c"]},
    ],
    "summary": {"done": 1, "failed": 1, "skipped": 0, "remaining": 1, "seconds": 1.0},
    "identity": "abc",
    "remaining": ["c"],
    "replacing": [],
    "earlier": [{"case": "d", "status": "skipped", "label_scheme": None, "model": "abc"}],
}

CARD: dict[str, Any] = {
    "task": "segmentation",
    "network": {
        "family": "r2unet",
        "size": None,
        "in_channels": 1,
        "out_channels": 3,
        "arguments": {"widths": [2, 4]},
    },
    "modalities": ["t1c"],
    "patch_size": [8, 8, 8],
    "overlap": 0.5,
    "divisor": [2, 2, 2],
    "spacing_mm": [1.0, 1.0, 2.0],
    "orientation": "RAS",
    "normalisation": "ct-window",
    "ct_window": [0.0, 100.0],
    "ct_mean": 0.0,
    "ct_std": 1.0,
    "mirror_axes": [0, 1],
    "activation": "softmax",
    "outputs": [
        {"name": "background", "label": 0, "members": [0]},
        {"name": "edema", "label": 1, "members": [1]},
        {"name": "tumour", "label": 2, "members": [2]},
    ],
    "label_scheme": {"name": "classes", "labels": {"edema": 1, "tumour": 2}},
    "postprocessing": {
        "rules": [{"output": "edema", "part": "component", "smallest_mm3": 5.0, "dice": [0.5, 0.6]}],
        "cases": 3,
    },
    "versions": {"segkit": "0"},
    "sha256": "",
    "export": {
        "opset": 20,
        "graphs": [{"file": "model.onnx", "precision": "fp32", "sha256": {"model.onnx": ""}, "seconds": {}}],
        "parity": {},
    },
    "training_data": {"identity": "made up", "licence": "CC0", "cases": 3},
}

GRAPH_CARD = {
    **CARD,
    "network": {**CARD["network"], "out_channels": 2},
    "outputs": CARD["outputs"][:2],
    "label_scheme": {"name": "classes", "labels": {"edema": 1}},
}
"""Of an export of the graphs below."""

PLANS_JSON = {
    "dataset_name": "Dataset007_Stairs",
    "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [0, 1, 2],
    "configurations": {
        "3d_fullres": {
            "patch_size": [16, 32, 32],
            "spacing": [3.0, 1.0, 1.0],
            "normalization_schemes": ["ZScoreNormalization"],
            "use_mask_for_norm": [True],
            "pool_op_kernel_sizes": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
        },
        "3d_bigger": {"inherits_from": "3d_fullres", "patch_size": [32, 64, 64]},
    },
    "foreground_intensity_properties_per_channel": {
        "0": {"mean": 40.0, "std": 20.0, "percentile_00_5": -10.0, "percentile_99_5": 90.0}
    },
}


def as_json(document: object) -> bytes:
    """A document as a file."""
    return json.dumps(document).encode()
