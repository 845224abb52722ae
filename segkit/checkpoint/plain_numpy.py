"""Numpy values out of pickles that anyone may have made: numbers and arrays of numbers, and nothing else.

Numpy's own makers trust their pickle: `numpy.ndarray` takes any bytes for the addresses of objects, and a type may be
told to hold objects after it was made. What stands in for them here knows types of plain numbers alone.
"""

from __future__ import annotations

from pickle import UnpicklingError
from typing import Any

import numpy as np

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
