"""Every broken file a sentence that names file, finding and remedy, from the header alone where that is possible."""

from __future__ import annotations

import errno
import gzip
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from segkit.errors import DataError
from segkit.reading import volume
from segkit.reading.files import count_channels, read_grid, read_labels, read_volume, write_image
from segkit.reading.volume import Grid

SHAPE = (3, 4, 5)
Reader = Callable[[Path], object]
READERS: list[Reader] = [read_grid, read_volume]


def numbered(dtype: Any = np.int16) -> np.ndarray:
    return np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(dtype)


def save(path: Path, array: np.ndarray) -> Path:
    nib.Nifti1Image(array, np.eye(4)).to_filename(path)
    return path


def patched(path: Path, offset: int, block: bytes) -> Path:
    """The uncompressed file with some bytes replaced."""
    content = bytearray(path.read_bytes())
    content[offset : offset + len(block)] = block
    path.write_bytes(bytes(content))
    return path


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.98])
def test_a_truncated_gzip_is_named(tmp_path: Path, keep: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 16), np.uint8)
    path = save(tmp_path / "Fall 7.nii.gz", noise)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match=r"Fall 7\.nii\.gz: .*truncated.*Copy the file again"):
        read_volume(path)


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    save(path, np.zeros((8, 8, 8), np.uint8))
    packed = bytearray(gzip.compress(path.read_bytes(), compresslevel=0))  # stored, so that a flip stays readable
    packed[-100] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(bytes(packed))
    with pytest.raises(DataError, match=r"truncated or damaged \(CRC check failed"):
        read_volume(tmp_path / "a.nii.gz")


def test_a_truncated_nifti_is_refused_by_its_header(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", numbered())
    path.write_bytes(path.read_bytes()[:400])
    for reader in READERS:
        with pytest.raises(
            DataError, match=r"promises 3 x 4 x 5 voxels \(120 bytes\), and the file has room for 48 bytes"
        ):
            reader(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_header_of_ten_to_the_twelve_voxels_is_refused_before_allocation(tmp_path: Path, suffix: str) -> None:
    path = patched(save(tmp_path / "a.nii", numbered()), 40, struct.pack("<8h", 3, 10000, 10000, 10000, 1, 1, 1, 1))
    if suffix == ".nii.gz":
        path.with_name("a.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
    for reader in READERS:
        with pytest.raises(DataError, match=r"claims 10000 x 10000 x 10000 = 1\.0e\+12 voxels; expected at most"):
            reader(tmp_path / f"a{suffix}")


def test_a_header_bigger_than_gzip_can_pack_is_refused(tmp_path: Path) -> None:
    path = patched(save(tmp_path / "a.nii", numbered()), 40, struct.pack("<8h", 3, 1000, 1000, 1000, 1, 1, 1, 1))
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match="promises 1000 x 1000 x 1000 voxels"):
        read_grid(tmp_path / "a.nii.gz")


def test_an_empty_mask_packs_well_and_is_still_plausible(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    save(tmp_path / "a.nii", np.zeros((200, 200, 100), np.uint8))
    path.write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes(), compresslevel=9))
    assert read_labels(path)[0].shape == (200, 200, 100)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (
            b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 100000 100000 100000\nencoding: raw\nendian: little\n\n",
            "claims|promises",
        ),
        (b"NRRD0004\nbroken", "cannot be read"),
    ],
)
def test_broken_nrrd_headers(tmp_path: Path, header: bytes, match: str) -> None:
    (tmp_path / "a.nrrd").write_bytes(header)
    for reader in READERS:
        with pytest.raises(DataError, match=match):
            reader(tmp_path / "a.nrrd")


def test_a_metaimage_without_its_data_file(tmp_path: Path) -> None:
    (tmp_path / "a.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\nElementDataFile = a.raw\n"
    )
    with pytest.raises(DataError, match=r"beside it in 'a\.raw', which is missing"):
        read_volume(tmp_path / "a.mhd")
    (tmp_path / "a.raw").write_bytes(bytes(range(64)))
    assert read_volume(tmp_path / "a.mhd").array[1, 0, 0] == 1


def test_an_absurd_freesurfer_header(tmp_path: Path) -> None:
    write_image(tmp_path / "a.mgh", numbered(), Grid(SHAPE, np.eye(4)))
    patched(tmp_path / "a.mgh", 4, struct.pack(">3i", 10**6, 10**6, 10**6))
    for reader in READERS:
        with pytest.raises(DataError, match=r"1\.0e\+18 voxels"):
            reader(tmp_path / "a.mgh")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgz", "a.nrrd", "a.mha", "a.mhd", "a.png", "a.jpg", "a.dcm"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 10, b"<html>404 not found</html>" * 40, b"\x1f\x8b\x08\x00garbage"])
def test_files_that_are_not_what_their_name_says(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for reader in (*READERS, count_channels, read_labels):
        with pytest.raises(DataError, match=re.escape(name) + ": ") as caught:
            reader(tmp_path / name)
        assert ("(0 bytes)" in str(caught.value)) is (not content)


def test_a_truncated_picture(tmp_path: Path) -> None:
    grid = Grid((64, 64), np.eye(4))
    write_image(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8), grid)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    with pytest.raises(DataError, match=r"a\.png: .*truncated"):
        read_volume(tmp_path / "a.png")


def test_missing_files_folders_and_links(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the file does not exist"):
        read_volume(tmp_path / "none.nii.gz")
    (tmp_path / "folder.nii").mkdir()
    with pytest.raises(DataError, match="a folder with the name of an image file"):
        read_volume(tmp_path / "folder.nii")
    (tmp_path / "link.nii").symlink_to(tmp_path / "gone.nii")
    with pytest.raises(DataError, match=r"this link points to .*gone\.nii, which does not exist"):
        read_volume(tmp_path / "link.nii")
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    with pytest.raises(DataError, match=r"loop\.nii"):
        read_volume(tmp_path / "loop.nii")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"files of the kind '\.txt' cannot be read; expected .*\.nii\.gz"):
        read_volume(tmp_path / "notes.txt")


def test_a_file_without_read_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.nii", numbered())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # a mode of 000 does not stop the superuser that tests may run as
    with pytest.raises(DataError, match=r"no permission to read it\. Ask its owner"):
        read_volume(path)


def test_a_volume_that_does_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.nii"
    path.touch()
    with pytest.raises(DataError, match="does not fit into this computer's memory"), volume.as_data_errors(path):
        raise MemoryError


def test_colours_and_complex_numbers_are_no_voxels(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", numbered(np.complex64))
    with pytest.raises(DataError, match="voxels are of the type complex64"):
        read_volume(path)
