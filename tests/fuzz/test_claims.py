"""Files that claim more than they hold, or are not what they are used for: each is refused before it costs much."""

from __future__ import annotations

import copy
import hashlib
import io
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from fuzzing import seeds

from segkit.checkpoint.tensors import load_weights_file, read_torch
from segkit.errors import CheckpointError
from segkit.inference import backend_loading as opening
from segkit.inference.backend_loading import GuardedBackend
from segkit.inference.backends import Array
from segkit.inference.graph_check import require_harmless
from segkit.inference.predictor import Predictor


class Counted:
    """Pickles to the ordered dictionary of what is in a tensor, for which torch makes every row."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (self.rows,)


def with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is pickled in another way, for what was written on it."""
    tensor.note = "x"  # type: ignore[attr-defined]
    return tensor


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"w": torch.ones(1).expand(10**6, 10**6)}, "claims a tensor of 1000000 x 1000000 values, and holds 1 of them"),
        (
            {"w": torch.ones(2), "x": Counted(torch.ones(1).expand(10**9, 1))},
            "claims a tensor of 1000000000 x 1 values",
        ),
        ({"w": with_attribute(torch.ones(1).expand(10**7))}, "claims a tensor of 10000000 values, and holds 1 of them"),
        ({"w": torch.ones(0).expand(10**9, 0)}, "claims a tensor of 1000000000 x 0 values, and holds 0 of them"),
        ({"w": torch.empty(2, 3, device="meta")}, r"of a special kind \(meta_tensor_no_storage\)"),
        ({"w": torch.ones(2).to_sparse()}, r"of a special kind \(sparse_tensor\)"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "w is of complex64; expected numbers of a common type"),
    ],
)
def test_tensors_are_plain_and_in_the_file(
    tmp_path: Path, document: dict[str, Any], message: str, is_zip: bool
) -> None:
    (tmp_path / "x.pth").write_bytes(seeds.torch_file(document, is_zip=is_zip))
    with pytest.raises(CheckpointError, match=message):
        load_weights_file(tmp_path / "x.pth")


@pytest.mark.parametrize("is_zip", [True, False])
def test_what_checkpoints_hold_is_read(tmp_path: Path, is_zip: bool) -> None:
    state: dict[str, Any] = {
        "spread": torch.ones(1).expand(100),
        "view": torch.arange(6.0)[1:3],
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        "noted": with_attribute(torch.ones(2)),
        "none": torch.ones(0, 3),
        "half": torch.ones(2, dtype=torch.float16),
    }
    optimizer = torch.optim.AdamW([state["parameter"]])
    state["parameter"].sum().backward()
    optimizer.step()
    document = {"model": state, "optimizer": optimizer.state_dict(), "size": torch.Size([2, 3]), "type": torch.float16}
    (tmp_path / "x.pth").write_bytes(seeds.torch_file(document, is_zip=is_zip))
    found = load_weights_file(tmp_path / "x.pth")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in state.items()
    }
    assert read_torch(tmp_path / "x.pth")["size"] == (2, 3)


def test_a_zip_file_has_one_directory(tmp_path: Path) -> None:
    from make_corpus import two_directories

    shown, hidden = (seeds.torch_file({"w": torch.full((2,), number)}) for number in (1.0, 2.0))
    data = two_directories(shown, hidden)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.read("archive/data/0") == np.full(2, 1, np.float32).tobytes()
    assert torch.load(io.BytesIO(data))["w"].tolist() == [2, 2], "the file would not have deceived anyone"
    elsewhere = shown[:-34] + bytes(8) + shown[-26:]  # the record that says where the directory is, said to be at 0
    for deceiving in (data, elsewhere, shown + b"x"):
        (tmp_path / "x.pth").write_bytes(deceiving)
        with pytest.raises(CheckpointError, match="the directory of its parts is not at its end"):
            read_torch(tmp_path / "x.pth")


def test_weights_of_odd_types_are_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="w is of float8_e4m3fn"):
        load_weights_file(tmp_path / "x.safetensors")


def test_graphs_that_end_their_runtime_or_never_end_are_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "model.onnx"
    for version, is_refused in {2**31: True, 10: True, 11: False, 25: False}.items():
        model = onnx.load_from_string(seeds.onnx_graph())
        model.opset_import[0].version = version
        model.opset_import.add(domain="com.microsoft", version=1)
        path.write_bytes(model.SerializeToString())
        if is_refused:
            with pytest.raises(CheckpointError, match="is not an ONNX file, or is damaged"):
                require_harmless(path, [path.name])
        else:
            require_harmless(path, [path.name])
    model.graph.node[0].op_type = "Loop"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="the graph contains a Loop operator"):
        require_harmless(path, [path.name])
    model.graph.node[0].op_type = "Conv"
    del model.graph.node[0].input[1]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="is not an ONNX file, or is damaged"):
        require_harmless(path, [path.name])


class Given:
    """A backend that gives the same whatever it is asked."""

    name, threads, device = "given", 1, "cpu"

    def __init__(self, logits: Any) -> None:
        self.logits = logits

    def __call__(self, windows: Array) -> Array:
        found: Array = self.logits
        return found


def test_logits_are_held_to_their_shape(tmp_path: Path) -> None:
    window = np.zeros((1, 3, 8, 8, 8), np.float32)
    right = np.ones((1, 2, 8, 8, 8), np.float32)
    assert GuardedBackend(Given(right), tmp_path / "model.onnx", 2)(window) is right
    for wrong, message in {
        "one class": (right[:, :1], r"gives float32 of shape \(1, 1, 8, 8, 8\)"),
        "fewer voxels": (right[..., 1:], r"gives float32 of shape \(1, 2, 8, 8, 7\)"),
        "other numbers": (right.astype(np.int64), r"gives int64 of shape \(1, 2, 8, 8, 8\)"),
    }.values():
        with pytest.raises(CheckpointError, match=f"model.onnx: the graph {message}; expected logits"):
            GuardedBackend(Given(wrong), tmp_path / "model.onnx", 2)(window)


def write_export(folder: Path, graph: bytes) -> Path:
    """An export whose card is right about its graph."""
    folder.mkdir()
    (folder / "model.onnx").write_bytes(graph)
    card = copy.deepcopy(seeds.GRAPH_CARD)
    card["export"]["graphs"][0]["sha256"] = {"model.onnx": hashlib.sha256(graph).hexdigest()}
    (folder / "model.json").write_bytes(seeds.as_json(card))
    return folder


def test_openvino_is_given_what_onnx_runtime_has_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO does not look whether shapes fit: of this transposed convolution it makes logits of no voxels."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    model = onnx.load_from_string(seeds.onnx_graph())
    model.graph.node[0].op_type = "ConvTranspose"  # of two channels, while the image has one
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            axis.dim_param = "any"
    with monkeypatch.context() as patch:
        patch.setattr(opening, "open_graph", lambda *_, **__: pytest.fail("it was given the graph"))
        with pytest.raises(CheckpointError, match="the graph cannot be computed"):
            Predictor.load(write_export(tmp_path / "hostile", model.SerializeToString()), "cpu", "openvino")
    export = write_export(tmp_path / "honest", seeds.onnx_graph())
    assert Predictor.load(export, "cpu", "openvino").backend.name == "openvino"
    monkeypatch.setattr(opening, "OnnxRuntimeBackend", lambda *_: pytest.fail("it is known already"))
    assert Predictor.load(export, "cpu", "openvino").backend.name == "openvino"
