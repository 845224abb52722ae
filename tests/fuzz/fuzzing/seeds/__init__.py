"""Small honest files of every kind that segkit reads, which the mutators start from."""

from __future__ import annotations

from fuzzing.seeds.archives import packed, taped, zipped
from fuzzing.seeds.documents import (
    CARD,
    CONFIG,
    DATASET_MSD,
    DATASET_NNUNET,
    GRAPH_CARD,
    MANIFEST,
    PLANS_JSON,
    SETTINGS,
    as_json,
)
from fuzzing.seeds.graphs import onnx_graph, onnx_network
from fuzzing.seeds.scans import SHAPE, dicom_frames, dicom_slice, itk, mgh, nifti, picture
from fuzzing.seeds.weights import plans_pickle, safetensors_file, torch_file

__all__ = [
    "CARD",
    "CONFIG",
    "DATASET_MSD",
    "DATASET_NNUNET",
    "GRAPH_CARD",
    "MANIFEST",
    "PLANS_JSON",
    "SETTINGS",
    "SHAPE",
    "as_json",
    "dicom_frames",
    "dicom_slice",
    "itk",
    "mgh",
    "nifti",
    "onnx_graph",
    "onnx_network",
    "packed",
    "picture",
    "plans_pickle",
    "safetensors_file",
    "taped",
    "torch_file",
    "zipped",
]
