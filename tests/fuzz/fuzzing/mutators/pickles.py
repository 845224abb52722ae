"""Pickles, read as the tree of calls that they stand for, changed, and written again; or changed opcode by opcode.

Nothing that a pickle names is imported or run here: a name stays a name, and a call says what is called with what.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import random
import struct
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from fuzzing.mutators.raw import mutated_bytes
from fuzzing.mutators.trees import VALUES, Whole, mutated_tree, places_of


class Fixed(list[Any]):
    """A tuple, as a list that can be changed."""


class Stored(list[Any]):
    """A persistent id: what torch says of a storage, ("storage", type, key, location, number of values)."""


class Call(Whole):
    """What is called, what with, and the state that the result is then given, where there is one."""

    def __setstate__(self, state: Any) -> None:
        self.append(state)


class Name(Whole):
    """Something by its module and its name."""

    def __call__(self, *arguments: Any) -> Call:
        """The call of it, which is not made."""
        return Call([self, Fixed(arguments)])


_NAMES = [
    Name(path.rsplit(" ", 1))
    for path in (
        *("os system", "posix system", "os mkdir", "subprocess Popen", "builtins eval", "__builtin__ eval"),
        *("builtins exec", "builtins getattr", "builtins __import__", "builtins open", "builtins dict", "sys exit"),
        *("pickle loads", "pickle Unpickler", "runpy run_path", "shutil rmtree", "pathlib Path", "functools partial"),
        *("operator attrgetter", "collections OrderedDict", "collections Counter", "collections deque"),
        *("_codecs encode", "codecs decode", "copyreg _reconstructor", "copyreg __newobj__", "builtins bytearray"),
        *("numpy ndarray", "numpy dtype", "numpy load", "numpy memmap", "numpy.core.multiarray scalar"),
        *("numpy._core.multiarray _reconstruct", "numpy._core.multiarray scalar", "numpy.core.numeric _frombuffer"),
        *("numpy.f2py.crackfortran myeval", "torch load", "torch.hub load", "torch.serialization load"),
        *("torch.storage _load_from_bytes", "torch.storage UntypedStorage", "torch.storage TypedStorage"),
        *("torch FloatStorage", "torch device", "torch Size", "torch dtype", "torch float16", "torch Tensor"),
        *("torch.nn.parameter Parameter", "torch._tensor _rebuild_from_type_v2"),
        *("torch.jit load", "torch.fx GraphModule"),
        *("torch._utils _rebuild_tensor", "torch._utils _rebuild_parameter", "torch._utils _rebuild_qtensor"),
        *("segkit.checkpoint.tensors read_torch", "__main__ Burglar", " ", "os path.join", "\u00e9 x"),
    )
]
PLAIN: tuple[Any, ...] = (
    *VALUES * 10,
    *_NAMES,
    *(name("canary") for name in _NAMES),
    *(Fixed(), Fixed([1]), Fixed([Fixed([0])] * 3), b"", b"AAAAAAAA", bytes(1000), 2**2000, -(2**63), OrderedDict(a=1)),
)
_OPCODES = (
    *(b"R", b"b", b"\x81", b"o", b"0", b"1", b"2", b"(", b".", b"t", b"\x85", b"\x86", b"\x87", b")", b"]", b"}", b"l"),
    *(b"d", b"a", b"e", b"s", b"u", b"\x90", b"\x91", b"\x8f"),
    *(b"\x93", b"\x94", b"Q", b"Pos\n", b"N", b"\x88", b"\x92"),
    *(b"h\x00", b"h\xff", b"q\x00", b"q\xff", b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f", b"g0\n", b"p9999999999\n"),
    *(b"\x80\x05", b"\x80\xff", b"\x82\x01", b"\x84\xff\xff\xff\x7f", b"\x97", b"\x98", b"\x95" + b"\xff" * 8),
    *(b"cos\nsystem\n", b"(ios\nsystem\n", b"\x8c\x02os\x8c\x06system\x93"),
    *(b"\x8d" + b"\xff" * 8, b"\x8e" + b"\xff" * 8),
    *(b"\x8b\xff\xff\xff\x7f", b"\x8a\x00", b"L99999999999999999999L\n", b"I01\n"),
    *(b"Fnan\n", b"S'\\x41'\n", b"V\\ud800\n"),
    *(b"B\xff\xff\xff\xff", b"C\x00", b"T\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"\x96" + b"\xff" * 8),
)


def mutated_pickle(data: bytes, rng: random.Random, values: Sequence[Any] = PLAIN) -> bytes:
    """Three times in four changed as a tree, `values` among what is put into it; else opcode by opcode, or as bytes."""
    kind = rng.randrange(12)
    if kind == 0:
        return mutated_bytes(data, rng)
    if kind < 3:
        return _with_other_opcodes(data, rng)
    tree = _Reader(io.BytesIO(data)).load()
    return as_pickle(mutated_tree(_loosened(tree), rng, values))


class _Reader(pickle.Unpickler):
    """Makes the tree of a pickle."""

    def find_class(self, module: str, name: str) -> Any:
        return OrderedDict if name == "OrderedDict" else Name([module, name])

    def persistent_load(self, pid: Any) -> Any:
        return Stored(pid)


def _loosened(value: Any) -> Any:
    """A tree whose tuples can be changed."""
    if isinstance(value, dict):
        return type(value)((key, _loosened(item)) for key, item in value.items())
    if isinstance(value, tuple):
        return Fixed(map(_loosened, value))
    return type(value)(map(_loosened, value)) if isinstance(value, list) else value


def first_stored(data: bytes) -> Stored:
    """The first persistent id of a pickle."""
    tree = _loosened(_Reader(io.BytesIO(data)).load())
    return next(parent[key] for parent, key in places_of(tree) if isinstance(parent[key], Stored))


def as_pickle(tree: Any) -> bytes:
    """The pickle of a tree, in the opcodes of protocol 2, which torch reads."""
    return b"\x80\x02" + _pushed(tree) + b"."


def _pushed(value: Any) -> bytes:
    """Opcodes that leave one value on the stack."""
    match value:
        case None | bool():
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            return _number(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            text = value.encode("utf-8", "surrogatepass")
            return b"X" + struct.pack("<I", len(text)) + text
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case Name([str(module), str(name)]):
            return f"c{module}\n{name}\n".encode("utf-8", "surrogatepass")
        case Call([function, arguments, *state]):
            return _pushed(function) + _pushed(arguments) + b"R" + b"".join(_pushed(one) + b"b" for one in state)
        case Fixed() | Stored():
            ending = b"tQ" if isinstance(value, Stored) else b"t"
            return b"(" + b"".join(map(_pushed, value)) + ending
        case dict():
            new = b"ccollections\nOrderedDict\n)R" if isinstance(value, OrderedDict) else b"}"
            return new + b"(" + b"".join(_pushed(key) + _pushed(item) for key, item in value.items()) + b"u"
        case list():
            return b"](" + b"".join(map(_pushed, value)) + b"e"
        case _:
            return b"N"


def _number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    digits = value.to_bytes(size, "little", signed=True)
    return (b"\x8a" + bytes([size]) if size < 256 else b"\x8b" + struct.pack("<I", size)) + digits


def _with_other_opcodes(data: bytes, rng: random.Random) -> bytes:
    places = [place for _, _, place in pickletools.genops(data) if place is not None]
    pieces = [data[start:stop] for start, stop in zip(places, [*places[1:], len(data)], strict=True)]
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(pieces))
        kind = rng.randrange(6)
        if kind == 0:
            del pieces[place : place + rng.choice((1, 1, 2, 5))]
            pieces = pieces or [b"."]
        elif kind == 1:
            pieces[place:place] = pieces[place : place + rng.choice((1, 2, 10))]
        elif kind == 2:
            pieces[place:place] = [pieces.pop(place), pieces.pop(rng.randrange(len(pieces)))] if len(pieces) > 1 else []
        elif kind == 3:
            pieces[place] = _pushed(rng.choice(PLAIN))
        else:
            pieces[place : place + rng.randrange(2)] = [rng.choice(_OPCODES)]
    return b"".join(pieces)
