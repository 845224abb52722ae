"""Bytes: bits, numbers, cuts, doublings, words of the format."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

_INTEGERS = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 32767, 32768, 65535, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
_FLOATS = (0.0, -0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), float("-inf"))


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
