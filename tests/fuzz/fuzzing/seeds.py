"""Small honest files of every kind that segkit reads, which the mutators start from."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

SHAPE = (4, 3, 2)


def nifti(dtype: str = "<i2", version: int = 1, channels: int = 1, *, has_extension: bool = False) -> bytes:
    """A NIfTI file, not compressed."""
    import nibabel as nib

    shape = SHAPE if channels == 1 else (*SHAPE, channels)
    voxels = (np.arange(np.prod(shape)) % 5).reshape(shape).astype(dtype)
    image = (nib.Nifti1Image if version == 1 else nib.Nifti2Image)(voxels, np.diag([-1.0, -2.0, 3.0, 1.0]))
    if has_extension:
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"some words of the scanner"))
    data: bytes = image.to_bytes()
    return data


def mgh() -> bytes:
    """A FreeSurfer file, not compressed."""
    import nibabel as nib

    data: bytes = nib.MGHImage(np.arange(24, dtype=np.float32).reshape(SHAPE), np.eye(4)).to_bytes()
    return data


def itk(suffix: str, *, is_compressed: bool) -> bytes:
    """An NRRD or MetaImage file."""
    import SimpleITK

    image = SimpleITK.GetImageFromArray(np.arange(24, dtype=np.int16).reshape(SHAPE))
    image.SetSpacing((1.0, 2.0, 3.0))
    return _written(lambda path: SimpleITK.WriteImage(image, path, useCompression=is_compressed), suffix)


def picture(suffix: str, mode: str = "L") -> bytes:
    """A picture of 6 x 5 pixels."""
    import PIL.Image

    grey = PIL.Image.fromarray((np.arange(30, dtype=np.uint8) * 8).reshape(5, 6))
    return _written(lambda path: grey.convert(mode).save(path), suffix)


def dicom_slice(number: int = 0) -> bytes:
    """One slice of a series, its third axis 2 mm a number."""
    import pydicom

    return _dicom(_dicom_base(number, pydicom.uid.MRImageStorage, [0.0, 0.0, 2.0 * number]))


def dicom_frames(count: int = 5) -> bytes:
    """An enhanced multi-frame file."""
    import pydicom

    document = _dicom_base(0, pydicom.uid.EnhancedMRImageStorage, None)
    document.NumberOfFrames = count
    plane, measures, shared = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    measures.PixelSpacing, measures.SliceThickness = [1, 1], 2
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [plane], [measures]
    frames = []
    for number in range(count):
        place, frame = pydicom.Dataset(), pydicom.Dataset()
        place.ImagePositionPatient = [0, 0, 2 * number]
        frame.PlanePositionSequence = [place]
        frames.append(frame)
    document.SharedFunctionalGroupsSequence, document.PerFrameFunctionalGroupsSequence = [shared], frames
    document.PixelData = bytes(2 * 12 * count)
    return _dicom(document)


def _dicom_base(number: int, sop_class: str, position: list[float] | None) -> Any:
    import pydicom

    document = pydicom.Dataset()
    document.file_meta = pydicom.dataset.FileMetaDataset()
    document.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    document.SOPClassUID, document.SOPInstanceUID = sop_class, f"1.2.3.4.{number + 1}"
    document.StudyInstanceUID, document.SeriesInstanceUID, document.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.9"
    document.Modality, document.SeriesNumber, document.InstanceNumber = "MR", 7, number + 1
    if position is not None:
        document.ImagePositionPatient, document.ImageOrientationPatient = position, [1, 0, 0, 0, 1, 0]
        document.PixelSpacing = [1, 1]
    document.Columns, document.Rows = 4, 3
    document.SamplesPerPixel, document.PhotometricInterpretation = 1, "MONOCHROME2"
    document.BitsAllocated = document.BitsStored = 16
    document.HighBit, document.PixelRepresentation = 15, 0
    document.PixelData = bytes(24)
    return document


def _dicom(document: Any) -> bytes:
    stream = io.BytesIO()
    document.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


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


def zipped(members: Mapping[str, bytes], mode: int = 0) -> bytes:
    """A zip file; `mode` is the kind and the permissions that Unix programs note."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def taped(members: Mapping[str, bytes], mode: str = "w", **changes: Any) -> bytes:
    """A tar file, with changes to the entry of each member."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as tape:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in changes.items():
                setattr(info, key, value)
            tape.addfile(info, io.BytesIO(content))
    return packed.getvalue()


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


def onnx_graph(location: str | None = None, shape: tuple[int, ...] = (2, 1, 1, 1, 1), size: int = 8) -> bytes:
    """A graph of one convolution; with `location` its weights, said to be of `shape`, are in that file."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((2, 1, 1, 1, 1), np.float32), "w")
    if location is not None:
        weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=shape)
        weight.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": "0", "length": str(size)}.items():
            weight.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "w"], ["logits"], kernel_shape=[1, 1, 1])],
        "graph",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2, 8, 8, 8])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx_bytes: bytes = model.SerializeToString()
    assert onnx.load_from_string(onnx_bytes, format="protobuf") is not None
    return onnx_bytes


