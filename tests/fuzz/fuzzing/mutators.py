"""Seeded changes of files: of bytes, of what is inside a gzip stream, of JSON trees."""

from __future__ import annotations

import copy
import gzip
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

_INTEGERS = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 32767, 32768, 65535, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
_FLOATS = (0.0, -0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), float("-inf"))
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 256, 10**6, 10**12, 10**30, -(10**12), 0.5, 1e300, float("nan"), float("inf")),
    *("", "0", "x", "../x", "../../etc/passwd", "/etc/passwd", "C:\\x", "a\0b", "a\nb", "..", ".", "\ud800", "é" * 300),
    *([], {}, [[]], {"": {}}, [None], {"0": None}, ["../x"], {"../x": 1}, [[[[[[]]]]]], list(range(50))),
)


def mutated_bytes(data: bytes, rng: random.Random, words: Sequence[bytes] = ()) -> bytes:
    """One to four changes: bits, bytes, numbers, cuts, doublings, words of the format."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(found) + 1)
        kind = rng.randrange(9)
        if kind == 0 and place < len(found):
            found[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(found):
            found[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind in (2, 3):
            number = _number(rng)
            found[place : place + len(number)] = number
        elif kind == 4:
            del found[place : place + rng.choice((1, 2, 4, 16, 200))]
        elif kind == 5:
            del found[place:]
        elif kind == 6:
            found[place:place] = found[place : place + rng.choice((1, 4, 64, 1000))]
        elif kind == 7 and words:
            word = rng.choice(words)
            end = place + (len(word) if rng.random() < 0.5 else 0)
            found[place:end] = word
        else:
            found[place:place] = rng.randbytes(rng.choice((1, 2, 8, 40)))
    return bytes(found)


def mutated_header(data: bytes, rng: random.Random, length: int) -> bytes:
    """Numbers written over the first `length` bytes, at even places, where binary headers keep their fields."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place = 2 * rng.randrange(length // 2)
        number = _number(rng)
        found[place : place + len(number)] = number
    return bytes(found)


def _number(rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return struct.pack(rng.choice(("<f", ">f", "<d", ">d")), rng.choice(_FLOATS))
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice(_INTEGERS) * rng.choice((1, -1)) % 2 ** (8 * size)
    return value.to_bytes(size, rng.choice(("little", "big")))


def mutated_gzip(data: bytes, rng: random.Random, change: Any) -> bytes:
    """What is inside a gzip stream changed and packed again; one time in five the stream itself."""
    if rng.random() < 0.2:
        return mutated_bytes(data, rng)
    packed = gzip.compress(change(gzip.decompress(data), rng), compresslevel=1, mtime=0)
    kind = rng.randrange(20)
    if kind == 0:
        return packed + gzip.compress(bytes(rng.choice((1, 10**6))), mtime=0)  # a second member
    if kind == 1:
        return packed + rng.randbytes(20)
    return packed


def mutated_tree(document: Any, rng: random.Random) -> Any:
    """A JSON document with one to three of its values replaced, removed, renamed or doubled."""
    document = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        places = [*_places(document)]
        if not places:
            return rng.choice(_VALUES)
        parent, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            name = rng.choice([value for value in _VALUES if isinstance(value, str)])
            parent[name] = parent.pop(key)
        elif kind == 2 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif kind == 3:
            other, other_key = rng.choice(places)
            parent[key] = copy.deepcopy(other[other_key]) if _holds(other, other_key) else None
        else:
            parent[key] = copy.deepcopy(rng.choice(_VALUES))
    return document


def _places(document: Any) -> list[tuple[Any, Any]]:
    keys = document.keys() if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    return [(document, key) for key in keys] + [place for key in keys for place in _places(document[key])]


def _holds(parent: Any, key: Any) -> bool:
    return key in parent if isinstance(parent, dict) else key < len(parent)


def mutated_json(data: bytes, rng: random.Random, words: Sequence[bytes] = ()) -> bytes:
    """A JSON file changed as a tree, or one time in four as bytes."""
    if rng.random() < 0.25:
        return mutated_bytes(data, rng, words)
    return json.dumps(mutated_tree(json.loads(data), rng)).encode()


def mutated_zip_member(data: bytes, rng: random.Random, suffix: str, words: Sequence[bytes]) -> bytes:
    """A zip file with one of its members changed, by name the one that ends in `suffix`, and packed again."""
    if rng.random() < 0.25:
        return mutated_bytes(data, rng, words)
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(packed, "w") as after:
        for info in before.infolist():
            content = before.read(info)
            if info.filename.endswith(suffix):
                content = mutated_bytes(content, rng, words)
            after.writestr(info, content, compress_type=rng.choice((zipfile.ZIP_STORED, info.compress_type)))
    return packed.getvalue()


def mutated_png(data: bytes, rng: random.Random) -> bytes:
    """A PNG whose chunks are changed one by one and get the right checksum, as no mere flip of bits gives it."""
    if rng.random() < 0.3:
        return mutated_bytes(data, rng)
    chunks, place = [], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    index = rng.randrange(len(chunks))
    name, content = chunks[index]
    chunks[index] = (name, mutated_bytes(content, rng))
    if rng.random() < 0.2:
        chunks.insert(rng.randrange(len(chunks)), rng.choice(chunks))
    return data[:8] + b"".join(png_chunk(name, content) for name, content in chunks)


def png_chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file with its checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
