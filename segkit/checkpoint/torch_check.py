"""What a torch file claims, found out before torch reads it.

torch looks whether a pickle names code, and believes the rest: it makes room for what packed parts unpack to, and takes
six numbers for a million million, which fill the memory as soon as anything goes through them. So the pickle is read
here once with everything it names left out.

Numpy values out of pickles that anyone may have made: numbers and arrays of numbers, and nothing else.

Numpy's own makers trust their pickle: `numpy.ndarray` takes any bytes for the addresses of objects, and a type may be
told to hold objects after it was made. What stands in for them here knows types of plain numbers alone.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
import zipfile
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import numpy as np

from segkit.errors import CheckpointError

_ZIP_MAGIC = b"PK\x03\x04"
_PICKLES_OF_LEGACY_FILES = 5
"""A number, a version, a machine, the contents and the keys of the storages, which come after them."""
_REBUILT = "torch._utils._rebuild_"
_REBUILT_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"
"""Is given one of the others, and with what to call it."""
_MAKERS = {
    *("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state"),
    *("device_tensor_from_cpu_tensor", "device_tensor_from_numpy"),
}
"""Those of tensors whose numbers are in the file; sparse ones and such as have no numbers are none of weights."""
_MOST_SPREAD_VALUES = 10_000
"""A number may stand for as many; networks keep small constants so."""


def is_zip(path: Path) -> bool:
    """Whether torch takes a file for a zip archive, by its first bytes."""
    with path.open("rb") as stream:
        return stream.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def require_modest(path: Path) -> None:
    """Do nothing if a torch file claims no more than it holds.

    Raises:
        CheckpointError: parts of it are packed, or tensors are larger than their storages, or no plain ones.
        pickle.UnpicklingError, OSError, zipfile.BadZipFile and others: it is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        if not is_zip(path):
            for _ in range(_PICKLES_OF_LEGACY_FILES):
                _look_at(stream, path, size)
            return
        _require_one_directory(path, stream, size)
        with zipfile.ZipFile(stream) as archive:
            parts = archive.infolist()
            _require_unpacked(path, parts, size)
            for part in parts:
                if part.filename.lower().endswith("data.pkl"):  # torch finds it in capitals as well
                    with archive.open(part) as pickled:
                        _look_at(pickled, path, size)


def require_dense_memo(stream: IO[bytes], size: int) -> None:
    """UnpicklingError where values have larger numbers than the file has bytes: up to these, room would be made."""
    start = stream.tell()
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name.endswith("PUT") and int(argument or 0) > size:
            raise pickle.UnpicklingError("its values are numbered beyond their count")
    stream.seek(start)


def _require_one_directory(path: Path, stream: IO[bytes], size: int) -> None:
    """Refuse a zip file whose directory does not end where its end begins: readers then find different ones in it.

    The end is a record of 22 bytes; of large files, and of all that torch writes, a wider one of 56 bytes stands before
    it, and 20 bytes that say where that one is (APPNOTE.TXT 4.3.14 to 4.3.16).
    """
    stream.seek(max(0, size - 98))
    tail = stream.read()
    (length, start), stop, found = struct.unpack("<2I", tail[-10:-2]), size - 22, size - 98
    if tail[-42:-38] == b"PK\x06\x07":
        (length, start), stop = struct.unpack("<2Q", tail[-58:-42]), size - 98
        (found,) = struct.unpack("<Q", tail[-34:-26])
    if tail[-22:-18] != b"PK\x05\x06" or start + length != stop or found != size - 98:
        raise CheckpointError("is damaged (the directory of its parts is not at its end)", where=path)


