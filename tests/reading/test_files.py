"""Reading and writing: every format there and back, every broken file a sentence."""

from __future__ import annotations

import errno
import os
import re
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from segkit.errors import DataError
from segkit.reading.files import (
    count_channels,
    read_grid,
    read_labels,
    read_volume,
    stem_of,
    suffix_of,
    write_image,
    write_labels,
    written_atomically,
)
from segkit.reading.geometry import same_grid
from segkit.reading.volume import Grid

SHAPE = (3, 4, 5)


def oblique_affine() -> np.ndarray:
    """Voxels of 1 x 2 x 3 mm, turned by 30 degrees about the body axis."""
    cosine, sine = np.cos(np.pi / 6), np.sin(np.pi / 6)
    turn = np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1.0, -2.0, 3.0])
    affine[:3, 3] = (-90.5, 126.25, -72.0)
    return affine


def numbered(dtype: Any = np.int16, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None, **fields: Any) -> Path:
    """A NIfTI file with further header fields set."""
    image = nib.Nifti1Image(array, oblique_affine() if affine is None else affine)
    for name, value in fields.items():
        image.header[name] = value
    image.to_filename(path)
    return path


def patched(path: Path, offset: int, block: bytes) -> Path:
    """The uncompressed file with some bytes replaced."""
    content = bytearray(path.read_bytes())
    content[offset : offset + len(block)] = block
    path.write_bytes(bytes(content))
    return path


@pytest.mark.parametrize(
    ("name", "suffix", "stem"),
    [
        ("a.nii.gz", ".nii.gz", "a"),
        ("Fall 1.T1c.NII.GZ", ".nii.gz", "Fall 1.T1c"),
        ("a.nii", ".nii", "a"),
        ("b.PNG", ".png", "b"),
        ("notes.txt", ".txt", "notes"),
        ("IM0001", "", "IM0001"),
    ],
)
def test_suffix_and_stem(name: str, suffix: str, stem: str) -> None:
    assert suffix_of(Path("/x.y") / name) == suffix
    assert stem_of(Path("/x.y") / name) == stem


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mgz", ".mgh", ".nrrd", ".mha"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_an_oblique_volume_comes_back_as_it_was_written(tmp_path: Path, suffix: str, dtype: Any) -> None:
    path = tmp_path / f"Aufnahme für Ä {suffix}"
    grid = Grid(SHAPE, oblique_affine())
    write_image(path, numbered(dtype), grid)
    volume = read_volume(path)
    assert volume.array.dtype == dtype
    np.testing.assert_array_equal(volume.array, numbered(dtype))
    assert volume.grid.shape == SHAPE
    assert volume.grid.source == path
    np.testing.assert_allclose(volume.grid.affine, oblique_affine(), atol=1e-5)
    assert volume.array.flags.writeable


@pytest.mark.parametrize(("sform_code", "qform_code"), [(1, 1), (2, 0), (0, 1), (4, 2), (0, 0)])
@pytest.mark.parametrize("units", [0, 2, 10])
def test_codes_units_and_affine_survive_a_round_trip(
    tmp_path: Path, sform_code: int, qform_code: int, units: int
) -> None:
    image = nib.Nifti1Image(numbered(), None)
    image.header.set_qform(oblique_affine(), code=qform_code)
    image.header.set_sform(oblique_affine(), code=sform_code)
    image.header["xyzt_units"] = units
    image.to_filename(tmp_path / "in.nii.gz")
    grid = read_grid(tmp_path / "in.nii.gz")
    write_labels(tmp_path / "out.nii.gz", numbered(np.uint8), grid)
    source, written = nib.load(tmp_path / "in.nii.gz"), nib.load(tmp_path / "out.nii.gz")
    for field in ("sform_code", "qform_code", "xyzt_units"):
        assert written.header[field] == source.header[field], field
    np.testing.assert_allclose(written.affine, source.affine, atol=1e-5)
    np.testing.assert_allclose(written.header.get_zooms(), (1.0, 2.0, 3.0), atol=1e-6)
    assert written.header.get_data_dtype() == np.uint8


