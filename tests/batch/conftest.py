"""A cluster of one node, a model that opens fast, and scans for it."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import onnx
import pytest

from segkit.checkpoint.card import ModelCard
from segkit.labels import SCHEMES, outputs_of

WriteConvolution = Callable[..., Path]
VoxelsAndHeaders = Callable[[Path], dict[str, tuple[bytes, bytes]]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster of one node with two cores, which this process is connected to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # it would write a token into the home folder
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray = importlib.import_module("ray")
        ray.init(
            "local",
            num_cpus=2,
            object_store_memory=80 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )
        yield
        ray.shutdown()


@pytest.fixture
def voxels_and_headers() -> VoxelsAndHeaders:
    """All that the images below a folder hold, by their names."""

    def read(folder: Path) -> dict[str, tuple[bytes, bytes]]:
        images = {path.name: nib.load(path) for path in sorted(folder.rglob("[!.]*.nii.gz"))}
        return {name: (np.asarray(one.dataobj).tobytes(), one.header.binaryblock) for name, one in images.items()}

    return read


@pytest.fixture
def write_convolution() -> WriteConvolution:
    """Writes a convolution, by default from one channel to three, as an ONNX file.

    Its weights are in a file of their own if asked.
    """

    def write(path: Path, *, taken: int = 1, given: int = 3, is_split: bool = False) -> Path:
        weights = np.random.default_rng(1).normal(size=(given, taken, 3, 3, 3)).astype(np.float32)
        image, logits = (
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ("batch", channels, 16, 16, 16))
            for name, channels in (("image", taken), ("logits", given))
        )
        node = onnx.helper.make_node("Conv", ["image", "weights"], ["logits"], pads=[1] * 6)
        tensor = onnx.numpy_helper.from_array(weights, "weights")
        graph = onnx.helper.make_graph([node], "one", [image], [logits], [tensor])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
        onnx.save_model(model, path, save_as_external_data=is_split, location=f"{path.name}.data", size_threshold=0)
        return path

    return write


@pytest.fixture
def inpainter(tmp_path: Path, write_convolution: WriteConvolution) -> Callable[[str], Path]:
    """Writes the export of a network for holes in a modality that sees the other hemisphere: one convolution."""

    def write(modality: str) -> Path:
        folder = tmp_path / "inpainter"
        folder.mkdir()
        # The image, where it is missing, the image mirrored, and where that is known.
        digest = _digest(write_convolution(folder / "model.onnx", taken=4, given=1))
        document = {
            "task": "inpainting",
            "network": {"family": "inpainter", "in_channels": 1, "out_channels": 1},
            "modalities": [modality],
            "patch_size": [16, 16, 16],
            "divisor": [1, 1, 1],
            "context": "mirror",
            "training_data": {"identity": "none", "cases": 0},
            **_exported(digest),
        }
        return _with_card(folder, document)

    return write


@pytest.fixture
def export(tmp_path: Path, write_convolution: WriteConvolution) -> Path:
    """The export of a network that is one convolution, for one modality of BraTS."""
    folder, scheme = tmp_path / "export", SCHEMES["brats2017"]
    folder.mkdir()
    digest = _digest(write_convolution(folder / "model.onnx"))
    document = {
        "network": {"family": "revmbunet", "size": "tiny", "in_channels": 1, "out_channels": 3},
        "modalities": ["t1c"],
        "patch_size": [16, 16, 16],
        "divisor": [1, 1, 1],
        "activation": "sigmoid",
        "outputs": [{"name": o.name, "label": o.label, "members": o.members} for o in outputs_of(scheme)],
        "label_scheme": scheme.to_json(),
        "training_data": {"identity": "none", "cases": 0},
        **_exported(digest),
    }
    return _with_card(folder, document)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _exported(digest: str) -> dict[str, object]:
    graph = {"file": "model.onnx", "precision": "fp32", "sha256": {"model.onnx": digest}}
    return {"sha256": digest, "export": {"opset": 20, "graphs": [graph]}}


def _with_card(folder: Path, document: dict[str, object]) -> Path:
    (folder / "model.json").write_text(json.dumps(ModelCard.model_validate(document).to_json()))
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
