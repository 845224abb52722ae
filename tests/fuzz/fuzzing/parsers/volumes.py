"""Volumes and pictures."""

from __future__ import annotations

import random
from contextlib import suppress
from functools import partial
from pathlib import Path

from fuzzing import seeds
from fuzzing.mutators.packed import mutated_gzip
from fuzzing.mutators.pictures import mutated_png
from fuzzing.mutators.raw import mutated_bytes, mutated_header
from fuzzing.parser import Change, Files, Parser

_NRRD_WORDS = (
    *(b"sizes: ", b"type: ", b"encoding: gzip\n", b"encoding: raw\n", b"dimension: ", b"1000000000000", b"-1", b"nan"),
    *(b"space directions: ", b"(1,0,0)", b"none", b"data file: /etc/passwd\n", b"data file: LIST\n", b"endian: big\n"),
    *(b"line skip: ", b"byte skip: -1\n", b"kinds: vector domain domain\n", b"block size: 1000000000\n"),
)
_META_WORDS = (
    *(b"NDims = ", b"DimSize = ", b"1000000000 1000000000 1", b"-1", b"nan", b"ElementType = MET_", b"DOUBLE", b"\n"),
    *(b"ElementDataFile = /etc/passwd\n", b"ElementDataFile = LIST\n", b"ElementDataFile = LOCAL\n", b"17", b"= \n"),
    *(b"CompressedData = True\n", b"CompressedDataSize = 99999999999\n", b"ElementNumberOfChannels = 65536\n"),
    *(b"HeaderSize = -1\n", b"HeaderSize = 999999999\n", b"TransformMatrix = 0 0 0 0 0 0 0 0 0\n", b"BinaryData = "),
)


def header(length: int) -> Change:
    """Numbers in the first bytes; three times in ten anything anywhere."""

    def change(data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return mutated_bytes(data, rng)
        return mutated_header(data, rng, min(length, len(data)))

    return change


def zipped_header(length: int) -> Change:
    """The same, of what is inside a gzip stream."""
    return partial(mutated_gzip, change=header(length))


def read_image(_: Path, path: Path) -> None:
    """An image in every way that it is read in, and what is promised of it."""
    from segkit.errors import DataError
    from segkit.reading.files import count_channels, read_grid, read_labels, read_volume

    grid = read_grid(path)
    channels = count_channels(path)
    volume = read_volume(path, channels - 1 if channels > 1 else None)
    assert volume.array.shape == grid.shape
    assert all(length > 0 for length in grid.spacing_mm)
    assert len(grid.orientation) in (0, 3)
    with suppress(DataError):  # an image need not be a label map
        read_labels(path, 0 if channels > 1 else None)


def _read_and_rewrite(folder: Path, path: Path) -> None:
    import numpy as np

    from segkit.reading.files import read_grid, rewrite_image, suffix_of

    read_image(folder, path)
    grid = read_grid(path)
    where = np.zeros(grid.shape, bool)
    where.flat[0] = True
    rewrite_image(folder / f"copy{suffix_of(path)}", path, where, np.array([3.0]), 0)


def _images(*suffixes_and_modes: tuple[str, str]) -> list[Files]:
    return [{f"x{suffix}": seeds.picture(suffix, mode)} for suffix, mode in suffixes_and_modes]


_NIFTI_SEEDS = [
    lambda: seeds.nifti(),
    lambda: seeds.nifti(">f4"),
    lambda: seeds.nifti("<f8", 2),
    lambda: seeds.nifti("|u1", channels=2),
    lambda: seeds.nifti(has_extension=True),
]

PARSERS = (
    Parser(
        "nifti",
        lambda: (
            [{"x.nii": make()} for make in _NIFTI_SEEDS] + [{"x.nii.gz": seeds.packed(make())} for make in _NIFTI_SEEDS]
        ),
        {".gz": zipped_header(560), "": header(560)},
        _read_and_rewrite,
    ),
    Parser(
        "mgh",
        lambda: [{"x.mgh": seeds.mgh()}, {"x.mgz": seeds.packed(seeds.mgh())}],
        {".mgz": zipped_header(290), "": header(290)},
        read_image,
    ),
    Parser(
        "nrrd",
        lambda: [{"x.nrrd": seeds.itk(".nrrd", is_compressed=packed)} for packed in (False, True)],
        {"": partial(mutated_bytes, words=_NRRD_WORDS)},
        read_image,
    ),
    Parser(
        "metaimage",
        lambda: (
            [{"x.mha": seeds.itk(".mha", is_compressed=packed)} for packed in (False, True)]
            + [{"x.mhd": seeds.itk(".mhd", is_compressed=False), "seed.raw": bytes(48)}]
        ),
        {"": partial(mutated_bytes, words=_META_WORDS)},
        read_image,
    ),
    Parser(
        "picture",
        lambda: _images((".png", "L"), (".png", "P"), (".png", "RGB"), (".png", "RGBA"), (".png", "1")),
        {"": mutated_png},
        read_image,
    ),
    Parser(
        "photograph",
        lambda: _images((".jpg", "L"), (".jpg", "RGB"), (".tif", "L"), (".bmp", "RGB"), (".gif", "P")),
        {"": mutated_bytes},
        read_image,
    ),
)