def test_a_qform_that_differs_from_the_sform_is_kept(tmp_path: Path) -> None:
    image = nib.Nifti1Image(numbered(), None)
    image.header.set_qform(np.diag([1.0, 2.0, 3.0, 1.0]), code=1)
    image.header.set_sform(oblique_affine(), code=4)
    image.to_filename(tmp_path / "in.nii")
    grid = read_grid(tmp_path / "in.nii")
    np.testing.assert_allclose(grid.affine, oblique_affine(), atol=1e-5)
    write_labels(tmp_path / "out.nii", numbered(np.uint8), grid)
    written = nib.load(tmp_path / "out.nii")
    np.testing.assert_allclose(written.get_sform(), oblique_affine(), atol=1e-5)
    np.testing.assert_allclose(written.get_qform(), np.diag([1.0, 2.0, 3.0, 1.0]), atol=1e-5)


@pytest.mark.parametrize(("units", "factor"), [(1, 1000.0), (3, 0.001)])
def test_metres_and_micrometres_become_millimetres(tmp_path: Path, units: int, factor: float) -> None:
    path = save(tmp_path / "in.nii", numbered(), xyzt_units=units)
    grid = read_grid(path)
    assert grid.spacing_mm == pytest.approx((factor, 2 * factor, 3 * factor), rel=1e-5)
    write_labels(tmp_path / "out.nii", numbered(np.uint8), grid)
    np.testing.assert_allclose(nib.load(tmp_path / "out.nii").affine, oblique_affine(), rtol=1e-5, atol=1e-5)


def test_an_unusable_sform_gives_way_to_the_qform(tmp_path: Path) -> None:
    image = nib.Nifti1Image(numbered(), None)
    image.header.set_qform(oblique_affine(), code=1)
    image.header["sform_code"] = 1  # with rows of zeros
    image.to_filename(tmp_path / "a.nii")
    grid = read_grid(tmp_path / "a.nii")
    np.testing.assert_allclose(grid.affine, oblique_affine(), atol=1e-5)
    assert (grid.sform_code, grid.qform_code) == (0, 1)


def with_quaternion(path: Path, bcd: tuple[float, float, float], sform_code: int) -> Path:
    """A file turned half round the body axis by its sform, with another quaternion; the sform may be unset."""
    save(path, numbered(), np.diag([-1.0, -1.0, 1.0, 1.0]))
    patched(path, 252, struct.pack("<2h", 1, sform_code))  # qform_code, sform_code
    return patched(path, 256, struct.pack("<3f", *bcd))


@pytest.mark.parametrize("length", [1 + 2.4e-7, 1.00001, 1.0009])
@pytest.mark.parametrize("sform_code", [0, 2])
def test_a_quaternion_a_little_longer_than_1_is_a_rotation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, length: float, sform_code: int
) -> None:
    grid = read_grid(with_quaternion(tmp_path / "a.nii", (0.0, 0.0, length), sform_code))
    np.testing.assert_allclose(grid.affine, np.diag([-1.0, -1.0, 1.0, 1.0]), atol=1e-6)
    assert grid.qform is None  # the same as the affine
    write_labels(tmp_path / "b.nii", numbered(np.uint8), grid)
    written = nib.load(tmp_path / "b.nii").header
    assert (written["sform_code"], written["qform_code"]) == (sform_code, 1)
    np.testing.assert_allclose(written.get_qform(), grid.affine, atol=1e-6)
    assert not caplog.records


def test_a_long_quaternion_of_nifti_2_is_a_rotation(tmp_path: Path) -> None:
    image = nib.Nifti2Image(numbered(), np.diag([-1.0, -1.0, 1.0, 1.0]))
    image.header["qform_code"], image.header["quatern_d"] = 1, 1.00001
    image.to_filename(tmp_path / "a.nii")
    np.testing.assert_allclose(read_grid(tmp_path / "a.nii").affine, np.diag([-1.0, -1.0, 1.0, 1.0]))


@pytest.mark.parametrize("bcd", [(0.9, 0.9, 1.0), (0.0, 0.0, 1.01), (np.nan, 0.0, 0.0), (np.inf, 0.0, 0.0)])
def test_a_quaternion_that_is_no_rotation_matters_only_without_sform(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bcd: tuple[float, float, float]
) -> None:
    grid = read_grid(with_quaternion(tmp_path / "a.nii", bcd, sform_code=1))
    assert read_grid(tmp_path / "a.nii").notes == ("the qform of the header is unusable; the sform stands for both",)
    np.testing.assert_array_equal(grid.affine, np.diag([-1.0, -1.0, 1.0, 1.0]))
    write_labels(tmp_path / "b.nii", numbered(np.uint8), grid)
    written = nib.load(tmp_path / "b.nii").header
    assert (written["sform_code"], written["qform_code"]) == (1, 1)
    np.testing.assert_allclose(written.get_qform(), grid.affine, atol=1e-6)
    with pytest.raises(DataError, match="the header does not say where the voxels lie"):
        read_grid(with_quaternion(tmp_path / "c.nii", bcd, sform_code=0))


