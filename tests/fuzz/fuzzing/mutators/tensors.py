"""Files of tensors: safetensors, and torch's in a zip archive or one pickle after another."""

from __future__ import annotations

import io
import json
import pickletools
import random
import re
import struct
import zipfile
from collections import OrderedDict
from math import prod
from typing import Any

from fuzzing.mutators.documents import mutated_json
from fuzzing.mutators.packed import packed_again
from fuzzing.mutators.pickles import PLAIN, Call, Fixed, Name, Stored, as_pickle, first_stored, mutated_pickle
from fuzzing.mutators.raw import mutated_bytes

_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64},
    **{"F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64},
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
_SHAPES = ([], [0], [1], [2, 3], [1] * 70, [0, 2**62], [2**31, 0, 2**31], [5, 1, 1, 1, 1], [3, 5], [1000])
_OFFSETS = (0, 1, 4, 24, -1, 2**31, 2**63, 2**64, 2**64 - 4, 1.5, "0", None)


def mutated_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header changed as a document, or other tensors than it names, in a file of the right length; seldom bytes."""
    if rng.random() < 0.05:
        return mutated_bytes(data, rng)
    length = int.from_bytes(data[:8], "little")
    header, values = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(10)
    if kind < 6:
        header, values = _laid_out(json.loads(header), rng)
    elif kind < 8:
        header = _with_other_offsets(json.loads(header), rng)
    else:
        header = mutated_json(header, rng)
    length = len(header)
    if rng.random() < 0.05:
        length = rng.choice((0, 1, length - 1, length + 1, length + len(values), 10**8 + 1, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + header + values


def _laid_out(document: dict[str, Any], rng: random.Random) -> tuple[bytes, bytes]:
    """Some tensors of other types and shapes, with as many bytes as they take, one behind the other."""
    tensors = {name: entry for name, entry in document.items() if name != "__metadata__"}
    names = [*tensors]
    for name in rng.sample(names, min(len(names), rng.randint(1, 3))):
        kind = rng.randrange(5)
        if kind == 0:
            other = rng.choice(("", "x", f"module.{name}", f"{name}.x", "a\0b", "\u202e", "x" * 10**5))
            tensors[other] = tensors.pop(name)
        elif kind == 1:
            del tensors[name]
        else:
            entry = tensors[name]
            kinds = [entry["dtype"], rng.choice([*_BITS])]
            shapes = [entry["shape"], rng.choice(_SHAPES), entry["shape"][::-1], [*entry["shape"], 1]]
            tensors[name] = {"dtype": rng.choice(kinds), "shape": rng.choice(shapes)}
    place = 0
    for name, entry in tensors.items():
        size = -(-prod(entry["shape"]) * _BITS[entry["dtype"]] // 8)
        tensors[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [place, place + size]}
        place += size
    metadata: Any = rng.choice(({}, {"__metadata__": {"format": rng.choice(("pt", "np", "x" * 10**5, ""))}}))
    values = struct.pack("<f", rng.choice((1.0, 1e38, float("nan")))) * place
    return json.dumps({**metadata, **tensors}).encode(), values[:place]


def _with_other_offsets(document: dict[str, Any], rng: random.Random) -> bytes:
    entries = [entry for name, entry in document.items() if name != "__metadata__"]
    entry, other = rng.choice(entries), rng.choice(entries)
    (start, stop), any_place = entry["data_offsets"], rng.choice(_OFFSETS)
    choices = (other["data_offsets"], [stop, start], [start, any_place], [any_place, stop], [any_place] * 2, [start])
    entry["data_offsets"] = rng.choice(choices)
    return json.dumps(document).encode()


_BYTES = {
    **{"Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Byte": 1, "Bool": 1},
    **{"ComplexFloat": 8, "ComplexDouble": 16, "QInt8": 1, "QUInt8": 1, "QInt32": 4, "QUInt4x2": 1},
}
_FIRST_BYTES = 24
"""Of the first storage of the files that are changed: six numbers of float32."""


def _tensor(shape: list[int], strides: list[int], offset: int = 0, kind: str = "Float", key: str = "0") -> Call:
    """A tensor over the first storage of a file, as torch pickles it."""
    arguments = (_storage(kind, key), offset, Fixed(shape), Fixed(strides), False, OrderedDict())
    return _rebuilt("_rebuild_tensor_v2", *arguments)


def _storage(kind: str, key: str = "0") -> Stored:
    return Stored(["storage", Name(["torch", f"{kind}Storage"]), key, "cpu", _FIRST_BYTES // _BYTES[kind]])


def _rebuilt(name: str, *arguments: Any) -> Call:
    return Call([Name(["torch._utils", name]), Fixed(arguments)])


_FLOAT32, _STRIDED, _SPARSE = Name(["torch", "float32"]), Name(["torch", "strided"]), Name(["torch", "sparse_coo"])
_TENSORS = (
    *(_tensor([2, 3], [3, 1]), _tensor([10**6, 10**6], [0, 0]), _tensor([10**12], [0]), _tensor([7], [1])),
    *(_tensor([6], [1], 1), _tensor([6], [1], -1), _tensor([2], [-1], 3), _tensor([2], [2**62]), _tensor([-1], [1])),
    *(_tensor([0], [1]), _tensor([], []), _tensor([], [], 5)),
    *(_tensor([2**62, 2**62, 0], [0, 0, 0]), _tensor([2], [3, 1])),
    *(_tensor([_FIRST_BYTES // size], [1], kind=kind) for kind, size in _BYTES.items()),
    *(_tensor([6], [1], key=key) for key in ("1", "2", "9", "", "../../etc/passwd", "0/../0", "\0")),
    _rebuilt("_rebuild_meta_tensor_no_storage", _FLOAT32, Fixed([10**6, 10**6]), Fixed([10**6, 1]), False),
    _rebuilt("_rebuild_meta_tensor_no_storage", _FLOAT32, Fixed([2, 3]), Fixed([3, 1]), False),
    _rebuilt("_rebuild_parameter", _tensor([2, 3], [3, 1]), True, OrderedDict()),
    _rebuilt("_rebuild_parameter_with_state", _tensor([2, 3], [3, 1]), True, OrderedDict(), {"x": 1}),
    _rebuilt(
        "_rebuild_sparse_tensor", _SPARSE, Fixed([_tensor([1, 2], [1, 1], kind="Long"), _tensor([2], [1]), Fixed([6])])
    ),
    _rebuilt(
        "_rebuild_sparse_tensor",
        _SPARSE,
        Fixed([_tensor([1, 2], [1, 1], kind="Long"), _tensor([2], [1]), Fixed([10**12]), True]),
    ),
    _rebuilt("_rebuild_nested_tensor", _tensor([6], [1]), *[_tensor([2, 1], [1, 1], kind="Long")] * 3),
    _rebuilt(
        "_rebuild_wrapper_subclass",
        *(Name(["torch", "Tensor"]), _FLOAT32, Fixed([10**6, 10**6]), Fixed([0, 0]), 0, _STRIDED, "cpu", False),
    ),
    _rebuilt("_rebuild_device_tensor_from_cpu_tensor", _tensor([2, 3], [3, 1]), _FLOAT32, "cuda", False),
    _rebuilt("_rebuild_device_tensor_from_numpy", b"x", _FLOAT32, "cpu", False),
    _rebuilt(
        "_rebuild_qtensor",
        *(_storage("QInt8"), 0, Fixed([6]), Fixed([1])),
        *(Fixed([Name(["torch", "per_tensor_affine"]), 0.5, 1]), False, OrderedDict()),
    ),
)
_VALUES = (*PLAIN, *_TENSORS * 10)
_RECORDS = {
    "byteorder": (b"little", b"big", b"", b"x", b"\xff", b"little" * 1000),
    "version": (b"3\n", b"0", b"", b"-1", b"9" * 5000, b"x", b"\xff"),
    ".format_version": (b"1", b"0", b"", b"9" * 50, b"\xff"),
    ".storage_alignment": (b"64", b"0", b"-1", b"1", b"9" * 50, b"x", b""),
    "constants.pkl": (b"\x80\x02.", b""),
    ".data/serialization_id": (b"", b"9" * 5000, b"\xff"),
    "data.pkl": (b"", b".", b"\x80\x02}.", b"\x80\x02N."),
}


def mutated_torch_zip(data: bytes, rng: random.Random) -> bytes:
    """A torch file with another pickle, other records or other storages than it claims, packed as torch packs it."""
    if rng.random() < 0.05:
        return mutated_bytes(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as before:
        members = {info.filename: before.read(info) for info in before.infolist()}
    folder = next(iter(members)).split("/")[0]
    kind = rng.randrange(10)
    if kind < 8:
        pickled = f"{folder}/data.pkl"
        members[pickled] = mutated_pickle(members[pickled], rng, _VALUES)
    if kind >= 7:
        name = rng.choice([*_RECORDS])
        members[f"{folder}/{name}"] = rng.choice(_RECORDS[name])
    if kind == 9:
        storage = rng.choice([name for name in members if "/data/" in name])
        content = members.pop(storage)
        contents = (content[:-1], content * 2, b"", bytes(2**20), bytes(len(content)))
        members[rng.choice((storage, storage, f"{folder}/data/9", "x/data/0"))] = rng.choice(contents)
    compression = zipfile.ZIP_DEFLATED if rng.random() < 0.03 else zipfile.ZIP_STORED
    infos = []
    for name, content in members.items():
        info = zipfile.ZipInfo(name)
        info.compress_type = compression
        infos.append((info, content))
    return packed_again(infos, rng)


def mutated_torch_legacy(data: bytes, rng: random.Random) -> bytes:
    """A torch file of the years before zip: pickles of three numbers and names, the contents, the keys."""
    if rng.random() < 0.1:
        return mutated_bytes(data, rng)
    stream = io.BytesIO(data)
    pickles = [_next_pickle(stream) for _ in range(5)]
    storages = stream.read()
    if rng.random() < 0.8:
        first = first_stored(pickles[3])[2]
        pickles[3] = _with_own_keys(mutated_pickle(pickles[3], rng, _VALUES), first)
    else:
        index = rng.randrange(5)
        pickles[index] = mutated_pickle(pickles[index], rng)
    if rng.random() < 0.1:
        storages = rng.choice(
            (b"", storages[:-4], bytes(len(storages)), b"\xff" * 8 + storages[8:], mutated_bytes(storages, rng))
        )
    return b"".join(pickles) + storages


def _with_own_keys(pickled: bytes, first: str) -> bytes:
    """The persistent ids that were put into a pickle as these files have them: keys are addresses, views come last."""
    key = b"X" + struct.pack("<I", len(first)) + first.encode()
    location = as_pickle("cpu")[2:-1]
    ids = re.compile(re.escape(as_pickle("0")[2:-1] + location) + rb"(J.{4})tQ", re.DOTALL)
    return ids.sub(lambda found: key + location + found[1] + b"NtQ", pickled)


def _next_pickle(stream: io.BytesIO) -> bytes:
    start = stream.tell()
    for _ in pickletools.genops(stream):
        pass
    return stream.getvalue()[start : stream.tell()]
