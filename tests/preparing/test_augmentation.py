"""The augmentation recipe: what it may and may not change, and how often."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from monai.data import get_track_meta
from monai.transforms import AdjustContrast, Compose, GaussianSmooth, Randomizable
from pydantic import ValidationError

from segkit.preparing.augmentation import AugmentationConfig, intensity_transforms, training_transforms
from segkit.preparing.patch_sampling import PatchDataset, RandBoxd, ResampleBoxd
from segkit.preparing.preprocessing import Preparation, PreparedCase
from segkit.preparing.transforms import RandBlurd, RandGammad, drawn_about_one, run
from segkit.reading.geometry import Reorientation
from segkit.reading.volume import Grid

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
Patch = dict[str, torch.Tensor]


def always(**changes: object) -> AugmentationConfig:
    return NOTHING.model_copy(update=changes)


def sample(shape: tuple[int, ...] = (6, 7, 8), channels: int = 2) -> PreparedCase:
    """Positive intensities in the middle, exact zeros in the outermost layer, labels 0 to 3."""
    generator = np.random.default_rng(0)
    image = np.zeros((channels, *shape), np.float32)
    inner = (slice(None), *(slice(1, -1) for _ in shape))
    image[inner] = generator.uniform(1, 2, image[inner].shape)
    return case_of(image, generator.integers(0, 4, shape).astype(np.uint8))


def case_of(image: np.ndarray, labels: np.ndarray | None = None) -> PreparedCase:
    shape = image.shape[1:]
    turn = Reorientation(tuple(range(len(shape))), (False,) * len(shape), shape)
    preparation = Preparation(Grid(shape, np.eye(4)), turn, ((0,) * len(shape), shape), shape, (1.0,) * len(shape))
    return PreparedCase("case", image, labels, preparation)


def patch_of(config: AugmentationConfig, case: PreparedCase, seed: int) -> Patch:
    """A patch of the size of the case, which is around its middle."""
    transforms = training_transforms(config, case.image.shape[1:], foreground_fraction=0.0)
    transforms.set_random_state(seed)
    return run(transforms, {"case": case})


def test_disabled_augmentation_only_cuts() -> None:
    whole = sample()
    transforms = training_transforms(
        AugmentationConfig(enabled=False, mirror_axes=(0,)), (4, 4, 4), foreground_fraction=0.0
    )
    (cut,) = transforms.transforms
    cut.draw_centre = lambda _: [3, 3, 4]
    patch = run(transforms, {"case": whole})

    assert whole.labels is not None
    assert np.array_equal(patch["image"], whole.image[:, 1:5, 1:5, 2:6])
    assert np.array_equal(patch["label"][0], whole.labels[1:5, 1:5, 2:6])


def test_a_patch_larger_than_the_case_is_padded_with_zeros() -> None:
    patch = RandBoxd((4, 3), foreground_fraction=0.0)({"case": case_of(np.full((1, 2, 3), 5, np.float32))})

    assert patch["image"].tolist() == [[[0, 0, 0], [5, 5, 5], [5, 5, 5], [0, 0, 0]]]
    assert set(patch) == {"image"}


@pytest.mark.parametrize("shape", [(6, 7, 8), (9, 8)])
def test_the_result_depends_on_the_seed_only(shape: tuple[int, ...]) -> None:
    config = AugmentationConfig(mirror_axes=(0, 1), rotation_probability=0.7, gamma_probability=0.7)
    whole = sample(shape)
    before = whole.image.copy()
    patches = []
    for _ in range(2):
        torch.manual_seed(len(patches))
        patches.append([patch_of(config, whole, seed) for seed in range(8)])

    for first, second in zip(*patches, strict=True):
        assert torch.equal(first["image"], second["image"])
        assert torch.equal(first["label"], second["label"])
    assert len({float(patch["image"].sum()) for patch in patches[0]}) == 8
    assert np.array_equal(whole.image, before)


@pytest.mark.parametrize("shape", [(6, 7, 8), (9, 8)])
@pytest.mark.parametrize("name", INTENSITIES)
def test_each_intensity_change_fires_and_leaves_zeros_and_labels_alone(name: str, shape: tuple[int, ...]) -> None:
    whole = sample(shape)
    patch = patch_of(always(**{f"{name}_probability": 1.0}), whole, 3)

    inside = whole.image != 0
    assert not np.allclose(patch["image"].numpy()[inside], whole.image[inside])
    assert not patch["image"].numpy()[~inside].any()
    assert np.array_equal(patch["label"][0], whole.labels)


@pytest.mark.parametrize("name", INTENSITIES)
def test_each_modality_is_changed_with_its_probability_on_its_own(name: str) -> None:
    """Of 200 x 2 modalities half are changed, 200 +- 10, and of 200 patches both in a quarter, 50 +- 6.1."""
    whole = sample((4, 4))
    image = torch.from_numpy(whole.image)
    transforms = intensity_transforms(always(**{f"{name}_probability": 0.5}), 2)
    changed = []
    for seed in range(200):
        transforms.set_random_state(seed)
        patch = run(transforms, {"image": image.clone()})["image"]
        changed.append([not torch.equal(plane, before) for plane, before in zip(patch, image, strict=True)])

    assert abs(np.sum(changed) - 200) < 4 * 10
    assert abs(np.all(changed, axis=1).sum() - 50) < 4 * 6.1


def test_a_quarter_of_the_gamma_curves_is_inverted_and_each_is_that_of_monai() -> None:
    """Of 400 curves 100 are inverted (deviation 8.7)."""
    image = torch.from_numpy(np.random.default_rng(0).gamma(2, size=(1, 5, 6)).astype(np.float32))
    gamma = RandGammad("image", (0.6, 0.6), 1.0).set_random_state(0)
    plain, inverted = (AdjustContrast(0.6, is_inverted, retain_stats=True)(image) for is_inverted in (False, True))
    changed = [gamma({"image": image})["image"] for _ in range(400)]
    count = sum(torch.allclose(one, inverted, atol=1e-5) for one in changed)

    assert abs(count - 100) < 4 * 8.7
    assert count + sum(torch.allclose(one, plain, atol=1e-5) for one in changed) == 400


def test_factors_below_and_above_one_are_drawn_equally_often() -> None:
    """Of 1000, deviation 15.8."""
    random = np.random.RandomState(0)
    drawn = np.array([drawn_about_one(random, (0.7, 1.5)) for _ in range(1000)])

    assert abs((drawn < 1).sum() - 500) < 4 * 15.8
    assert (drawn >= 0.7).all()
    assert (drawn <= 1.5).all()
    assert abs((drawn > 1.25).sum() - 250) < 4 * 13.7, "uniform above 1"
    for low, high in ((0.5, 0.9), (1.0, 2.0), (1.0, 1.0)):
        assert low <= drawn_about_one(random, (low, high)) <= high


@pytest.mark.parametrize("shape", [(1, 9, 8), (1, 9, 8, 7)])
def test_blurring_is_that_of_monai(shape: tuple[int, ...]) -> None:
    image = torch.from_numpy(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    blurred = RandBlurd("image", (0.7, 0.7), 1.0)({"image": image})["image"]

    assert torch.equal(blurred, GaussianSmooth([0.7] * (len(shape) - 1))(image))


def test_brightness_multiplies_within_its_range() -> None:
    whole = sample()
    doubled = patch_of(always(brightness_probability=1.0, brightness_range=(2.0, 2.0)), whole, 0)["image"]
    factors = [
        float(patch_of(always(brightness_probability=1.0), whole, seed)["image"][0, 2, 2, 2] / whole.image[0, 2, 2, 2])
        for seed in range(60)
    ]

    assert np.allclose(doubled, 2 * whole.image)
    assert 0.75 <= min(factors) < 0.8
    assert 1.2 < max(factors) <= 1.25


def test_noise_has_the_drawn_deviation() -> None:
    """The deviation of 40^3 normal numbers is right to 0.3 %; three times that and a little is allowed."""
    whole = case_of(np.full((1, 40, 40, 40), 5, np.float32))
    noisy = patch_of(always(noise_probability=1.0, noise_std_range=(0.4, 0.4)), whole, 0)["image"]

    assert float(noisy.mean()) == pytest.approx(5, abs=0.01)
    assert float(noisy.std()) == pytest.approx(0.4, rel=0.01)


def test_contrast_keeps_the_mean_and_the_range() -> None:
    whole = case_of(np.array([[[1, 2, 3, 6]]], np.float32))
    config = always(contrast_probability=1.0, contrast_range=(0.5, 0.5))

    assert patch_of(config, whole, 0)["image"].tolist() == [[[2, 2.5, 3, 4.5]]]  # halved about their mean, 3
    config = always(contrast_probability=1.0, contrast_range=(2.0, 2.0))
    assert patch_of(config, whole, 0)["image"].tolist() == [[[1, 1, 3, 6]]]  # doubled: -1, 1, 3, 9, clipped to 1 to 6


def test_gamma_keeps_mean_and_deviation() -> None:
    whole = case_of(np.random.default_rng(0).normal(size=(1, 9, 9, 9)).astype(np.float32))
    changed = patch_of(always(gamma_probability=1.0), whole, 0)["image"].numpy()

    assert changed.mean() == pytest.approx(whole.image.mean(), abs=1e-4)
    assert changed.std() == pytest.approx(whole.image.std(), rel=1e-3)


def test_half_the_resolution_by_hand() -> None:
    """Of 1 to 4 the second and the fourth are kept (nearest to 1.5 and 3.5), and interpolated at quarters."""
    config = always(low_resolution_probability=1.0, low_resolution_range=(0.5, 0.5))
    whole = case_of(np.array([[[1, 2, 3, 4]] * 4], np.float32))

    assert patch_of(config, whole, 0)["image"][0, 0].tolist() == [2, 2.5, 3.5, 4]


def test_mirroring_takes_image_and_labels_along_the_allowed_axes_only() -> None:
    whole = sample((4, 4, 4))
    assert whole.labels is not None

    seen = set()
    for seed in range(12):
        patch = patch_of(always(mirror_axes=(2,)), whole, seed)
        is_mirrored = not np.array_equal(patch["label"][0], whole.labels)
        step = -1 if is_mirrored else 1
        assert np.array_equal(patch["label"][0], whole.labels[..., ::step])
        assert np.array_equal(patch["image"], whole.image[..., ::step])
        seen.add(is_mirrored)
    assert seen == {True, False}


def test_a_quarter_turn_by_hand() -> None:
    # Odd patch, so that the pivot is its centre voxel; the angle is drawn from [-90, 90].
    image = np.zeros((1, 7, 7), np.float32)
    image[0, 3, 5] = 1.0
    cut = RandBoxd((7, 7), foreground_fraction=0.0, rotation_probability=1.0, rotation_degrees=90.0)
    cut.set_random_state(1)
    cut.R.random_sample()  # that of the centre, which has one place only, draws nothing else
    matrix = cut.draw_matrix()
    assert matrix is not None
    cut.draw_matrix = lambda: matrix
    row, column = np.linalg.inv(matrix) @ (0, 2)  # the bright voxel lies 2 to the right of the pivot
    patch = Compose([cut, ResampleBoxd((7, 7))])({"case": case_of(image)})["image"][0].numpy()
    centroid = (np.indices((7, 7)) * patch).sum(axis=(1, 2)) / patch.sum() - 3

    assert np.allclose(matrix @ matrix.T, np.eye(2))
    assert not np.allclose(matrix, np.eye(2), atol=0.1)
    assert centroid.tolist() == pytest.approx([row, column], abs=0.2)


def test_rotations_and_zooms_are_drawn_with_their_probabilities() -> None:
    """Of 1000 patches 0.8^4 = 410 stay as they are (deviation 15.6), and half of the 200 zooms magnify."""
    cut = RandBoxd(
        (8, 8, 8),
        foreground_fraction=0.0,
        rotation_probability=0.2,
        rotation_degrees=30,
        scale_probability=0.2,
        scale_range=(0.7, 1.4),
    )
    cut.set_random_state(0)
    matrices = [cut.draw_matrix() for _ in range(1000)]
    scales = np.array([np.cbrt(np.linalg.det(matrix)) for matrix in matrices if matrix is not None])
    zooms = scales[~np.isclose(scales, 1, atol=1e-9)]

    assert abs(sum(matrix is None for matrix in matrices) - 410) < 4 * 15.6
    assert abs(len(zooms) - 200) < 4 * 12.7
    assert abs((zooms < 1).sum() / len(zooms) - 0.5) < 0.15
    assert 0.7 <= zooms.min() < 0.75
    assert 1.35 < zooms.max() <= 1.4


def test_zooming_shows_more_or_less() -> None:
    image = np.zeros((1, 21, 21), np.float32)
    image[0, 5:16, 5:16] = 1.0
    smaller = patch_of(always(scale_probability=1.0, scale_range=(2.0, 2.0)), case_of(image), 0)
    larger = patch_of(always(scale_probability=1.0, scale_range=(0.5, 0.5)), case_of(image), 0)

    assert smaller["image"].sum() == pytest.approx(5 * 5)  # every second of voxels 5 to 15 about the pivot at 10
    assert larger["image"].sum() == pytest.approx(21 * 21)  # voxels 5 to 15 fill the patch


def test_no_corner_of_a_turned_patch_is_empty() -> None:
    cut = RandBoxd((8, 9, 10), foreground_fraction=0, rotation_probability=1, rotation_degrees=30, scale_probability=1)
    cut.scale_range = (0.7, 1.4)
    cut.draw_centre = lambda _: [30, 30, 30]
    cut.set_random_state(0)
    ones = case_of(np.ones((1, 60, 60, 60), np.float32))

    for _ in range(10):
        patch = ResampleBoxd(cut.patch_size)(cut({"case": ones}))["image"]
        assert torch.allclose(patch, torch.ones(1, 8, 9, 10), atol=1e-5)


def test_thin_patches_turn_in_the_slice_plane_only() -> None:
    image = np.zeros((1, 32, 32, 4), np.float32)
    image[..., 1] = 1.0

    patch = patch_of(always(rotation_probability=1.0), case_of(image), 0)["image"]

    assert patch[..., 1].sum() > 700
    assert patch[..., [0, 2, 3]].abs().max() < 1e-4


def test_labels_keep_whole_values_and_follow_the_image() -> None:
    """An image that equals its labels equals them after a rotation too, wherever it is not interpolated."""
    labels = np.zeros((24, 24, 24), np.uint8)
    labels[6:18, 6:18, 6:18] = 3
    turned = patch_of(
        always(rotation_probability=1.0, scale_probability=1.0), case_of(labels[None].astype(np.float32), labels), 5
    )
    whole = np.isclose(turned["image"] % 3, 0, atol=1e-4)

    assert turned["label"].dtype == torch.uint8
    assert set(turned["label"].unique().tolist()) == {0, 3}
    assert not torch.equal(turned["label"][0], torch.from_numpy(labels))
    assert torch.allclose(turned["image"][whole], turned["label"][whole].float(), atol=1e-3)


def kept_modalities(config: AugmentationConfig, whole: PreparedCase, seeds: int) -> Counter[tuple[int, ...]]:
    """How often each set of modalities is left."""
    transforms = training_transforms(config, (2, 2, 2), foreground_fraction=0.0)
    transforms.set_random_state(0)
    found = [run(transforms, {"case": whole})["image"].flatten(1).any(dim=1).nonzero() for _ in range(seeds)]
    return Counter(tuple(left.flatten().tolist()) for left in found)


def full(channels: int = 4) -> PreparedCase:
    return case_of(np.ones((channels, 4, 4, 4), np.float32))


def test_modality_dropout_leaves_each_incomplete_set_as_often_as_any_other() -> None:
    """700 of 1000 patches complete (deviation 14.5), the 300 others in 14 sets, so 21.4 each (deviation 4.6)."""
    kept = kept_modalities(always(modality_dropout=0.3), full(), 1000)

    assert () not in kept
    complete = kept.pop((0, 1, 2, 3))
    assert abs(complete - 700) < 3 * 14.5
    assert len(kept) == 14
    assert all(abs(count - 300 / 14) < 4 * 4.6 for count in kept.values())


def test_modality_dropout_leaves_what_it_keeps_as_it_was() -> None:
    whole = sample(channels=4)
    before = whole.image.copy()

    for seed in range(10):
        patch = patch_of(always(modality_dropout=0.9), whole, seed)
        for plane, original in zip(patch["image"].numpy(), whole.image, strict=True):
            assert not plane.any() or np.array_equal(plane, original)
        assert np.array_equal(patch["label"][0], whole.labels)
    assert np.array_equal(whole.image, before)


def test_modality_dropout_comes_after_all_other_changes() -> None:
    config = AugmentationConfig(mirror_axes=(0,), noise_probability=1.0, gamma_probability=1.0)
    for seed in range(5):
        first, again = (
            patch_of(config.model_copy(update={"modality_dropout": share}), sample(channels=4), seed)["image"]
            for share in (0.9, 0.0)
        )
        is_kept = first.flatten(1).any(dim=1)
        assert torch.equal(first[is_kept], again[is_kept])


def test_modality_dropout_never_drops_the_only_modality_a_case_has() -> None:
    whole = full(2)
    whole.image[0] = 0  # missing already

    assert kept_modalities(always(modality_dropout=0.9), whole, 20) == {(1,): 20}


def test_nothing_is_dropped_where_planning_was_not_asked() -> None:
    assert kept_modalities(always(modality_dropout=None), full(), 20) == {(0, 1, 2, 3): 20}


def test_monai_tracks_metadata_again_afterwards() -> None:
    before = get_track_meta()

    patch = patch_of(always(gamma_probability=1.0, mirror_axes=(0, 1, 2)), sample(), 0)

    assert type(patch["image"]) is torch.Tensor
    assert get_track_meta() is before


def test_an_error_in_a_transform_is_raised_as_it_is() -> None:
    transforms = training_transforms(NOTHING, (2, 2, 2), foreground_fraction=0.0)

    with pytest.raises(AttributeError, match="'str' object has no attribute 'image'"):
        run(transforms, {"case": "no case"})


def test_every_random_transform_of_the_recipe_draws_from_the_state_of_the_dataset() -> None:
    """So one seed for each item decides all of it."""
    transforms = training_transforms(AugmentationConfig(mirror_axes=(0, 1)), (2, 2, 2), foreground_fraction=0.0)
    data = PatchDataset([full()], transforms, seed=0, length=10)

    def states(transform: object) -> list[np.random.RandomState]:
        inner = [part for part in vars(transform).values() if isinstance(part, Randomizable)]
        inner += getattr(transform, "transforms", ())
        own = [transform.R] if isinstance(transform, Randomizable) else []
        return own + [state for part in inner for state in states(part)]

    found = states(transforms)
    assert len(found) > 12
    assert all(state is data._random for state in found)


def test_probabilities_are_checked() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        AugmentationConfig(noise_probability=1.5)