@pytest.mark.parametrize("row", [(0.0, 0.0, 0.0, 0.0), (np.nan, 0.0, 0.0, 0.0)])
def test_a_header_without_a_place_is_refused(tmp_path: Path, row: tuple[float, ...]) -> None:
    path = save(tmp_path / "a.nii", numbered())
    patched(path, 252, struct.pack("<2h", 0, 1))  # qform_code, sform_code
    patched(path, 280, struct.pack("<4f", *row))  # srow_x
    with pytest.raises(DataError, match=r"a\.nii: the header does not say where the voxels lie"):
        read_grid(path)


def test_the_scale_factor_of_the_header_is_applied(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", numbered(np.int16))
    patched(path, 112, struct.pack("<ff", 0.5, -3.0))  # scl_slope, scl_inter
    array = read_volume(path).array
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, numbered() * 0.5 - 3.0)


def test_float64_and_foreign_byte_order_become_plain_arrays(tmp_path: Path) -> None:
    assert read_volume(save(tmp_path / "a.nii", numbered(np.float64))).array.dtype == np.float32
    big = nib.Nifti1Image(numbered(np.dtype(">i2")), np.eye(4), nib.Nifti1Header(endianness=">"))
    big.to_filename(tmp_path / "b.nii")
    array = read_volume(tmp_path / "b.nii").array
    assert array.dtype.isnative
    np.testing.assert_array_equal(array, numbered())


def test_nan_is_passed_on(tmp_path: Path) -> None:
    array = numbered(np.float32)
    array[1, 1, 1] = np.nan
    assert np.isnan(read_volume(save(tmp_path / "a.nii.gz", array)).array).sum() == 1


def test_nifti_2_and_wrong_suffixes_are_read_by_content(tmp_path: Path) -> None:
    nib.Nifti2Image(numbered(), oblique_affine()).to_filename(tmp_path / "a.nii")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii").array, numbered())
    save(tmp_path / "b.nii", numbered()).rename(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "b.nii.gz").array, numbered())
    save(tmp_path / "c.nii.gz", numbered()).rename(tmp_path / "c.nii")
    np.testing.assert_array_equal(read_volume(tmp_path / "c.nii").array, numbered())


@pytest.mark.parametrize(
    ("shape", "squeezed"), [((3, 4, 5, 1), (3, 4, 5)), ((3, 4, 5, 1, 1), (3, 4, 5)), ((3, 4), (3, 4, 1))]
)
def test_axes_of_length_one(tmp_path: Path, shape: tuple[int, ...], squeezed: tuple[int, ...]) -> None:
    path = save(tmp_path / "a.nii", numbered(shape=shape))
    assert count_channels(path) == 1
    assert read_grid(path).shape == squeezed
    np.testing.assert_array_equal(read_volume(path).array, numbered(shape=shape).reshape(squeezed))


@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (3, 4, 5, 1, 2)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_channels_of_a_4d_file(tmp_path: Path, shape: tuple[int, ...], suffix: str) -> None:
    array = numbered(shape=shape)
    path = save(tmp_path / f"a{suffix}", array)
    assert count_channels(path) == 2
    assert read_grid(path).shape == SHAPE
    np.testing.assert_array_equal(read_volume(path, channel=1).array, array[..., 1].reshape(SHAPE))
    with pytest.raises(DataError, match=r"holds 2 channels; expected one image"):
        read_volume(path)
    with pytest.raises(DataError, match=r"channel 2 does not exist; the file holds 2"):
        read_volume(path, channel=2)


def test_channels_of_nrrd_files(tmp_path: Path) -> None:
    import SimpleITK

    array = numbered(shape=(3, 4, 5, 2))
    vector = SimpleITK.GetImageFromArray(np.moveaxis(array, 3, 0).T.copy(), isVector=True)
    SimpleITK.WriteImage(vector, str(tmp_path / "vector.nrrd"))
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array.T.copy(), isVector=False), str(tmp_path / "time.nrrd"))
    for name in ("vector.nrrd", "time.nrrd"):
        assert count_channels(tmp_path / name) == 2
        np.testing.assert_array_equal(read_volume(tmp_path / name, channel=1).array, array[..., 1])


