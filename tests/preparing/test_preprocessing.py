"""Loading, preparing and the recorded way back."""

from __future__ import annotations

import json
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segkit.errors import DataError, RequestError
from segkit.labels import SCHEMES
from segkit.preparing.preprocessing import (
    LoadedCase,
    Preparation,
    PreprocessingConfig,
    load_case,
    prepare,
)
from segkit.preparing.resampling import resample_image, resample_labels, resampled_shape
from segkit.reading.case import Case, ImageFile
from segkit.reading.volume import Grid

MRI = PreprocessingConfig(normalisation="zscore-nonzero", crop="nonzero")


def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> ImageFile:
    nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0]) if affine is None else affine), path)
    return ImageFile(path)


def loaded_case(image: np.ndarray, labels: np.ndarray | None = None, affine: np.ndarray | None = None) -> LoadedCase:
    affine = np.eye(4) if affine is None else affine
    return LoadedCase("case", image.astype(np.float32), labels, Grid(image.shape[1:], affine), (True,) * len(image))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """Two modalities and a BraTS-2017 reference of 4 x 3 x 2 voxels."""
    t1c = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    labels = np.zeros((4, 3, 2), np.uint8)
    labels[1, 1, 1], labels[2, 1, 1] = 4, 2
    images = {"t1c": write(tmp_path / "x_t1c.nii.gz", t1c), "t2f": write(tmp_path / "x_t2f.nii.gz", -t1c)}
    return Case("x", "x", images, write(tmp_path / "x_seg.nii.gz", labels), SCHEMES["brats2017"])


def test_load_case_stacks_in_the_asked_order_and_translates_labels(case: Case) -> None:
    loaded = load_case(case, ("t2f", "t1c"), SCHEMES["brats2023"])

    assert loaded.image.shape == (2, 4, 3, 2)
    assert loaded.image[:, 3, 2, 1].tolist() == [-23.0, 23.0]
    assert loaded.labels is not None
    assert (loaded.labels[1, 1, 1], loaded.labels[2, 1, 1]) == (3, 2)  # ET is 4 in 2017 and 3 in 2023
    assert loaded.grid.orientation == "LPS"
    assert loaded.available == (True, True)


def test_load_case_without_a_scheme_reads_no_reference(case: Case) -> None:
    Path(case.label.path).unlink()  # type: ignore[union-attr]

    assert load_case(case, ("t1c",), None).labels is None


def test_missing_modality_is_refused_unless_allowed(case: Case) -> None:
    with pytest.raises(DataError, match=r"no file for modality t1n; found t1c, t2f.*--allow-missing"):
        load_case(case, ("t1n", "t1c"), None)

    loaded = load_case(case, ("t1n", "t1c"), None, allow_missing=True)
    assert loaded.available == (False, True)
    assert not loaded.image[0].any()


def test_a_case_without_any_of_the_modalities_is_refused_even_if_some_may_miss(case: Case) -> None:
    with pytest.raises(DataError, match="no file for modality t1n"):
        load_case(case, ("t1n",), None, allow_missing=True)


def test_other_shape_names_both_files(case: Case, tmp_path: Path) -> None:
    write(tmp_path / "x_t2f.nii.gz", np.ones((4, 3, 3), np.float32))

    with pytest.raises(DataError, match=r"x_t2f.nii.gz: does not lie on the grid of .*x_t1c.nii.gz"):
        load_case(case, ("t1c", "t2f"), None)


def test_reference_on_another_affine_names_both_files(case: Case, tmp_path: Path) -> None:
    write(tmp_path / "x_seg.nii.gz", np.zeros((4, 3, 2), np.uint8), np.diag([1.0, 1.0, 2.0, 1.0]))

    with pytest.raises(DataError, match=r"x_seg.nii.gz: does not lie on the grid of .*x_t1c.nii.gz"):
        load_case(case, ("t1c",), SCHEMES["brats2017"])


def test_nan_and_infinity_are_counted(case: Case, tmp_path: Path) -> None:
    array = np.ones((4, 3, 2), np.float32)
    array[0, 0, :] = np.nan, np.inf
    write(tmp_path / "x_t1c.nii.gz", array)

    with pytest.raises(DataError, match=r"x_t1c.nii.gz: 2 voxels are NaN or infinite"):
        load_case(case, ("t1c",), None)