def _require_unpacked(path: Path, parts: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse packed parts: torch never packs them, and a few kB would unpack to gigabytes."""
    total = sum(part.file_size for part in parts)
    if total > size or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise CheckpointError(
            f"its parts are packed and unpack to {total} bytes",
            where=path,
            expected="a file as torch writes it, which packs nothing",
            remedy="Save it again with torch.save, or convert it to safetensors where it was made",
        )


def _look_at(stream: IO[bytes], path: Path, size: int) -> None:
    require_dense_memo(stream, size)
    try:
        _Outline(stream, size).load()
    except _ClaimError as claim:
        raise CheckpointError(
            str(claim),
            where=path,
            expected="plain tensors whose numbers are in the file",
            remedy="Save it again with contiguous tensors, or convert it to safetensors where it was made",
        ) from claim


class _ClaimError(Exception):
    """Something that the file cannot hold."""


class _Outline(pickle.Unpickler):
    """A pickle in which every name stands for something that does nothing, but for the claims of tensors."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        super().__init__(stream)
        self.size = size

    def find_class(self, module: str, name: str) -> Any:
        return type("Nothing", (_Nothing,), {"path": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case (_, _, _, _, int(values), *_) if values > self.size:
                raise _ClaimError(f"claims {values} values in a file of {self.size} bytes")
        return pid


def _require_stored(arguments: tuple[Any, ...]) -> None:
    """Refuse a tensor, (persistent id of its storage, offset, shape, strides ...), that is larger than its storage."""
    match arguments:
        case ((_, _, _, _, int(values), *_), _, tuple(shape), tuple(_), *_) if {*map(type, shape)} <= {int}:
            if prod(max(1, length) for length in shape) > max(values, _MOST_SPREAD_VALUES):
                claimed = " x ".join(map(str, shape))
                raise _ClaimError(f"claims a tensor of {claimed} values, and holds {values} of them")
        case (tuple(_), *_):
            raise _ClaimError("holds a tensor that no torch has written")
        case _:
            raise pickle.UnpicklingError("a tensor with a storage of its own")


class _Nothing:
    """What a pickle makes of a name: it takes whatever it is given, and keeps nothing."""

    path = ""

    def __new__(cls, *arguments: Any) -> _Nothing:
        kind = cls.path.removeprefix(_REBUILT)
        if kind != cls.path and kind not in _MAKERS:
            raise _ClaimError(f"holds a tensor of a special kind ({kind})")
        if kind.startswith("tensor"):
            _require_stored(arguments)
        elif kind == _REBUILT_WITH_ATTRIBUTES:
            function, _, inner, *_ = arguments
            function(*inner)
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __call__(self, *_: Any) -> _Nothing:
        """A method, as code in a file calls it: torch refuses the name that it came by."""
        return self

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...


_CODES = {f"{kind}{size}" for kind, sizes in {"i": "1248", "u": "1248", "f": "248"}.items() for size in sizes} | {"b1"}
"""Kind and bytes of every type of number that weights, plans and scores are kept in."""


class NumberType:
    """Stands in for `numpy.dtype`: made from a code such as "f8", then told its byte order."""

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or code not in _CODES:
            raise UnpicklingError(f"{code!r} is no type of plain numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(">" if state[1] == ">" else "<")


class NumberArray(np.ndarray[Any, Any]):
    """Stands in for `numpy.ndarray`: empty whatever it is asked for, until it is told its numbers."""

    def __new__(cls, *_: object) -> NumberArray:
        """An empty one."""
        return super().__new__(cls, (0,), np.uint8)

    def __setstate__(self, state: Any) -> None:
        version, shape, kind, is_fortran, raw = state
        if not isinstance(kind, NumberType) or not isinstance(raw, bytes):
            raise UnpicklingError("an array of anything but plain numbers")
        numbers: Any = (version, shape, kind.dtype, bool(is_fortran), raw)
        super().__setstate__(numbers)


def number_array(*_: object) -> NumberArray:
    """Stands in for `numpy._core.multiarray._reconstruct`."""
    return NumberArray()


def number(kind: NumberType, raw: bytes) -> Any:
    """Stands in for `numpy._core.multiarray.scalar`."""
    if not isinstance(kind, NumberType) or not isinstance(raw, bytes) or len(raw) != kind.dtype.itemsize:
        raise UnpicklingError("a number of no plain type")
    return np.frombuffer(raw, kind.dtype)[0]


MAKERS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): NumberType,
    ("numpy", "ndarray"): NumberArray,
    # Numpy renamed the room in version 2.
    **{(room, "scalar"): number for room in ("numpy.core.multiarray", "numpy._core.multiarray")},
    **{(room, "_reconstruct"): number_array for room in ("numpy.core.multiarray", "numpy._core.multiarray")},
}
"""Stand-in by the module and name that a pickle gives."""
