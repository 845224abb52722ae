"""Pictures whose checksums are right."""

from __future__ import annotations

import random
import struct
import zlib

from fuzzing.mutators.raw import mutated_bytes


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