def test_label_values_unknown_to_the_scheme_are_named(case: Case, tmp_path: Path) -> None:
    labels = np.zeros((4, 3, 2), np.uint8)
    labels[0, 0] = 3, 7
    write(tmp_path / "x_seg.nii.gz", labels)

    with pytest.raises(DataError, match=r"label values \[3, 7\] are not in label scheme brats2017"):
        load_case(case, ("t1c",), SCHEMES["brats2017"])


def test_prepare_turns_crops_and_normalises() -> None:
    image = np.zeros((2, 4, 3, 2), np.float32)
    image[0, 1, 1, 0], image[0, 2, 1, 0] = 10, 30  # mean 20, deviation 10
    image[1, 2, 1, 1] = 5  # a single voxel: deviation 0
    labels = np.zeros((4, 3, 2), np.uint8)
    labels[2, 1, 0] = 1

    prepared = prepare(loaded_case(image, labels, np.diag([-1.0, 1.0, 1.0, 1.0])), MRI)

    assert prepared.preparation.crop == ((1, 1, 0), (3, 2, 2))  # axis 0 is reversed: source voxels 1..2 of 4
    assert prepared.image[0, :, 0, 0].tolist() == pytest.approx([1.0, -1.0])
    assert prepared.image[0, :, 0, 1].tolist() == [0.0, 0.0]  # background stays 0
    assert prepared.image[1].tolist() == [[[0.0, 0.0]], [[0.0, 0.0]]]
    assert prepared.labels is not None
    assert prepared.labels[:, 0, 0].tolist() == [1, 0]


def test_prepare_leaves_the_loaded_case_alone() -> None:
    image = np.arange(1, 9, dtype=np.float32).reshape(1, 2, 2, 2)
    loaded = loaded_case(image.copy())

    prepare(loaded, MRI)

    assert np.array_equal(loaded.image, image)


def test_an_empty_image_is_kept_whole() -> None:
    prepared = prepare(loaded_case(np.zeros((1, 3, 4, 5))), MRI)

    assert prepared.image.shape == (1, 3, 4, 5)
    assert not prepared.image.any()


def test_whole_volume_normalisation_is_that_of_numpy() -> None:
    image = np.array([[[0.0, 2.0], [4.0, 6.0]]])  # a picture: mean 3, deviation sqrt(5)

    prepared = prepare(loaded_case(image), PreprocessingConfig(normalisation="zscore", crop="none"))

    assert prepared.image.ravel().tolist() == pytest.approx((np.array([-3, -1, 1, 3]) / np.sqrt(5)).tolist())
    assert prepared.preparation.cropped_shape == (2, 2)


