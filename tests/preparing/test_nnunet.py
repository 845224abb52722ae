"""Preparation as nnU-Net's: resampling in slabs, labels of a previous stage, spacings of headers, colours."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from scipy import ndimage

from segkit.errors import DataError
from segkit.preparing import nnunet
from segkit.preparing.nnunet import NnUnetConfig, ResamplingConfig, axis_spacing, prepare_as_nnunet, resampling_bytes
from segkit.preparing.preprocessing import LoadedCase
from segkit.reading.files import read_grid
from segkit.reading.volume import Grid

IDENTITY = np.eye(4)
SPLINE = ResamplingConfig(function="resample_data_or_seg_to_shape")
TORCH = ResamplingConfig(function="resample_torch_fornnunet")


def prepared(
    image: np.ndarray,
    target_mm: tuple[float, ...],
    affine: np.ndarray = IDENTITY,
    *,
    in_slabs: bool = False,
    **changes: Any,
) -> np.ndarray:
    """A volume (C, x, y, z) as nnU-Net prepares it, (C, z, y, x); without changes of 1 mm voxels, not normalised."""
    channels = len(image)
    config = NnUnetConfig(
        reader="SimpleITKIO",
        transpose_forward=(0, 1, 2),
        normalization_schemes=("NoNormalization",) * channels,
        use_mask_for_norm=(False,) * channels,
        data=SPLINE,
        seg=SPLINE,
        probabilities=SPLINE,
    ).model_copy(update=changes)
    loaded = LoadedCase("case", image, None, Grid(image.shape[1:], affine), (True,) * channels)
    orientation = "SAR" if config.reader == "NibabelIOWithReorient" else "KJI"
    return prepare_as_nnunet(loaded, config, orientation, target_mm, in_slabs=in_slabs).image


@pytest.mark.parametrize("order", [2, 3, 5])
@pytest.mark.parametrize("step", [1, 4, 1000])
def test_slabs_give_the_values_of_the_whole(order: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).normal(100, 30, (2, 13, 17, 30)).astype(np.float32)
    changes = {"target_mm": (0.7, 1.9, 1.0), "data": SPLINE.model_copy(update={"order": order})}
    whole = prepared(image, **changes)
    assert whole.shape == (2, 43, 9, 13)
    monkeypatch.setattr(nnunet, "_SLAB_BYTES", 24 * (30 * 17 + 43 * 9) * step)
    np.testing.assert_allclose(prepared(image, **changes, in_slabs=True), whole, rtol=1e-6, atol=1e-6)


def test_slices_along_a_coarse_axis_are_those_of_their_own_splines() -> None:
    """Four slices of 5 mm to nine of 2.2 mm: the nearest of slices that were resampled one by one."""
    image = np.random.default_rng(0).normal(100, 30, (1, 12, 10, 4)).astype(np.float32)
    (found,) = prepared(image, (2.2, 0.8, 0.8), np.diag([1.0, 1.0, 5.0, 1.0]))
    slices = image[0].T.astype(np.float64)
    resized = [
        np.clip(ndimage.zoom(one, (12 / 10, 15 / 12), order=3, mode="nearest", grid_mode=True), one.min(), one.max())
        for one in slices
    ]
    expected = np.stack([resized[index] for index in (0, 0, 1, 1, 2, 2, 2, 3, 3)])
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_copies_are_those_that_are_forecast() -> None:
    image = np.random.default_rng(0).normal(size=(1, 40, 60, 50)).astype(np.float32)
    expected = resampling_bytes((40, 60, 50), SPLINE, None, in_slabs=False)
    assert expected == 12 * 64 * 84 * 74
    assert resampling_bytes((40, 60, 50), SPLINE, 0, in_slabs=False) < 2**28
    assert resampling_bytes((40, 60, 50), TORCH, None, in_slabs=False) == 0
    target = np.empty((40, 60, 25), np.float32)
    tracemalloc.start()
    nnunet._resample(image, (40, 60, 25), SPLINE, None, in_slabs=False)
    peak = tracemalloc.get_traced_memory()[1] - target.nbytes
    tracemalloc.stop()
    assert 0.9 * expected < peak < 1.1 * expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [(SPLINE, [1, 1, 1, 3, 3, 3]), (TORCH, [1, 1, 1, 3, 3, 3])],
)
def test_labels_are_resampled_by_the_largest_share(config: ResamplingConfig, expected: list[int]) -> None:
    labels = np.array([1, 3], np.int16).reshape(1, 1, 2)
    np.testing.assert_array_equal(nnunet._resample_labels(labels, (1, 1, 6), config, None).ravel(), expected)


@pytest.mark.parametrize(("config", "expected"), [(SPLINE, 3), (TORCH, 1)])
def test_equal_shares_are_settled_by_the_nearest_voxel_or_in_torch_by_the_lowest_value(
    config: ResamplingConfig, expected: int
) -> None:
    """Half way between the two voxels the nearest, half to even in scipy, is the second."""
    labels = np.array([1, 3], np.int16).reshape(1, 1, 2)
    assert nnunet._resample_labels(labels, (1, 1, 1), config, None).ravel().tolist() == [expected]


def test_spacings_are_those_that_the_readers_of_nnunet_take(tmp_path: Path) -> None:
    affine = np.diag([0.7, 0.9, 1.3, 1.0])
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), affine)
    image.header["pixdim"][1:4] = np.nextafter(np.float32([0.7, 0.9, 1.3]), np.float32(9))
    nib.save(image, tmp_path / "a.nii")
    grid = read_grid(tmp_path / "a.nii")
    pixdim = [float(mm) for mm in nib.load(tmp_path / "a.nii").header.get_zooms()]
    assert axis_spacing(grid, "KJI", "SimpleITKIO") == tuple(pixdim[::-1])
    assert axis_spacing(grid, "SAR", "NibabelIOWithReorient") == tuple(pixdim[::-1])  # RAS already
    image.header["pixdim"][1:4] = 0.75  # not the voxel size of the sform
    image.to_filename(tmp_path / "b.nii")
    assert axis_spacing(read_grid(tmp_path / "b.nii"), "KJI", "NibabelIO") == (0.75, 0.75, 0.75)
    turned = replace(grid, affine=np.diag([-0.7, 0.9, 1.3, 1.0]))
    norms = [float(np.float32(mm)) for mm in (1.3, 0.9, 0.7)]
    assert axis_spacing(turned, "SAR", "NibabelIOWithReorient") == tuple(norms)
    flat = SimpleITK.GetImageFromArray(np.zeros((5, 4), np.float32))
    flat.SetSpacing((0.5, 2.0))
    SimpleITK.WriteImage(flat, str(tmp_path / "flat.mha"))
    assert axis_spacing(read_grid(tmp_path / "flat.mha"), "KJI", "SimpleITKIO") == (1998.0, 2.0, 0.5)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "SLA"])
def test_means_are_taken_in_the_order_of_memory_that_nibabel_leaves(orientation: str) -> None:
    """float32 sums differ in the last bits between orders; nnU-Net's reader written out."""
    values = np.random.default_rng(0).uniform(50, 200, (19, 23, 29)).astype(np.float32)
    to_ras = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
    )
    image = nib.Nifti1Image(values, np.eye(4)).as_reoriented(to_ras)
    stored = nib.Nifti1Image(np.asfortranarray(image.dataobj), image.affine)
    assert "".join(nib.aff2axcodes(stored.affine)) == orientation
    ras = stored.as_reoriented(nib.io_orientation(stored.affine))
    read = np.vstack([ras.get_fdata().transpose(2, 1, 0)[None]], dtype=np.float32)
    expected = (read[0] - read[0].mean()) / read[0].std()
    voxels = np.asarray(stored.dataobj)[None]
    changes = {"reader": "NibabelIOWithReorient", "normalization_schemes": ("ZScoreNormalization",)}
    found = prepared(voxels, (1.0, 1.0, 1.0), stored.affine, **changes)
    np.testing.assert_array_equal(found[0], expected)


def test_colours_are_from_0_to_255() -> None:
    image = torch.linspace(0, 255, 60).reshape(1, 3, 4, 5).numpy()
    changes: dict[str, Any] = {"target_mm": (1.0, 1.0, 1.0), "normalization_schemes": ("RGBTo01Normalization",)}
    assert prepared(image.copy(), **changes).max() == 1
    with pytest.raises(DataError, match=r"the values of channel 0 are 0 to 510; expected colours from 0 to 255"):
        prepared(image * 2, **changes)
