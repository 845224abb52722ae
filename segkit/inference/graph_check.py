"""Checks of untrusted ONNX files before a runtime opens them.

A graph can name files of weights by path, and a runtime would follow `../../etc/passwd`; OpenVINO tries other formats
on files that are not ONNX. So the file is parsed here as a protocol buffer (field numbers of onnx.proto, encoding of
protobuf.dev), without a library.
"""

import mmap
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from math import prod
from pathlib import Path

from segkit.errors import CheckpointError

_PARTS: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 9: "opset", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""Message -> field number -> message in it, for all that can contain a tensor or a version."""
_DIMENSIONS, _KEY, _VALUE, _INPUT, _OPERATOR, _DOMAIN, _VERSION = 1, 1, 2, 1, 4, 1, 2
_OPSETS = range(11, 1000)
"""Versions of ONNX's own operators: earlier ones pad differently, and OpenVINO iterates up to the given version."""
_FEWEST_INPUTS = {
    **dict.fromkeys((b"Conv", b"Pad"), 2),
    **dict.fromkeys((b"GlobalAveragePool", b"GlobalMaxPool", b"LogSoftmax", b"Max", b"Mean", b"Min", b"Sum"), 1),
    b"Normalizer": 1,
}
"""Operators with inputs that OpenVINO reads unchecked: if they are missing, the process crashes."""
_VARINT, _EIGHT_BYTES, _TEXT, _FOUR_BYTES = 0, 1, 2, 5
_DEEPEST = 64
_MOST_VALUES_PER_BYTE = 2
"""Of the smallest type, with 4 bits."""


def require_harmless(path: Path, files: Collection[str]) -> None:
    """Check that a graph reads only the named files beside it, and claims no more weights than they hold.

    Raises:
        CheckpointError: it does not, contains a loop, is not an ONNX file, or would crash a runtime.
    """
    stored = sum((path.parent / name).stat().st_size for name in {path.name, *files})
    try:
        # mmap raises ValueError for an empty file.
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(path, data, files, stored).message("model", 0, len(data), 0)
    except (IndexError, ValueError) as error:
        found, remedy = "is not an ONNX file, or is damaged", "Copy the whole folder again"
        raise CheckpointError(found, where=path, remedy=remedy) from error


class _Walk:
    def __init__(self, path: Path, data: mmap.mmap, files: Collection[str], stored: int) -> None:
        self.path, self.data, self.files, self.stored = path, data, files, stored

    def message(self, kind: str, place: int, end: int, depth: int) -> None:
        """Check a message and the messages in it."""
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        parts = _PARTS.get(kind, {})
        shape: list[int] = []
        texts: dict[int, list[bytes]] = defaultdict(list)
        version = 0
        for number, value, start, stop in self._fields(place, end):
            if number in parts and start < stop:
                self.message(parts[number], start, stop, depth + 1)
            elif kind == "tensor" and number == _DIMENSIONS:
                shape += self._varints(start, stop) if value is None else [value]
            elif kind == "opset" and number == _VERSION:
                version = value or 0
            elif kind in ("entry", "node", "opset") and start < stop:
                texts[number].append(self.data[start:stop])
        if kind == "entry" and texts[_KEY][-1:] == [b"location"]:
            location = b"".join(texts[_VALUE][-1:]).decode("utf-8", "replace")
            if location not in self.files:
                raise self._rejected(f"keeps weights in {location!r}", "the files that model.json lists, beside it")
        if kind == "node":
            operator = b"".join(texts[_OPERATOR][-1:])
            if operator == b"Loop":
                raise self._rejected("contains a Loop operator", "a network, which computes a window in one pass")
            if len(texts[_INPUT]) < _FEWEST_INPUTS.get(operator, 0):
                raise ValueError("an operator without its inputs")
        if kind == "opset" and texts[_DOMAIN][-1:] in ([], [b"ai.onnx"]) and version not in _OPSETS:
            raise ValueError("a version of operators that no runtime has")
        if prod(shape) > _MOST_VALUES_PER_BYTE * self.stored:
            claimed = f"claims weights of {' x '.join(map(str, shape))} values"
            raise self._rejected(claimed, f"no more than its files of {self.stored} bytes hold")

    def _rejected(self, finding: str, expected: str) -> CheckpointError:
        remedy = "Do not use this file; export the model again"
        return CheckpointError(f"the graph {finding}", where=self.path, expected=expected, remedy=remedy)

    def _fields(self, place: int, end: int) -> Iterator[tuple[int, int | None, int, int]]:
        """Number and value of each field of a message; of a text no value, but its start and stop."""
        while place < end:
            key, place = self._varint(place)
            number, kind = key >> 3, key & 7
            value, length = None, {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(kind, 0)
            if kind == _VARINT:
                value, place = self._varint(place)
            elif kind == _TEXT:
                length, place = self._varint(place)
            elif not length:
                raise ValueError("a kind of field that is not in use")
            if number == 0 or length > end - place:
                raise ValueError("a field that is longer than its message")
            yield number, value, place, place + (length if kind == _TEXT else 0)
            place += length

    def _varints(self, place: int, end: int) -> Iterator[int]:
        while place < end:
            value, place = self._varint(place)
            yield value

    def _varint(self, place: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, place
        raise ValueError("a number without an end")
