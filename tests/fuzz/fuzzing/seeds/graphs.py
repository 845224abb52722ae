"""ONNX graphs."""

from __future__ import annotations

import numpy as np


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
    """A graph as a U-net has it: down, up, a skip, a norm; besides a branch and a function of its own."""
    from onnx import TensorProto, helper, numpy_helper

    node, info, kinds = helper.make_node, helper.make_tensor_value_info, TensorProto
    weights = {
        "w": np.ones((2, 1, 3, 3, 3), np.float32) / 27,
        "ones": np.ones(2, np.float32),
        "zeros": np.zeros(2, np.float32),
        "scales": np.array([1, 1, 2, 2, 2], np.float32),
        "mix": np.ones((2, 4, 1, 1, 1), np.float32),
        "yes": np.array(True),
    }
    branches = {
        f"{name}_branch": helper.make_graph([node(operator, ["up"], [name])], name, [], [info(name, kinds.FLOAT, None)])
        for name, operator in {"then": "Relu", "else": "Neg"}.items()
    }
    nodes = [
        node("Conv", ["image", "w"], ["wide"], kernel_shape=[3, 3, 3], pads=[1] * 6),
        node("InstanceNormalization", ["wide", "ones", "zeros"], ["normed"], epsilon=1e-5),
        node("MaxPool", ["normed"], ["down"], kernel_shape=[2, 2, 2], strides=[2, 2, 2]),
        node("Resize", ["down", "", "scales"], ["up"], mode="nearest"),
        node("If", ["yes"], ["chosen"], **branches),
        node("Concat", ["chosen", "normed"], ["both"], axis=1),
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