def test_probabilities_are_written_as_4d_nifti(tmp_path: Path) -> None:
    array = numbered(np.float64, (*SHAPE, 2))
    write_image(tmp_path / "a.nii.gz", array, Grid(SHAPE, oblique_affine()))
    assert nib.load(tmp_path / "a.nii.gz").get_data_dtype() == np.float32
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz", channel=1).array, array[..., 1])
    with pytest.raises(DataError, match="one channel only"):
        write_image(tmp_path / "a.nrrd", array, Grid(SHAPE, oblique_affine()))


# --- labels


def test_whole_floats_are_labels(tmp_path: Path) -> None:
    labels, grid = read_labels(save(tmp_path / "a.nii.gz", numbered(np.float64)))
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, numbered())
    assert grid.shape == SHAPE


def test_labels_with_a_scale_factor_are_rounded(tmp_path: Path) -> None:
    path = patched(save(tmp_path / "a.nii", numbered(np.int16)), 112, struct.pack("<ff", 1 / 3, 0.0))
    array = np.zeros(SHAPE, np.int16)
    array[0, 0, :2] = (3, 12)
    patched(path, 352, array.tobytes(order="F"))
    assert np.unique(read_labels(path)[0]).tolist() == [0, 1, 4]


@pytest.mark.parametrize(
    ("value", "dtype", "named"),
    [
        (0.5, np.float32, "0.5"),
        (-1, np.int16, "-1"),
        (256, np.int16, "256"),
        (np.nan, np.float32, "nan"),
        (np.inf, np.float32, "inf"),
    ],
)
def test_stray_label_values_are_named(tmp_path: Path, value: float, dtype: Any, named: str) -> None:
    array = np.zeros(SHAPE, dtype)
    array[1, 2, 3] = value
    with pytest.raises(DataError, match=f"1 voxels hold values that are no labels: {re.escape(named)}; expected whole"):
        read_labels(save(tmp_path / "a.nii.gz", array))


# --- real files


def test_a_nrrd_lies_where_its_nifti_twin_lies(real_data: Path) -> None:
    nrrd = read_volume(real_data / "format_samples" / "FLAIR.nrrd")
    nifti = read_volume(real_data / "format_samples" / "FLAIR.nii.gz")
    np.testing.assert_array_equal(nrrd.array, nifti.array)
    np.testing.assert_allclose(nrrd.grid.affine, nifti.grid.affine, atol=1e-6)
    assert same_grid(nrrd.grid, nifti.grid) is None


def test_a_freesurfer_mask(real_data: Path) -> None:
    mask = read_volume(real_data / "format_samples" / "brainmask.mgz")
    assert (mask.grid.shape, mask.grid.orientation) == ((32, 40, 48), "LIA")


@pytest.mark.parametrize(("contrast", "orientation"), [("t1", "RAS"), ("t2", "PSR"), ("t2s", "LAS")])
def test_scans_of_a_spinal_cord_and_their_masks(real_data: Path, contrast: str, orientation: str) -> None:
    folder = real_data / "sct_cord" / contrast
    (mask,) = folder.glob("*manual.nii.gz")
    (scan,) = set(folder.glob("*.nii.gz")) - {mask}
    grid = read_volume(scan).grid
    labels, label_grid = read_labels(mask)
    assert grid.orientation == orientation
    assert same_grid(grid, label_grid) is None
    assert np.unique(labels).tolist() == [0, 1]


def test_the_atlas_with_a_fourth_axis(shared_data: Path) -> None:
    atlas = read_volume(shared_data / "sri24" / "t1_skullstripped_brats_space.nii.gz")
    assert atlas.array.shape == (240, 240, 155)
    assert atlas.array.min() < 0


def test_fundus_pictures(real_data: Path) -> None:
    folder = real_data / "chase_db1"
    assert read_volume(folder / "Image_01L.jpg", channel=1).array.shape == (120, 125)
    for mask in ("Image_01L_1stHO.png", "Image_01L.gif"):
        assert np.unique(read_labels(folder / mask)[0]).tolist() == [0, 1]


def test_a_real_float64_mask_and_a_scan_given_as_mask(shared_data: Path) -> None:
    case = shared_data / "brats2023_inpainting" / "BraTS-GLI-00001-000"
    assert np.unique(read_labels(case / "seg-BraTS23_1_mapped.nii.gz")[0]).tolist() == [0, 1, 2, 4]
    with pytest.raises(DataError, match=r"no labels: 256, 257, 258, 259, 260 \.\.\.; .* give the label map"):
        read_labels(case / "BraTS-GLI-00001-000-t1n.nii.gz")


