"""Tensors in files, and pickled plans."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict

import numpy as np


def safetensors_file() -> bytes:
    """Two tensors."""
    import safetensors.numpy

    data: bytes = safetensors.numpy.save({"a.weight": np.ones((2, 3), np.float32), "b": np.zeros(1, np.int64)})
    return data


def torch_file(document: object = None, *, is_zip: bool = True) -> bytes:
    """A checkpoint as `torch.save` writes it."""
    import torch

    if document is None:
        document = {
            "state_dict": OrderedDict(w=torch.ones(2, 3), b=torch.zeros(2)),
            "epoch": 3,
            "scores": [np.float64(0.5), np.float32(1), np.int64(3)],
            "table": np.arange(6.0).reshape(2, 3),
        }
    stream = io.BytesIO()
    torch.save(document, stream, _use_new_zipfile_serialization=is_zip)
    return stream.getvalue()


def plans_pickle() -> bytes:
    """Plans of nnU-Net 1."""
    plans = {
        "all_classes": [1, 2],
        "dataset_properties": {"intensityproperties": None},
        "modalities": {0: "MRI"},
        "normalization_schemes": OrderedDict([(0, "nonCT")]),
        "num_modalities": 1,
        "plans_per_stage": {
            0: {
                "current_spacing": np.array([1.5, 1.5, 1.5]),
                "patch_size": np.array([16, 16, 16]),
                "pool_op_kernel_sizes": [[2, 2, 2]] * 5,
            }
        },
        "transpose_forward": [np.int64(0), 1, 2],
        "use_mask_for_norm": OrderedDict([(0, np.bool_(False))]),
    }
    init = ("", 0, "", "", False, 0, True, False, True)
    return pickle.dumps(OrderedDict(init=init, name="STUNetTrainer_small", plans=plans))
