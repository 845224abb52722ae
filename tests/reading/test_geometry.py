"""Orientation there and back, and what counts as the same grid."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segkit.errors import RequestError
from segkit.reading.files import read_grid
from segkit.reading.geometry import Reorientation, reorientation_to, reoriented_grid, same_grid
from segkit.reading.volume import Grid
from segkit.shapes import Affine

SHAPE = (2, 3, 4)
ALL_ORIENTATIONS = ["".join(letters) for pairs in permutations(("LR", "AP", "IS")) for letters in product(*pairs)]


def grid_oriented(orientation: str, *, spacing_mm: tuple[float, float, float] = (1.0, 2.0, 3.0)) -> Grid:
    """A grid of (2, 3, 4) voxels whose axes grow in the directions named."""
    affine = np.zeros((4, 4))
    affine[:, 3] = (-10.0, 20.0, 30.0, 1.0)
    for axis, letter in enumerate(orientation):
        world = next(index for index, pair in enumerate(("LR", "PA", "IS")) if letter in pair)
        affine[world, axis] = spacing_mm[axis] * (1.0 if letter in "RAS" else -1.0)
    return Grid(SHAPE, affine)


def oblique(affine: Affine, degrees: float) -> Affine:
    """The affine turned about an axis that is none of the patient's."""
    angle, (x, y, z) = np.deg2rad(degrees), np.array([1.0, 2.0, 3.0]) / np.sqrt(14.0)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    turn = np.eye(4)
    turn[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return turn @ affine


def world_of_values(grid: Grid, array: np.ndarray) -> dict[int, tuple[float, ...]]:
    """The place in the world of every value of an array of different values."""
    indices = np.argwhere(np.ones(grid.shape, bool))
    places = indices @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    return {
        int(array[tuple(index)]): tuple(np.round(place, 6) + 0.0) for index, place in zip(indices, places, strict=True)
    }


def test_there_are_48_orientations() -> None:
    assert len(set(ALL_ORIENTATIONS)) == 48


@pytest.mark.parametrize("degrees", [0.0, 20.0])
@pytest.mark.parametrize("source", ALL_ORIENTATIONS)
def test_every_orientation_goes_to_ras_and_back_voxel_by_voxel(source: str, degrees: float) -> None:
    grid = grid_oriented(source)
    grid = replace(grid, affine=oblique(grid.affine, degrees))
    assert grid.orientation == source
    array = np.arange(24, dtype=np.int16).reshape(SHAPE)
    turn = reorientation_to(grid)
    turned, turned_grid = turn.apply(array), reoriented_grid(grid, turn)
    assert turned_grid.orientation == "RAS"
    assert turned.shape == turned_grid.shape
    assert world_of_values(turned_grid, turned) == world_of_values(grid, array)
    np.testing.assert_array_equal(turn.undo(turned), array)


@pytest.mark.parametrize("target", ALL_ORIENTATIONS)
def test_every_orientation_can_be_the_target(target: str) -> None:
    grid = grid_oriented("LPS")
    turn = reorientation_to(grid, target)
    array = np.arange(24).reshape(SHAPE)
    assert reoriented_grid(grid, turn).orientation == target
    np.testing.assert_array_equal(turn.undo(turn.apply(array)), array)


@pytest.mark.parametrize("source", ["RAS", "LPI", "SPL"])
def test_the_axes_of_the_file_in_another_order(source: str) -> None:
    """As SimpleITK hands out arrays: reversed, and never flipped whatever the header says."""
    turn = reorientation_to(grid_oriented(source), "KJI")
    assert turn == Reorientation((2, 1, 0), (False, False, False), SHAPE)
    values = np.arange(24).reshape(SHAPE)
    assert np.array_equal(turn.apply(values), values.T)
    assert np.array_equal(turn.undo(values.T), values)
    turned = reoriented_grid(grid_oriented(source), turn)
    assert turned.orientation == source[::-1]
    assert turned.spacing_mm == (3.0, 2.0, 1.0)
    assert reorientation_to(grid_oriented(source), "IKJ").axes == (0, 2, 1)


def test_apply_agrees_with_nibabel() -> None:
    grid = grid_oriented("IPL")
    array = np.arange(24, dtype=np.int16).reshape(SHAPE)
    expected = nib.as_closest_canonical(nib.Nifti1Image(array, grid.affine))
    turn = reorientation_to(grid)
    np.testing.assert_array_equal(turn.apply(array), expected.get_fdata())
    np.testing.assert_allclose(reoriented_grid(grid, turn).affine, expected.affine)


def test_one_axis_by_hand() -> None:
    # L to R reverses the first axis; what lay at index 0 (x = -10 mm) is now at index 1.
    turn = reorientation_to(grid_oriented("LAS"))
    assert turn == Reorientation((0, 1, 2), (True, False, False), SHAPE)
    turned_grid = reoriented_grid(grid_oriented("LAS"), turn)
    assert turned_grid.affine[0].tolist() == [1.0, 0.0, 0.0, -11.0]


def test_channels_in_front_are_left_alone() -> None:
    turn = reorientation_to(grid_oriented("SPL"))
    batch = np.arange(2 * 3 * 24).reshape(2, 3, *SHAPE)
    turned = turn.apply(batch)
    assert turned.shape == (2, 3, *turn.target_shape) == (2, 3, 4, 3, 2)
    np.testing.assert_array_equal(turned[1, 2], turn.apply(batch[1, 2]))
    np.testing.assert_array_equal(turn.undo(turned), batch)
    assert turned.flags.c_contiguous


def test_codes_and_second_form_travel_with_the_grid() -> None:
    grid = grid_oriented("LPS")
    shifted = grid.affine.copy()
    shifted[:3, 3] += 5.0
    grid = replace(grid, qform=shifted, qform_code=2, sform_code=4, xyzt_units=10)
    turned = reoriented_grid(grid, reorientation_to(grid))
    assert (turned.qform_code, turned.sform_code, turned.xyzt_units) == (2, 4, 10)
    assert turned.qform is not None
    np.testing.assert_allclose(turned.qform[:3, 3] - turned.affine[:3, 3], 5.0)


def test_pictures_are_not_turned() -> None:
    grid = Grid((3, 4), np.eye(4))
    turn = reorientation_to(grid)
    picture = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(turn.apply(picture), picture)
    assert reoriented_grid(grid, turn) is grid


@pytest.mark.parametrize("orientation", ["XYZ", "RA", "RRS", "RASL", "IJJ", "IJS"])
def test_an_orientation_that_is_none_is_refused(orientation: str) -> None:
    with pytest.raises(RequestError, match="is not an orientation; expected three letters"):
        reorientation_to(grid_oriented("RAS"), orientation)


def test_an_array_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not end in \(2, 3, 4\)"):
        reorientation_to(grid_oriented("RAS")).apply(np.zeros((4, 3, 2)))


def brats_grid() -> Grid:
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[1, 3] = 239.0
    return Grid((240, 240, 155), affine)


@pytest.mark.parametrize(("drift_mm", "is_same"), [(0.0, True), (1e-5, True), (0.2, True), (0.25, False), (5.0, False)])
def test_drift_of_the_origin(drift_mm: float, is_same: bool) -> None:
    # The longest side is 240 mm, so that 0.24 mm are accepted.
    moved = brats_grid().affine.copy()
    moved[2, 3] += drift_mm
    assert (same_grid(brats_grid(), replace(brats_grid(), affine=moved)) is None) is is_same


def test_a_quarter_voxel_is_the_most_that_thin_slices_may_drift() -> None:
    # 300 mm long, which would allow 0.3 mm; voxels of 0.4 mm allow 0.1 mm.
    thin = Grid((750, 750, 40), np.diag([0.4, 0.4, 5.0, 1.0]))
    moved = thin.affine.copy()
    moved[0, 3] = 0.2
    assert same_grid(thin, replace(thin, affine=moved)) is not None
    moved[0, 3] = 0.09
    assert same_grid(thin, replace(thin, affine=moved)) is None


def test_the_eighth_digit_of_a_rotation_is_no_difference() -> None:
    first = oblique(brats_grid().affine, 11.0)
    assert same_grid(replace(brats_grid(), affine=first), replace(brats_grid(), affine=first * (1 + 1e-8))) is None


def test_other_shapes_are_named() -> None:
    other = replace(brats_grid(), shape=(240, 240, 154))
    assert same_grid(brats_grid(), other) == (
        "the first image has 240 x 240 x 155 voxels and the second image has 240 x 240 x 154"
    )


def test_other_directions_are_named() -> None:
    flipped = brats_grid().affine @ np.diag([-1.0, 1.0, 1.0, 1.0])
    sentence = same_grid(
        replace(brats_grid(), source=Path("t1.nii.gz")),
        replace(brats_grid(), affine=flipped, source=Path("seg.nii.gz")),
    )
    assert sentence == ("t1.nii.gz is oriented LPS and seg.nii.gz RPS: the same voxel index lies up to 478.0 mm apart")


def test_other_spacings_are_named() -> None:
    coarse = replace(brats_grid(), affine=brats_grid().affine @ np.diag([1.0, 1.0, 2.0, 1.0]))
    assert "1 x 1 x 1 mm and those of the second image 1 x 1 x 2 mm" in str(same_grid(brats_grid(), coarse))


def test_other_places_are_named_in_mm_and_voxels() -> None:
    moved = brats_grid().affine.copy()
    moved[2, 3] += 7.0
    assert "up to 7.00 mm (7.0 voxels) apart" in str(same_grid(brats_grid(), replace(brats_grid(), affine=moved)))


def test_pictures_are_compared_by_size() -> None:
    assert same_grid(Grid((5, 6), np.eye(4)), Grid((5, 6), np.eye(4))) is None
    assert same_grid(Grid((5, 6), np.eye(4)), Grid((6, 5), np.eye(4))) is not None


def test_a_real_mask_that_lost_its_position_is_recognised(shared_data: Path) -> None:
    case = shared_data / "brats2023_inpainting" / "BraTS-GLI-00001-000"
    scan = read_grid(case / "BraTS-GLI-00001-000-t1n.nii.gz")
    assert same_grid(scan, read_grid(case / "seg-BraTS23_1.nii.gz")) is None
    sentence = same_grid(scan, read_grid(case / "seg-BraTS23_1_mapped.nii.gz"))
    assert str(sentence).startswith("seg-BraTS23_1_mapped.nii.gz has lost its position in the patient")
    assert "with the header of the scan it belongs to" in str(sentence)
