"""ONNX graphs, changed field by field as the messages that they are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from fuzzing.mutators.raw import mutated_bytes

_OPERATORS = (
    *("Conv", "Relu", "Identity", "Add", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Resize", "Reshape", "Transpose", "Squeeze", "Pad", "Slice", "Gather", "Cast", "Shape", "Softmax", "Einsum"),
    *("InstanceNormalization", "BatchNormalization", "Constant", "ConstantOfShape", "If", "Loop", "Scan", "NonZero"),
    *("TopK", "Split", "SequenceConstruct", "Optional", "StringNormalizer"),
    *("ConvTranspose", "QuantizeLinear", "DequantizeLinear", "Gemm", "MatMul", "LSTM", "GridSample", "Upsample"),
    *("RandomNormal", "Dropout", "Double", "NoSuchOperator", "", "../x"),
)
_TEXTS: dict[str, tuple[str, ...]] = {
    "op_type": _OPERATORS,
    "domain": ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "local", "org.openvinotoolkit", "x"),
    "key": ("location", "offset", "length", "checksum", "basepath", "x"),
    "value": (
        "model.onnx",
        "model.onnx.data",
        "../../etc/passwd",
        "/etc/passwd",
        "0",
        "8",
        "-1",
        "9" * 30,
        "other",
        "",
    ),
}
_ANY_TEXT = ("", "x", "image", "logits", "w", "../x", "a\0b", "é" * 300, "batch", "x" * 10**5)
_INTEGERS = (0, 1, 2, 3, 5, 7, 8, 16, 64, -1, -2, 1000, 2**31 - 1, -(2**31))
_LONG_INTEGERS = (2**31, 10**6, 10**12, 2**62, 2**63 - 1, -(2**63))
_FLOATS = (0.0, -1.0, 0.5, 1e30, 1e-30, float("nan"), float("inf"))


def mutated_graph(data: bytes, rng: random.Random) -> bytes:
    """One to three fields of a graph set, removed, doubled or taken from elsewhere in it; one time in twenty bytes."""
    import onnx

    if rng.random() < 0.05:
        return mutated_bytes(data, rng)
    model = onnx.ModelProto.FromString(data)
    for _ in range(rng.randint(1, 3)):
        messages = [*_messages(model)]
        message = rng.choice(messages)
        fields = [field for field, _ in message.ListFields()]
        field = rng.choice(fields if fields and rng.random() < 0.7 else message.DESCRIPTOR.fields)
        if field.is_repeated:
            _change_repeated(getattr(message, field.name), field, messages, rng)
        elif rng.random() < 0.15:
            message.ClearField(field.name)
        elif field.message_type is not None:
            _copy_another(getattr(message, field.name), messages, rng)
        else:
            setattr(message, field.name, _scalar(field, messages, rng))
    changed: bytes = model.SerializeToString()
    return changed


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from _messages(inner)


def _change_repeated(values: Any, field: Any, messages: list[Any], rng: random.Random) -> None:
    kind = rng.randrange(4)
    if kind == 0 and len(values):
        del values[rng.randrange(len(values))]
    elif field.message_type is not None:
        added = values.add()
        _copy_another(added, messages, rng)
        if kind == 1:  # to another place, as in a graph whose nodes are not in order
            others = [type(added).FromString(value.SerializeToString()) for value in values]
            rng.shuffle(others)
            del values[:]
            values.extend(others)
    elif kind == 1 and len(values):
        values.append(rng.choice([*values]))
    elif kind == 2 or not len(values):
        values.append(_scalar(field, messages, rng))
    else:
        values[rng.randrange(len(values))] = _scalar(field, messages, rng)


def _copy_another(message: Any, messages: list[Any], rng: random.Random) -> None:
    """Make a message a copy of one of its kind elsewhere, where there is one."""
    alike = [other for other in messages if other.DESCRIPTOR is message.DESCRIPTOR and other is not message]
    if alike:
        copied = rng.choice(alike).SerializeToString()
        message.ParseFromString(copied)


def _scalar(field: Any, messages: list[Any], rng: random.Random) -> Any:
    if field.type == field.TYPE_STRING:
        used = [text for message in messages for text in _names(message)]
        return rng.choice(_TEXTS.get(field.name) or (*used, *_ANY_TEXT))
    if field.type == field.TYPE_BYTES:
        return rng.choice((b"", b"x", bytes(8), bytes(7), b"\x00\x00\x80\x7f" * 2, b"\xff" * 64, bytes(10**5)))
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return rng.choice(_FLOATS)
    if field.enum_type is not None:
        return rng.choice(field.enum_type.values).number
    longs = _LONG_INTEGERS if field.cpp_type == field.CPPTYPE_INT64 else ()
    value = rng.choice((*_INTEGERS, *_INTEGERS, *longs))
    return abs(value) if field.cpp_type in (field.CPPTYPE_UINT64, field.CPPTYPE_UINT32) else value


def _names(message: Any) -> Iterator[str]:
    """Names of a node's inputs and outputs, so that edges lead from anywhere to anywhere."""
    if message.DESCRIPTOR.name == "NodeProto":
        yield from (*message.input, *message.output)