def test_ct_window_clips_then_scales_and_spares_missing_modalities() -> None:
    image = np.array([[[[-1000.0, 0.0, 40.0, 900.0]]], [[[0.0, 0.0, 0.0, 0.0]]]])
    loaded = LoadedCase("ct", image.astype(np.float32), None, Grid((1, 1, 4), np.eye(4)), (True, False))
    config = PreprocessingConfig(normalisation="ct-window", crop="none", ct_window=(-20, 100), ct_mean=40, ct_std=30)

    prepared = prepare(loaded, config)

    assert prepared.image[0].ravel().tolist() == pytest.approx([-2.0, -4 / 3, 0.0, 2.0])
    assert not prepared.image[1].any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PreprocessingConfig(crop="none"), "normalisation or crop is not decided"),
        (PreprocessingConfig(crop="none", normalisation="ct-window"), "ct-window needs"),
    ],
)
def test_undecided_settings_are_refused(config: PreprocessingConfig, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        prepare(loaded_case(np.ones((1, 2, 2, 2))), config)


def test_resampling_happens_only_beyond_one_percent() -> None:
    assert resampled_shape((10, 10, 10), (1.005, 2.0, 0.5), (1.0, 1.0, 1.0)) == (10, 20, 5)
    assert resampled_shape((10, 10, 1), (1.0, 1.0, 1.0), (3.0, 1.0, 3.0)) == (3, 10, 1)

    image = np.ones((1, 2, 2, 2), np.float32)
    assert resample_image(image, (2, 2, 2)) is image


def test_prepare_resamples_anisotropic_volumes_to_the_target_spacing() -> None:
    labels = np.zeros((2, 2, 2), np.uint8)
    labels[:, :, 1] = 2

    config = PreprocessingConfig(normalisation="zscore", crop="none", spacing_mm=(1.0, 1.0, 1.0))
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    prepared = prepare(loaded_case(np.arange(8.0).reshape(1, 2, 2, 2), labels, affine), config)

    assert prepared.image.shape == (1, 2, 2, 6)
    assert prepared.preparation.resampled_shape == (2, 2, 6)
    assert prepared.preparation.cropped_shape == (2, 2, 2)
    assert prepared.preparation.spacing_mm == pytest.approx((1.0, 1.0, 1.0))
    assert prepared.labels is not None
    assert prepared.labels[0, 0].tolist() == [0, 0, 0, 2, 2, 2]


def test_linear_resampling_by_hand() -> None:
    # Four samples from two, outer faces aligned: voxel centres fall at 1/4 and 3/4 of the way between the old ones.
    image = np.array([[[0.0, 4.0]]], np.float32)  # (C, H, W)

    assert resample_image(image, (1, 4))[0, 0].tolist() == [0.0, 1.0, 3.0, 4.0]


def test_labels_never_take_a_value_between_two_others() -> None:
    labels = np.array([[1, 1, 3, 3]], np.uint8)

    assert resample_labels(labels, (1, 8)).tolist() == [[1, 1, 1, 1, 3, 3, 3, 3]]


def test_an_absurd_spacing_is_refused() -> None:
    config = MRI.model_copy(update={"spacing_mm": (1e-4, 1e-4, 1e-4)})

    with pytest.raises(DataError, match="resampling from"):
        prepare(loaded_case(np.ones((1, 4, 4, 4))), config)


def orientations() -> list[np.ndarray]:
    """The affines of all 48 orientations."""
    affines = []
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        affine = np.zeros((4, 4))
        affine[3, 3] = 1
        for axis, (row, sign) in enumerate(zip(order, signs, strict=True)):
            affine[row, axis] = sign
        affines.append(affine)
    return affines


@pytest.mark.parametrize("affine", orientations())
def test_the_recorded_way_back_is_exact(affine: np.ndarray) -> None:
    image = np.zeros((1, 5, 6, 7), np.float32)
    image[0, 1:4, 2:5, 3:6] = np.arange(1, 28).reshape(3, 3, 3)
    prepared = prepare(loaded_case(image, image[0].astype(np.uint8), affine), MRI)
    recorded = Preparation.from_json(json.loads(json.dumps(prepared.preparation.to_json())))

    whole = np.zeros(recorded.reoriented_shape, np.uint8)
    whole[recorded.crop_slices] = prepared.labels
    back = recorded.reorientation.undo(whole)

    assert recorded.cropped_shape == (3, 3, 3)
    assert np.array_equal(back, image[0])
    assert np.array_equal(recorded.source_grid.affine, affine)


def assert_equal_to_the_handwritten_script(t1c: Path, t2f: Path, to_ras: tuple[slice, ...]) -> None:
    """The same numbers, bit for bit, as a MONAI user gets who normalises, then crops to what is not 0."""
    files = {"t1c": ImageFile(t1c), "t2f": ImageFile(t2f)}
    expected = np.stack([nib.load(file.path).get_fdata(dtype=np.float32)[to_ras] for file in files.values()])
    for plane in expected:
        inside = plane != 0
        plane[inside] = (plane[inside] - plane[inside].mean()) / (plane[inside].std() + 1e-8)
    box = tuple(slice(places.min(), places.max() + 1) for places in np.nonzero((expected != 0).any(axis=0)))

    config = MRI.model_copy(update={"spacing_mm": (1.0, 1.0, 1.0)})
    prepared = prepare(load_case(Case("real", "real", files), tuple(files), None), config)

    assert np.array_equal(prepared.image, expected[(slice(None), *box)])


def test_preparing_a_real_case_equals_the_handwritten_script(real_data: Path) -> None:
    folder, back = real_data / "open_ms" / "patient19", slice(None, None, -1)
    assert_equal_to_the_handwritten_script(folder / "T1POST.nii.gz", folder / "FLAIR.nii.gz", (back,))  # LAS


def test_preparing_a_real_case_of_brats_equals_the_handwritten_script(shared_data: Path) -> None:
    name, back = "BraTS2021_00006", slice(None, None, -1)
    t1c, t2f = (shared_data / "brats2021" / name / f"{name}_{tail}.nii.gz" for tail in ("t1ce", "flair"))
    assert_equal_to_the_handwritten_script(t1c, t2f, (back, back))  # LPS