def onnx_network(*, has_function: bool) -> bytes:
    """A graph as a U-net has it: down, up, a skip, a norm; besides a branch, a loop and a function of its own."""
    from onnx import TensorProto, helper, numpy_helper

    node, info, kinds = helper.make_node, helper.make_tensor_value_info, TensorProto
    weights = {
        "w": np.ones((2, 1, 3, 3, 3), np.float32) / 27,
        "ones": np.ones(2, np.float32),
        "zeros": np.zeros(2, np.float32),
        "scales": np.array([1, 1, 2, 2, 2], np.float32),
        "mix": np.ones((2, 4, 1, 1, 1), np.float32),
        "yes": np.array(True),
        "twice": np.array(2, np.int64),
    }
    branches = {
        f"{name}_branch": helper.make_graph([node(operator, ["up"], [name])], name, [], [info(name, kinds.FLOAT, None)])
        for name, operator in {"then": "Relu", "else": "Neg"}.items()
    }
    step = helper.make_graph(
        [node("Identity", ["go"], ["on"]), node("Relu", ["before"], ["after"])],
        "step",
        [info("i", kinds.INT64, []), info("go", kinds.BOOL, []), info("before", kinds.FLOAT, None)],
        [info("on", kinds.BOOL, []), info("after", kinds.FLOAT, None)],
    )
    nodes = [
        node("Conv", ["image", "w"], ["wide"], kernel_shape=[3, 3, 3], pads=[1] * 6),
        node("InstanceNormalization", ["wide", "ones", "zeros"], ["normed"], epsilon=1e-5),
        node("MaxPool", ["normed"], ["down"], kernel_shape=[2, 2, 2], strides=[2, 2, 2]),
        node("Resize", ["down", "", "scales"], ["up"], mode="nearest"),
        node("If", ["yes"], ["chosen"], **branches),
        node("Loop", ["twice", "yes", "chosen"], ["looped"], body=step),
        node("Concat", ["looped", "normed"], ["both"], axis=1),
        node("Conv", ["both", "mix"], ["mixed"]),
        node("Twofold", ["mixed"], ["logits"], domain="local") if has_function else node("Relu", ["mixed"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [info("image", kinds.FLOAT, ["batch", 1, 8, 8, 8])],
        [info("logits", kinds.FLOAT, ["batch", 2, 8, 8, 8])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    twofold = helper.make_function("local", "Twofold", ["x"], ["y"], [node("Add", ["x", "x"], ["y"])], opsets[:1])
    model = helper.make_model(graph, opset_imports=opsets, functions=[twofold], ir_version=10)
    onnx_bytes: bytes = model.SerializeToString()
    return onnx_bytes


def packed(data: bytes) -> bytes:
    """A gzip stream, the same at every time of day."""
    return gzip.compress(data, mtime=0)


def as_json(document: object) -> bytes:
    """A document as a file."""
    return json.dumps(document).encode()


def _written(write: Callable[[str], object], suffix: str) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"seed{suffix}"
        write(str(path))
        return path.read_bytes()
