"""Checks of untrusted torch files before torch reads them, and safe replacements for numpy's classes in pickles.

torch rejects pickles that name code, but allocates what compressed parts unpack to, and accepts tensors of far more
values than their storage holds. So pickles are read here first, with every name replaced by a class that does nothing.

`numpy.ndarray` accepts any bytes as addresses of objects, and the type of an array can be changed to objects later.
The replacements accept types of plain numbers only.
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
"""Magic number, version, machine, contents and storage keys; the storages follow."""
_REBUILT = "torch._utils._rebuild_"
_REBUILT_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"
"""Called with one of the others and its arguments."""
_MAKERS = {
    *("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state"),
    *("device_tensor_from_cpu_tensor", "device_tensor_from_numpy"),
}
"""Of tensors with values in the file, not of sparse or empty ones."""
_MOST_SPREAD_VALUES = 10_000
"""Allowed size of a tensor expanded from fewer values, as small constants of networks are."""


def is_zip(path: Path) -> bool:
    """Whether torch reads a file as a zip archive: by its first bytes."""
    with path.open("rb") as stream:
        return stream.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def require_modest(path: Path) -> None:
    """Reject a torch file that claims more than it holds.

    Raises:
        CheckpointError: parts are compressed, or tensors are larger than their storages or not plain.
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
            # torch never packs parts, and a few kB could unpack to gigabytes.
            total = sum(part.file_size for part in parts)
            if total > size or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                raise CheckpointError(
                    f"its parts are packed and unpack to {total} bytes",
                    where=path,
                    expected="a file as torch writes it, which packs nothing",
                    remedy="Save it again with torch.save, or convert it to safetensors first",
                )
            for part in parts:
                if part.filename.lower().endswith("data.pkl"):  # torch ignores case
                    with archive.open(part) as pickled:
                        _look_at(pickled, path, size)


def require_dense_memo(stream: IO[bytes], size: int) -> None:
    """UnpicklingError if memo indices exceed the file's bytes: the unpickler would allocate up to them."""
    start = stream.tell()
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name.endswith("PUT") and int(argument or 0) > size:
            raise pickle.UnpicklingError("its values are numbered beyond their count")
    stream.seek(start)


def _require_one_directory(path: Path, stream: IO[bytes], size: int) -> None:
    """Reject a zip file whose directory does not end at the end record: different readers find different directories.

    The end record has 22 bytes; in large files, and all that torch writes, a ZIP64 record of 56 bytes and its locator
    of 20 bytes precede it (APPNOTE.TXT 4.3.14 to 4.3.16).
    """
    stream.seek(max(0, size - 98))
    tail = stream.read()
    (length, start), stop, found = struct.unpack("<2I", tail[-10:-2]), size - 22, size - 98
    if tail[-42:-38] == b"PK\x06\x07":
        (length, start), stop = struct.unpack("<2Q", tail[-58:-42]), size - 98
        (found,) = struct.unpack("<Q", tail[-34:-26])
    if tail[-22:-18] != b"PK\x05\x06" or start + length != stop or found != size - 98:
        raise CheckpointError("is damaged (the directory of its parts is not at its end)", where=path)


def _look_at(stream: IO[bytes], path: Path, size: int) -> None:
    require_dense_memo(stream, size)
    try:
        _Outline(stream, size).load()
    except _ClaimError as claim:
        raise CheckpointError(
            str(claim),
            where=path,
            expected="plain tensors whose numbers are in the file",
            remedy="Save it again with contiguous tensors, or convert it to safetensors first",
        ) from claim


class _ClaimError(Exception):
    """The file claims more than it can hold."""


class _Outline(pickle.Unpickler):
    """Loads a pickle with classes that do nothing, and checks the claimed sizes of tensors."""

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
    """Reject a tensor, (persistent id of its storage, offset, shape, strides ...), larger than its storage."""
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
    """Replaces a class or function of a pickle: accepts any arguments, keeps nothing."""

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
        return self

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...


_CODES = {f"{kind}{size}" for kind, sizes in {"i": "1248", "u": "1248", "f": "248"}.items() for size in sizes} | {"b1"}
"""Kind and bytes of the number types of weights, plans and scores."""


class NumberType:
    """Replaces `numpy.dtype`: created with a code such as "f8"; its state has the byte order."""

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or code not in _CODES:
            raise UnpicklingError(f"{code!r} is not a type of plain numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(">" if state[1] == ">" else "<")


class NumberArray(np.ndarray[Any, Any]):
    """Replaces `numpy.ndarray`: created empty; its state has the values."""

    def __new__(cls, *_: object) -> NumberArray:
        """An empty array."""
        return super().__new__(cls, (0,), np.uint8)

    def __setstate__(self, state: Any) -> None:
        version, shape, kind, is_fortran, raw = state
        if not isinstance(kind, NumberType) or not isinstance(raw, bytes):
            raise UnpicklingError("an array of anything but plain numbers")
        numbers: Any = (version, shape, kind.dtype, bool(is_fortran), raw)
        super().__setstate__(numbers)


def number_array(*_: object) -> NumberArray:
    """Replaces `numpy._core.multiarray._reconstruct`."""
    return NumberArray()


def number(kind: NumberType, raw: bytes) -> Any:
    """Replaces `numpy._core.multiarray.scalar`."""
    if not isinstance(kind, NumberType) or not isinstance(raw, bytes) or len(raw) != kind.dtype.itemsize:
        raise UnpicklingError("a number of no plain type")
    return np.frombuffer(raw, kind.dtype)[0]


MAKERS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): NumberType,
    ("numpy", "ndarray"): NumberArray,
    # Numpy 2 renamed the module.
    **{(room, "scalar"): number for room in ("numpy.core.multiarray", "numpy._core.multiarray")},
    **{(room, "_reconstruct"): number_array for room in ("numpy.core.multiarray", "numpy._core.multiarray")},
}
"""(Module, name) in a pickle -> its replacement."""
