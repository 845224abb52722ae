"""A copy with some voxels changed: all others are stored as they were, and the header is that of the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from segkit.errors import DataError
from segkit.reading.files import read_volume, rewrite_image, write_image
from segkit.reading.volume import Grid

SHAPE = (3, 4, 5)
WHERE = np.zeros(SHAPE, bool)
WHERE[1, 2, 3:] = True


def stored(path: Path) -> np.ndarray[Any, Any]:
    """The voxels as they lie in the file, without scale factors."""
    return np.asarray(nib.load(path).dataobj.get_unscaled())


@pytest.mark.parametrize("scale", [(1.0, 0.0), (0.25, 0.0), (0.5, -1000.0)])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<u2", "|u1", "<i4", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_nifti_keeps_every_other_voxel_and_the_header(
    tmp_path: Path, dtype: str, scale: tuple[float, float], kind: Any
) -> None:
    slope, intercept = scale
    voxels = np.random.default_rng(0).integers(0, 200, SHAPE).astype(dtype)
    if voxels.dtype.kind == "f":
        voxels += np.array(np.pi, dtype)
    header = kind.header_class(endianness=dtype[0].replace("|", "<"))
    header.set_data_dtype(dtype)
    image = kind(voxels, np.diag([-1.0, -2.0, 3.0, 1.0]), header)
    image.header["descrip"] = b"of the scanner"
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(image.affine, code=4)
    image.header.set_slope_inter(slope, intercept)
    image.to_filename(tmp_path / "source.nii.gz")

    values = slope * np.array([100.0, 50.0]) + intercept
    rewrite_image(tmp_path / "target.nii.gz", tmp_path / "source.nii.gz", WHERE, values)

    before, after = stored(tmp_path / "source.nii.gz"), stored(tmp_path / "target.nii.gz")
    assert after.dtype == before.dtype
    assert np.array_equal(after[~WHERE], before[~WHERE])
    assert np.array_equal(after[WHERE], [100, 50])
    one, other = (nib.load(tmp_path / name) for name in ("source.nii.gz", "target.nii.gz"))
    assert type(other) is kind
    one.header["descrip"] = b""  # free text may name the patient
    assert other.header.binaryblock == one.header.binaryblock
    assert np.array_equal(other.get_fdata()[~WHERE], one.get_fdata()[~WHERE])


def test_integers_are_rounded_and_stay_in_their_range(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.full(SHAPE, 7, np.uint8), np.eye(4)), tmp_path / "source.nii.gz")
    where = np.zeros(SHAPE, bool)
    where[0, 0, :4] = True
    values = np.array([1.6, 2.4, -3.0, 300.0], np.float32)
    rewrite_image(tmp_path / "target.nii.gz", tmp_path / "source.nii.gz", where, values)
    assert stored(tmp_path / "target.nii.gz")[0, 0].tolist() == [2, 2, 0, 255, 7]


def test_one_channel_of_several_and_axes_of_length_1(tmp_path: Path) -> None:
    channels = np.arange(120, dtype=np.int16).reshape(*SHAPE, 2)
    nib.save(nib.Nifti1Image(channels, np.eye(4)), tmp_path / "two.nii.gz")
    rewrite_image(tmp_path / "one.nii.gz", tmp_path / "two.nii.gz", WHERE, np.array([-1, -2]), channel=1)
    assert stored(tmp_path / "one.nii.gz").shape == SHAPE
    assert np.array_equal(stored(tmp_path / "one.nii.gz")[~WHERE], channels[~WHERE, 1])
    with pytest.raises(DataError, match="holds 2 channels"):
        rewrite_image(tmp_path / "none.nii.gz", tmp_path / "two.nii.gz", WHERE, np.zeros(2))
    assert not (tmp_path / "none.nii.gz").exists()

    nib.save(nib.Nifti1Image(channels[..., :1], np.eye(4)), tmp_path / "atlas.nii.gz")
    rewrite_image(tmp_path / "copy.nii.gz", tmp_path / "atlas.nii.gz", WHERE, np.array([-1, -2]))
    assert nib.load(tmp_path / "copy.nii.gz").shape == (*SHAPE, 1)
    assert stored(tmp_path / "copy.nii.gz")[1, 2, 3:, 0].tolist() == [-1, -2]


@pytest.mark.parametrize("name", ["scan.nrrd", "scan.mha", "scan.mgz"])
def test_other_formats_become_nifti_in_their_type(tmp_path: Path, name: str) -> None:
    affine = np.diag([-1.0, -2.0, 3.0, 1.0])
    write_image(tmp_path / name, np.arange(60, dtype=np.int16).reshape(SHAPE), Grid(SHAPE, affine))
    rewrite_image(tmp_path / "target.nii.gz", tmp_path / name, WHERE, np.array([-1.4, 1e6]))
    array = read_volume(tmp_path / "target.nii.gz").array
    assert array.dtype == np.int16
    assert np.array_equal(array[~WHERE], np.arange(60).reshape(SHAPE)[~WHERE])
    assert array[WHERE].tolist() == [-1, 32767]
    assert np.allclose(nib.load(tmp_path / "target.nii.gz").affine, affine)


def test_damage_is_found_and_nothing_is_written(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=SHAPE), np.eye(4)), tmp_path / "source.nii.gz")
    content = (tmp_path / "source.nii.gz").read_bytes()
    (tmp_path / "source.nii.gz").write_bytes(content[:-20])
    with pytest.raises(DataError, match="truncated or damaged"):
        rewrite_image(tmp_path / "target.nii.gz", tmp_path / "source.nii.gz", WHERE, np.zeros(2))
    assert [path.name for path in tmp_path.iterdir()] == ["source.nii.gz"]
