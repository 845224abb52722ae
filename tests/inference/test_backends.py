"""Runtimes for ONNX files leave the process as they found it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from segkit.inference.backends import OpenvinoBackend

onnx = pytest.importorskip("onnx")
pytest.importorskip("openvino")

_A_SIGNAL_AFTER_TWO_NETWORKS = """
import faulthandler, os, signal, sys
from pathlib import Path
from segkit.inference.backends import OpenvinoBackend

faulthandler.enable()  # signals are handled on a stack of their own from here on
signal.signal(signal.SIGUSR1, lambda *_: print("heard"))
first, second = (OpenvinoBackend(Path(sys.argv[1]), threads=1) for _ in range(2))
del first
del second
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A network that doubles each voxel, as an ONNX file."""
    shape = [1, 1, 4, 4, 4]
    image, logits = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("image", "logits")
    )
    node = onnx.helper.make_node("Add", ["image", "image"], ["logits"])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "double", [image], [logits]),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=9,
    )
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))
    return path


def test_openvino_computes_one_window_after_the_other(graph: Path) -> None:
    windows = np.arange(128, dtype=np.float32).reshape(2, 1, 4, 4, 4)
    assert np.array_equal(OpenvinoBackend(graph, threads=1)(windows), 2 * windows)


@pytest.mark.skipif(sys.platform == "win32", reason="the system has no signals of this kind")
def test_signals_are_heard_after_networks_in_openvino_are_gone(graph: Path) -> None:
    """Ctrl-C, and the end of each worker that reads cases, are such signals."""
    done = subprocess.run(
        [sys.executable, "-c", _A_SIGNAL_AFTER_TWO_NETWORKS, str(graph)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr
