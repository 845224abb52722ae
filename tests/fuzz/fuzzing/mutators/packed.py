"""What is inside gzip streams and zip archives, packed again after it was changed."""

from __future__ import annotations

import copy
import gzip
import io
import random
import warnings
import zipfile
from collections.abc import Callable

from fuzzing.mutators.raw import mutated_bytes

_MEMBER_NAMES = (
    *("../x.nii", "/x.nii", "..\\x.nii", "C:\\x.nii", "C:x.nii", "p/../../x.nii", "p//x.nii", "./x.nii", "p/./x.nii"),
    *("", "/", ".", "..", "p", "p/", "con.nii", "x.nii:y", "~/x.nii", "a\nb.nii", "\u202ex.nii", "é" * 150 + ".nii"),
    *("P/A.nii", "p/a.nii", "p/a.nii/b.nii", "x.nii ", "x.nii.", "p/" * 200 + "x.nii", "x.zip", "__MACOSX/._a.nii"),
)
_MODES = (0o100644, 0o120777, 0o040755, 0o010644, 0o020644, 0o060644, 0o140644, 0o104755, 0o100000, 0)


def mutated_gzip(data: bytes, rng: random.Random, change: Callable[[bytes, random.Random], bytes]) -> bytes:
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


def mutated_zip(data: bytes, rng: random.Random) -> bytes:
    """A zip archive whose members change their names, kinds, sizes and number; one time in five its bytes."""
    if rng.random() < 0.2:
        return mutated_bytes(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as before:
        members = [(info, before.read(info)) for info in before.infolist()]
    for _ in range(rng.randint(1, 3)):
        info, content = copy.copy(rng.choice(members)[0]), rng.choice(members)[1]
        kind = rng.randrange(5)
        if kind in (0, 1):
            info.filename = rng.choice(_MEMBER_NAMES)
        elif kind == 2:
            info.create_system, info.external_attr = 3, rng.choice(_MODES) << 16
        elif kind == 3:
            content = rng.choice((b"", bytes(11 * 2**20), data, b"../../etc/passwd", content * 2))
        else:
            info.extra = rng.choice(
                (b"\x01\x00\x08\x00" + b"\xff" * 8, b"\x75\x70\x06\x00\x01" + bytes(4) + b"x", b"x")
            )
        place = rng.randrange(len(members) + 1)
        members[place : place + rng.randrange(2)] = [(info, content)]
    return packed_again(members, rng)


def packed_again(members: list[tuple[zipfile.ZipInfo, bytes]], rng: random.Random) -> bytes:
    """Members as a zip archive with the right sizes and checksums; a few have more around them than they should."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as after, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about names that are there already
        for info, content in members:
            after.writestr(info, content, compress_type=rng.choice((zipfile.ZIP_STORED, info.compress_type)))
        if rng.random() < 0.02:
            after.comment = rng.choice((b"x", b"PK\x05\x06" + bytes(18), b"PK\x01\x02", bytes(65535)))
    kind = rng.randrange(100)
    return {0: rng.randbytes(40), 1: b"PK\x03\x04"}.get(kind, b"") + packed.getvalue()
