"""Graphs in fp16 and int8, made from the float32 graph.

fp16: weights in 16 bits, computation in 32. Half the file, the same speed on a CPU, no overflow of sums.

int8: convolutions in 8 bits, weights scaled per channel, inputs scaled by their extremes on windows of real cases;
outputs are float32, because norms are sensitive. Weights use 7 of the 8 bits, because processors without VNNI add
pairs of products in 16 bits and would saturate.
"""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segkit.errors import RequestError
from segkit.inference.backends import Array
from segkit.inference.graph import INPUT, graph_files, quiet

_WORTH_HALVING = 256
"""Smaller weights stay in 32 bits: biases and norms are sensitive."""


def write_fp16(source: Path, target: Path) -> None:
    """Write the graph `source` with large weights in 16 bits; weights outside the range of 16 bits stay in 32."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(source)
    restored = []
    for tensor in list(model.graph.initializer):
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        if values.size < _WORTH_HALVING or not np.abs(values).max() <= np.finfo(np.float16).max:
            continue
        short = f"{tensor.name}.fp16"
        restored.append(helper.make_node("Cast", [short], [tensor.name], to=TensorProto.FLOAT))
        model.graph.initializer.remove(tensor)
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float16), short))
    nodes = [*restored, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    is_split = len(graph_files(source)) > 1
    onnx.save_model(model, target, save_as_external_data=is_split, location=f"{target.name}.data")


def write_int8(source: Path, target: Path, windows: Sequence[Array]) -> None:
    """Write the graph `source` with convolutions in 8 bits, calibrated on windows (1, C, *window).

    Raises:
        RequestError: onnxruntime is not installed.
    """
    try:
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise RequestError("onnxruntime is not installed", remedy="pip install 'segkit[onnx]'") from error
    is_split = len(graph_files(source)) > 1
    with tempfile.TemporaryDirectory() as folder, quiet(logging.WARNING):  # recommendations of the quantiser
        folded = Path(folder) / source.name  # batch norms are folded into convolutions
        quant_pre_process(source, folded, skip_symbolic_shape=True, save_as_external_data=is_split)
        quantization.quantize_static(
            folded,
            target,
            _CalibrationData(windows),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["Conv"],
            use_external_data_format=is_split,
            extra_options={"OpTypesToExcludeOutputQuantization": ["Conv"]},
        )


class _CalibrationData:
    """Calibration data in the form that the quantiser expects."""

    def __init__(self, windows: Sequence[Array]) -> None:
        self._left = iter(windows)

    def get_next(self) -> dict[str, Any] | None:
        window = next(self._left, None)
        return None if window is None else {INPUT: window}
