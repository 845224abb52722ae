"""The augmentation recipe: what it may and may not change."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from monai.data import get_track_meta
from monai.transforms import GaussianSmooth
from pydantic import ValidationError

from segkit.preparing.augmentation import Augmentation, AugmentationConfig, change_intensities

NOTHING = AugmentationConfig(
    mirror_axes=(),
    rotation_probability=0,
    scale_probability=0,
    noise_probability=0,
    blur_probability=0,
    brightness_probability=0,
    contrast_probability=0,
    low_resolution_probability=0,
    gamma_probability=0,
    modality_dropout=0,
)
INTENSITIES = ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma")


def always(**changes: object) -> AugmentationConfig:
    return NOTHING.model_copy(update=changes)


def sample(shape: tuple[int, ...] = (6, 7, 8), channels: int = 2) -> dict[str, np.ndarray]:
    """Positive intensities in the middle, exact zeros in the outermost layer, labels 0 to 3."""
    generator = np.random.default_rng(0)
    image = np.zeros((channels, *shape), np.float32)
    inner = (slice(None), *(slice(1, -1) for _ in shape))
    image[inner] = generator.uniform(1, 2, image[inner].shape)
    return {"image": image, "labels": generator.integers(0, 4, (1, *shape)).astype(np.uint8)}


def test_disabled_augmentation_only_cuts() -> None:
    whole = sample()

    patch = Augmentation(AugmentationConfig(enabled=False, mirror_axes=(0,)), (4, 4, 4))(whole, 0, (3, 3, 4))

    assert np.array_equal(patch["image"], whole["image"][:, 1:5, 1:5, 2:6])
    assert np.array_equal(patch["labels"], whole["labels"][:, 1:5, 1:5, 2:6])


def test_a_patch_larger_than_the_sample_is_padded_with_zeros() -> None:
    picture = {"image": np.full((1, 2, 3), 5, np.float32)}

    patch = Augmentation(NOTHING, (4, 3))(picture, 0)

    assert patch["image"].tolist() == [[[0, 0, 0], [5, 5, 5], [5, 5, 5], [0, 0, 0]]]
    assert set(patch) == {"image"}


@pytest.mark.parametrize("shape", [(6, 7, 8), (9, 8)])
def test_the_result_depends_on_the_seed_only(shape: tuple[int, ...]) -> None:
    config = AugmentationConfig(mirror_axes=(0, 1), rotation_probability=0.7, gamma_probability=0.7)
    augment = Augmentation(config, shape)
    whole = sample(shape)
    before = whole["image"].copy()
    patches = []
    for _ in range(2):
        torch.manual_seed(len(patches))
        patches.append([augment(whole, seed) for seed in range(8)])

    for first, second in zip(*patches, strict=True):
        assert torch.equal(first["image"], second["image"])
        assert torch.equal(first["labels"], second["labels"])
    assert len({float(patch["image"].sum()) for patch in patches[0]}) == 8
    assert np.array_equal(whole["image"], before)


@pytest.mark.parametrize("name", INTENSITIES)
def test_each_intensity_change_fires_and_leaves_zeros_and_labels_alone(name: str) -> None:
    whole = sample()
    patch = Augmentation(always(**{f"{name}_probability": 1.0}), (6, 7, 8))(whole, 3)

    inside = whole["image"] != 0
    assert not np.allclose(patch["image"].numpy()[inside], whole["image"][inside])
    assert not patch["image"].numpy()[~inside].any()
    assert np.array_equal(patch["labels"], whole["labels"])


def test_brightness_multiplies() -> None:
    whole = sample()
    patch = Augmentation(always(brightness_probability=1.0, brightness_range=(2.0, 2.0)), (6, 7, 8))(whole, 0)

    assert np.allclose(patch["image"], 2 * whole["image"])


@pytest.mark.parametrize("shape", [(1, 9, 8, 7), (1, 30, 20)])
def test_blurring_is_that_of_monai(shape: tuple[int, ...]) -> None:
    image = torch.from_numpy(np.random.default_rng(0).uniform(1, 2, shape).astype(np.float32))
    config = always(blur_probability=1.0, blur_sigma_range=(0.7, 0.7))

    changed = change_intensities(image.clone(), config, np.random.default_rng(0))

    assert torch.equal(changed, torch.as_tensor(GaussianSmooth(0.7)(image)))


def test_gamma_keeps_mean_and_deviation() -> None:
    whole = {"image": np.random.default_rng(0).normal(size=(1, 9, 9, 9)).astype(np.float32)}
    changed = Augmentation(always(gamma_probability=1.0), (9, 9, 9))(whole, 0)["image"].numpy()

    assert changed.mean() == pytest.approx(whole["image"].mean(), abs=1e-4)
    assert changed.std() == pytest.approx(whole["image"].std(), rel=1e-3)


def test_mirroring_takes_image_and_labels_along_the_allowed_axes_only() -> None:
    whole = sample((4, 4, 4))
    augment = Augmentation(always(mirror_axes=(2,)), (4, 4, 4))

    seen = set()
    for seed in range(12):
        patch = augment(whole, seed)
        is_mirrored = not np.array_equal(patch["labels"], whole["labels"])
        step = -1 if is_mirrored else 1
        assert np.array_equal(patch["labels"], whole["labels"][..., ::step])
        assert np.array_equal(patch["image"], whole["image"][..., ::step])
        seen.add(is_mirrored)
    assert seen == {True, False}


def test_a_quarter_turn_by_hand() -> None:
    # Odd patch, so that the pivot is its centre voxel; the angle is drawn from [-90, 90], seed 1 gives some rotation.
    image = np.zeros((1, 7, 7), np.float32)
    image[0, 3, 5] = 1.0
    augment = Augmentation(always(rotation_probability=1.0, rotation_degrees=90.0), (7, 7))

    matrix = augment._spatial_matrix(1)
    assert matrix is not None
    row, column = np.linalg.inv(matrix) @ (0, 2)  # the bright voxel lies 2 to the right of the pivot
    patch = augment({"image": image}, 1)["image"][0].numpy()
    centroid = (np.indices((7, 7)) * patch).sum(axis=(1, 2)) / patch.sum() - 3

    assert np.allclose(matrix @ matrix.T, np.eye(2))
    assert centroid.tolist() == pytest.approx([row, column], abs=0.2)


def test_zooming_shows_more_or_less() -> None:
    image = np.zeros((1, 21, 21), np.float32)
    image[0, 5:16, 5:16] = 1.0
    smaller = Augmentation(always(scale_probability=1.0, scale_range=(2.0, 2.0)), (21, 21))({"image": image}, 0)
    larger = Augmentation(always(scale_probability=1.0, scale_range=(0.5, 0.5)), (21, 21))({"image": image}, 0)

    assert smaller["image"].sum() == pytest.approx(5 * 5)  # every second of voxels 5 to 15 about the pivot at 10
    assert larger["image"].sum() == pytest.approx(21 * 21)  # voxels 5 to 15 fill the patch


def test_reach_is_enough_for_full_corners() -> None:
    augment = Augmentation(always(rotation_probability=1.0, scale_probability=1.0), (8, 9, 10))
    ones = {"image": np.ones((1, 60, 60, 60), np.float32)}

    for seed in range(10):
        before, after = augment.reach(seed)
        region = tuple(slice(30 - low, 30 + high) for low, high in zip(before, after, strict=True))
        patch = augment({"image": ones["image"][(slice(None), *region)]}, seed, before)
        assert torch.allclose(patch["image"], torch.ones(1, 8, 9, 10), atol=1e-5)


def test_thin_patches_turn_in_the_slice_plane_only() -> None:
    augment = Augmentation(always(rotation_probability=1.0), (32, 32, 4))
    image = np.zeros((1, 32, 32, 4), np.float32)
    image[..., 1] = 1.0

    patch = augment({"image": image}, 0)["image"]

    assert patch[..., 1].sum() > 700
    assert patch[..., [0, 2, 3]].abs().max() < 1e-4


def test_labels_keep_whole_values_under_rotation() -> None:
    patch = Augmentation(always(rotation_probability=1.0), (6, 7, 8))(sample(), 5)

    assert patch["labels"].dtype == torch.uint8
    assert set(patch["labels"].unique().tolist()) <= {0, 1, 2, 3}


def kept_modalities(config: AugmentationConfig, whole: dict[str, np.ndarray], seeds: int) -> Counter[tuple[int, ...]]:
    """How often each set of modalities is left."""
    augment = Augmentation(config, (2, 2, 2))
    found = [augment(whole, seed)["image"].flatten(1).any(dim=1).nonzero().flatten().tolist() for seed in range(seeds)]
    return Counter(map(tuple, found))


def test_modality_dropout_leaves_each_incomplete_set_as_often_as_any_other() -> None:
    """700 of 1000 patches complete (deviation 14.5), the 300 others in 14 sets, so 21.4 each (deviation 4.6)."""
    kept = kept_modalities(always(modality_dropout=0.3), sample((4, 4, 4), channels=4), 1000)

    assert () not in kept
    complete = kept.pop((0, 1, 2, 3))
    assert abs(complete - 700) < 3 * 14.5
    assert len(kept) == 14
    assert all(abs(count - 300 / 14) < 4 * 4.6 for count in kept.values())


def test_modality_dropout_leaves_what_it_keeps_as_it_was() -> None:
    whole = sample(channels=4)
    before = whole["image"].copy()
    augment = Augmentation(always(modality_dropout=0.9), (6, 7, 8))

    for seed in range(10):
        patch = augment(whole, seed)
        for plane, original in zip(patch["image"].numpy(), whole["image"], strict=True):
            assert not plane.any() or np.array_equal(plane, original)
        assert np.array_equal(patch["labels"], whole["labels"])
    assert np.array_equal(whole["image"], before)


def test_modality_dropout_is_the_same_for_the_same_seed_and_comes_after_all_other_changes() -> None:
    config = AugmentationConfig(mirror_axes=(0,), noise_probability=1.0, gamma_probability=1.0)
    with_dropout = Augmentation(config.model_copy(update={"modality_dropout": 0.9}), (6, 7, 8))
    without = Augmentation(config.model_copy(update={"modality_dropout": 0.0}), (6, 7, 8))

    for seed in range(5):
        first, again = (with_dropout(sample(channels=4), seed)["image"] for _ in range(2))
        complete = without(sample(channels=4), seed)["image"]
        is_kept = first.flatten(1).any(dim=1)
        assert torch.equal(first, again)
        assert torch.equal(first[is_kept], complete[is_kept])


def test_modality_dropout_never_drops_the_only_modality_a_case_has() -> None:
    whole = sample()
    whole["image"][0] = 0  # missing already
    kept = kept_modalities(always(modality_dropout=0.9), whole, 20)

    assert kept == {(1,): 20}


def test_nothing_is_dropped_where_planning_was_not_asked() -> None:
    kept = kept_modalities(always(modality_dropout=None), sample(channels=4), 20)

    assert kept == {(0, 1, 2, 3): 20}


def test_monai_tracks_metadata_again_afterwards() -> None:
    before = get_track_meta()

    patch = Augmentation(always(gamma_probability=1.0, mirror_axes=(0, 1, 2)), (6, 7, 8))(sample(), 0)

    assert type(patch["image"]) is torch.Tensor
    assert get_track_meta() is before


def test_probabilities_are_checked() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        AugmentationConfig(noise_probability=1.5)
