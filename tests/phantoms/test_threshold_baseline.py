from __future__ import annotations

import numpy as np
import pytest

from segkit.errors import RequestError
from segkit.phantoms.phantom import best_single_thresholds


def case(first: list[float], second: list[float], labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Two sequences and a reference of one row of voxels, (2, 1, 1, N) and (1, 1, N)."""
    image = np.array([first, second], np.float32)[:, None, None]
    return image, np.array(labels, np.uint8)[None, None]


def test_finds_sequence_and_direction() -> None:
    # Label 1 is where the second sequence is dark; the first tells nothing. The last two voxels are no brain.
    image, labels = case([5, 7, 5, 7, 5, 7, 0, 0], [1, 1, 9, 9, 9, 9, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0])
    best = best_single_thresholds([image], [labels], modalities=("t1n", "t2w"), regions={"A": (1,)})["A"]
    assert (best.region, best.modality, best.direction, best.dice) == ("A", "t2w", "<", 1.0)
    # Brain: mean 19 / 3, deviation sqrt(128 / 9); the dark voxels lie at -1.414, the others at 0.707.
    assert -1.415 < best.threshold < 0.708


def test_dice_of_the_best_compromise() -> None:
    # Above 2: three chosen, two right, of two -> 4 / 5. Above 3: one chosen, right -> 2 / 3.
    image, labels = case([1, 2, 3, 3, 4], [1, 1, 1, 1, 1], [0, 0, 1, 0, 1])
    best = best_single_thresholds([image], [labels], modalities=("t1n", "t2w"), regions={"A": (1,)})["A"]
    assert (best.modality, best.direction) == ("t1n", ">")
    assert best.dice == pytest.approx(0.8)


def test_one_threshold_serves_all_cases_in_standard_deviations() -> None:
    # The second case has another intensity scale; z-scoring makes them alike.
    image, labels = case([1, 1, 1, 3], [1, 2, 1, 2], [0, 0, 0, 2])
    images, references = [image, 100 * image + 50], [labels, labels]
    best = best_single_thresholds(images, references, modalities=("t1n", "t2w"), regions={"A": (2, 3)})["A"]
    assert (best.modality, best.direction, best.dice) == ("t1n", ">", 1.0)


def test_mean_over_cases_not_pooled() -> None:
    # Case 1 has its region where t1n is bright, case 2 where it is dark: each direction gains one case fully. In the
    # other case "all voxels but the extreme one" cannot be right: no voxel of the region is chosen, Dice 0.
    first, first_labels = case([1, 5], [3, 3], [0, 1])
    second, second_labels = case([1, 5], [3, 3], [1, 0])
    images, labels = [first, second], [first_labels, second_labels]
    best = best_single_thresholds(images, labels, modalities=("t1n", "t2w"), regions={"A": (1,)})["A"]
    # Choosing both voxels gives 2 / 3 in both cases, which beats 1 and 0.
    assert best.dice == pytest.approx(2 / 3)


def test_absent_region_is_found_by_choosing_nothing() -> None:
    image, labels = case([1, 2, 3, 4], [1, 1, 2, 2], [0, 0, 0, 0])
    assert best_single_thresholds([image], [labels], modalities=("t1n", "t2w"), regions={"A": (1,)})["A"].dice == 1.0


def test_unequal_lists_are_refused() -> None:
    image, labels = case([1], [1], [1])
    with pytest.raises(RequestError, match="0 images and 0 label maps"):
        best_single_thresholds([], [], modalities=("t1n", "t2w"), regions={"A": (1,)})
    with pytest.raises(RequestError, match="1 images and 2 label maps"):
        best_single_thresholds([image], [labels, labels], modalities=("t1n", "t2w"), regions={"A": (1,)})
