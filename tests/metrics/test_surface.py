"""Surface distances: single voxels at known distances, and MONAI as the second opinion."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from segkit.metrics.surface import surface_distances


def hd95_mm(prediction: np.ndarray, reference: np.ndarray, spacing_mm: tuple[float, ...]) -> float:
    return surface_distances(prediction, reference, spacing_mm).hausdorff_mm(95.0)


def surface_dice(
    prediction: np.ndarray, reference: np.ndarray, spacing_mm: tuple[float, ...], tolerance_mm: float
) -> float:
    return surface_distances(prediction, reference, spacing_mm).surface_dice(tolerance_mm)


def voxel(*index: int, shape: tuple[int, ...] = (9, 9, 9)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[index] = True
    return mask


@pytest.mark.parametrize(
    ("other", "distance"), [((5, 2, 2), 3.0), ((2, 5, 2), 6.0), ((2, 2, 5), 9.0), ((5, 5, 5), math.sqrt(9 + 36 + 81))]
)
def test_voxels_apart_with_anisotropic_spacing(other, distance):
    assert hd95_mm(voxel(2, 2, 2), voxel(*other), (1.0, 2.0, 3.0)) == pytest.approx(distance)


def test_works_in_2d():
    first, second = voxel(1, 1, shape=(6, 6)), voxel(4, 5, shape=(6, 6))
    assert hd95_mm(first, second, (1.0, 0.5)) == pytest.approx(math.hypot(3, 2))


def test_surface_is_face_connected_and_ends_at_the_image_edge():
    full = np.ones((5, 5, 5), bool)  # all but the inner 3 x 3 x 3
    centre = voxel(2, 2, 2, shape=(5, 5, 5))
    distances = surface_distances(full, centre, (1.0, 1.0, 1.0))
    assert len(distances.prediction_to_reference) == 125 - 27
    assert distances.reference_to_prediction.tolist() == [2.0]


def test_percentile_is_taken_per_direction():
    # Prediction: 19 voxels on the reference line and one 10 mm off. Its 95th percentile lies between them:
    # numpy's linear rule puts it 0.05 of the way from the 19th to the 20th of 20 sorted distances.
    reference = np.zeros((20, 12), bool)
    reference[:, 0] = True
    prediction = reference.copy()
    prediction[19, 0] = False
    prediction[19, 10] = True
    distances = surface_distances(prediction, reference, (1.0, 1.0))
    assert sorted(distances.prediction_to_reference)[-2:] == [0.0, 10.0]
    assert distances.hausdorff_mm(100) == 10.0
    assert distances.hausdorff_mm(95) == pytest.approx(0.5)


def test_surface_dice_counts_voxels_within_tolerance():
    reference = np.zeros((8, 8), bool)
    reference[2, 2:6] = True
    prediction = np.zeros((8, 8), bool)
    prediction[3, 2:6] = True
    prediction[7, 4] = True  # 4 or 5 mm away from everything else
    assert surface_dice(prediction, reference, (1.0, 1.0), 1.0) == pytest.approx(8 / 9)
    assert surface_dice(prediction, reference, (1.0, 1.0), 0.9) == 0.0
    assert surface_dice(prediction, reference, (0.5, 1.0), 0.5) == pytest.approx(8 / 9)


def test_empty_masks():
    empty, some = np.zeros((4, 4, 4), bool), voxel(1, 1, 1, shape=(4, 4, 4))
    spacing = (1.0, 1.0, 1.0)
    assert math.isnan(hd95_mm(empty, empty, spacing))
    assert math.isnan(surface_dice(empty, empty, spacing, 1.0))
    assert hd95_mm(empty, some, spacing) == hd95_mm(some, empty, spacing) == math.inf
    assert surface_dice(empty, some, spacing, 1.0) == surface_dice(some, empty, spacing, 1.0) == 0.0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("shape", "spacing"), [((14, 16, 12), (1.0, 2.0, 3.0)), ((30, 24), (0.7, 1.3))])
def test_agrees_with_monai(seed, shape, spacing):
    random = np.random.default_rng(seed)
    prediction, reference = (random.random(shape) < 0.2 for _ in range(2))
    tensors = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, reference)]
    expected = compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=spacing)
    assert hd95_mm(prediction, reference, spacing) == pytest.approx(expected.item(), rel=1e-5)
    tolerance = 1.5
    monai_dice = compute_surface_dice(*tensors, [tolerance], include_background=True, spacing=spacing)
    assert surface_dice(prediction, reference, spacing, tolerance) == pytest.approx(monai_dice.item(), rel=1e-5)