# --- writing


def test_writing_makes_folders_and_leaves_nothing_beside(tmp_path: Path) -> None:
    write_labels(tmp_path / "new" / "a.nii.gz", numbered(np.uint8), Grid(SHAPE, np.eye(4)))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.nii.gz"]


def test_the_same_mask_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        write_labels(tmp_path / name, numbered(np.uint8), Grid(SHAPE, np.eye(4)))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize(
    ("code", "match"),
    [
        (errno.ENOSPC, "the disk is full. Free some space and start again. An existing file of this name"),
        (errno.EROFS, "the folder is read-only.*Choose another output folder"),
        (errno.EIO, "cannot be written: .*are kept"),
    ],
)
def test_a_disk_that_fails_keeps_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, match: str
) -> None:
    path = tmp_path / "a.nii.gz"
    grid = Grid(SHAPE, np.eye(4))
    write_labels(path, numbered(np.uint8), grid)

    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match=match):
        write_labels(path, np.zeros(SHAPE, np.uint8), grid)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.nii.gz"]
    np.testing.assert_array_equal(read_labels(path)[0], numbered())


def test_an_interruption_leaves_no_half_file(tmp_path: Path) -> None:
    def interrupted() -> None:
        with written_atomically(tmp_path / "a.csv") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt("stop")

    with pytest.raises(KeyboardInterrupt, match="stop"):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_cannot_hold_the_array(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.mgz: the file cannot be written: "):
        write_image(tmp_path / "a.mgz", numbered(np.uint32), Grid(SHAPE, np.eye(4)))
    sheared = np.eye(4)
    sheared[0, 1] = 0.5
    with pytest.raises(DataError, match=r"not at right angles. Write it as \.nii\.gz"):
        write_image(tmp_path / "a.nrrd", numbered(), Grid(SHAPE, sheared))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.png", "a.mhd", "a.txt"])
def test_formats_that_are_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"3D images are not written as .*; expected \.nii\.gz"):
        write_image(tmp_path / name, numbered(), Grid(SHAPE, np.eye(4)))


def test_an_array_that_does_not_fit_its_grid(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \(5, 4, 3\) does not fit a grid of shape \(3, 4, 5\)"):
        write_image(tmp_path / "a.nii", numbered(shape=(5, 4, 3)), Grid(SHAPE, np.eye(4)))


def stored_with_a_scale(path: Path, values: np.ndarray, dtype: Any, slope: float, intercept: float = 0.0) -> Path:
    """Values stored as integers, each as the nearest step, as programs do that save floats in an integer type."""
    image = nib.Nifti1Image(np.rint((values - intercept) / slope).astype(dtype), np.eye(4))
    image.header.set_slope_inter(slope, intercept)
    image.to_filename(path)
    return path


@pytest.mark.parametrize(
    ("dtype", "slope", "intercept"),
    [
        (np.uint8, 4 / 255, 0),
        (np.uint8, -4 / 255, 4),
        (np.int16, 4 / 65535, 2 + 2 / 65535),
        (np.uint16, 0.99999, 0),
        (np.int32, 1.00001, 0),
        (np.uint8, 200 / 255, 0),
    ],
)
def test_labels_stored_with_a_scale_factor(tmp_path: Path, dtype: Any, slope: float, intercept: float) -> None:
    labels = np.arange(60, dtype=np.uint8).reshape(SHAPE) * (200 // 60) if slope == 200 / 255 else numbered() % 5
    path = stored_with_a_scale(tmp_path / "a.nii.gz", labels, dtype, slope, intercept)
    assert np.abs(read_volume(path).array - labels).max() > 1e-6
    assert read_labels(path)[0].tolist() == labels.tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_probabilities_stored_with_a_scale_factor_are_no_labels(tmp_path: Path, dtype: Any) -> None:
    path = stored_with_a_scale(tmp_path / "a.nii.gz", numbered() / 59, dtype, 1 / 255)
    with pytest.raises(DataError, match=r"58 voxels hold values that are no labels: 0\.0156863"):
        read_labels(path)
    halves = stored_with_a_scale(tmp_path / "b.nii.gz", numbered() % 5 / 2, dtype, 0.5)
    with pytest.raises(DataError, match=r"24 voxels hold values that are no labels: 0\.5, 1\.5"):
        read_labels(halves)
