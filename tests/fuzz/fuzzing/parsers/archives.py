"""Archives of scans."""

from __future__ import annotations

from pathlib import Path

from fuzzing import seeds
from fuzzing.mutators.packed import mutated_zip
from fuzzing.parser import Parser
from fuzzing.parsers.volumes import header, zipped_header

_FIRST_CHECK = "the archive is damaged, or not an archive"


def _unpack(folder: Path, path: Path) -> None:
    from segkit.reading.archives import unpacked

    into = folder / "into"
    into.mkdir()
    unpacked(path, into, most_bytes=10**7)


def _tape() -> bytes:
    return seeds.taped({"p/a.nii": b"one", "p/b.nii": bytes(2000)})


PARSERS = (
    Parser(
        "zip",
        lambda: [{"x.zip": seeds.zipped({"p/a.nii": b"one", "p/b.nii": bytes(2000), "c.nii": b"x"}, 0o100644)}],
        {"": mutated_zip},
        _unpack,
        first_check=_FIRST_CHECK,
    ),
    Parser(
        "tar",
        lambda: [{"x.tar": _tape()}, {"x.tar.gz": seeds.packed(_tape())}],
        {".gz": zipped_header(1600), "": header(1600)},
        _unpack,
        first_check=_FIRST_CHECK,
    ),
)
