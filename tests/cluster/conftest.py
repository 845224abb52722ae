"""A model that opens fast, and scans for it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import onnx
import pytest

from segkit.checkpoint.card import ModelCard
from segkit.labels import SCHEMES, outputs_of

WriteConvolution = Callable[..., Path]


@pytest.fixture
def write_convolution() -> WriteConvolution:
    """Writes a convolution from one channel to three as an ONNX file, its weights in a file of their own if asked."""

    def write(path: Path, *, is_split: bool = False) -> Path:
        weights = np.random.default_rng(1).normal(size=(3, 1, 3, 3, 3)).astype(np.float32)
        image, logits = (
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ("batch", channels, 16, 16, 16))
            for name, channels in (("image", 1), ("logits", 3))
        )
        node = onnx.helper.make_node("Conv", ["image", "weights"], ["logits"], pads=[1] * 6)
        tensor = onnx.numpy_helper.from_array(weights, "weights")
        graph = onnx.helper.make_graph([node], "one", [image], [logits], [tensor])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
        onnx.save_model(model, path, save_as_external_data=is_split, location=f"{path.name}.data", size_threshold=0)
        return path

    return write


@pytest.fixture
def export(tmp_path: Path, write_convolution: WriteConvolution) -> Path:
    """The export of a network that is one convolution, for one modality of BraTS."""
    folder, scheme = tmp_path / "export", SCHEMES["brats2017"]
    folder.mkdir()
    digest = hashlib.sha256(write_convolution(folder / "model.onnx").read_bytes()).hexdigest()
    document = {
        "network": {"family": "revmbunet", "size": "tiny", "in_channels": 1, "out_channels": 3},
        "modalities": ["t1c"],
        "patch_size": [16, 16, 16],
        "divisor": [1, 1, 1],
        "activation": "sigmoid",
        "outputs": [{"name": o.name, "label": o.label, "members": o.members} for o in outputs_of(scheme)],
        "label_scheme": scheme.to_json(),
        "training_data": {"identity": "none", "cases": 0},
        "sha256": digest,
        "export": {
            "opset": 20,
            "graphs": [{"file": "model.onnx", "precision": "fp32", "sha256": {"model.onnx": digest}}],
        },
    }
    card = ModelCard.model_validate(document)
    (folder / "model.json").write_text(card.model_dump_json())
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four cases of BraTS 2021, the last of them cut off."""
    for number in (1, 2, 3, 4):
        folder = tmp_path / "data" / f"BraTS2021_0000{number}"
        folder.mkdir(parents=True)
        values = np.random.default_rng(number).normal(500, 100, (24, 20, 18)).astype(np.float32)
        nib.save(nib.Nifti1Image(values, np.diag([-1.0, -1.0, 1.0, 1.0])), folder / f"{folder.name}_t1ce.nii.gz")
    path = tmp_path / "data" / "BraTS2021_00004" / "BraTS2021_00004_t1ce.nii.gz"
    path.write_bytes(path.read_bytes()[:5000])
    return tmp_path / "data"
