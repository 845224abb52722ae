"""Patch sampling: deterministic, foreground-aware, complete."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from segkit.preparing.augmentation import AugmentationConfig, training_transforms
from segkit.preparing.cache import foreground_voxels
from segkit.preparing.patch_sampling import PatchDataset, RandBoxd, ResampleBoxd
from segkit.preparing.preprocessing import Preparation, PreparedCase
from segkit.reading.geometry import Reorientation
from segkit.reading.volume import Grid

PLAIN = AugmentationConfig(enabled=False)


def prepared_case(number: int, shape: tuple[int, ...], *, has_labels: bool = True) -> PreparedCase:
    """A case filled with its number; label 1 in one far corner, label 2 in the other."""
    labels = np.zeros(shape, np.uint8)
    labels[(0,) * len(shape)], labels[(-1,) * len(shape)] = 1, 2
    axes = tuple(range(len(shape)))
    turn = Reorientation(axes, (False,) * len(shape), shape)
    preparation = Preparation(Grid(shape, np.eye(4)), turn, ((0,) * len(shape), shape), shape, (1.0,) * len(shape))
    image = np.full((1, *shape), number, np.float32)
    if not has_labels:
        return PreparedCase(str(number), image, None, preparation)
    return PreparedCase(str(number), image, labels, preparation, foreground_voxels(labels, 0))


def dataset(
    cases: list[PreparedCase], patch: tuple[int, ...], fraction: float = 0.0, **changes: object
) -> PatchDataset:
    settings: dict[str, Any] = {"augmentation": PLAIN, "seed": 0, "length": 1000, **changes}
    transforms = training_transforms(settings.pop("augmentation"), patch, foreground_fraction=fraction)
    return PatchDataset(cases, transforms, **settings)


def test_items_have_the_patch_size() -> None:
    item = dataset([prepared_case(1, (10, 11, 12))], (4, 5, 6))[0]

    assert item["image"].shape == (1, 4, 5, 6)
    assert item["image"].dtype == torch.float32
    assert item["label"].shape == (4, 5, 6)
    assert item["label"].dtype == torch.uint8


def test_every_pass_visits_every_case_once_in_another_order() -> None:
    data = dataset([prepared_case(number, (4, 4, 4)) for number in range(1, 8)], (4, 4, 4))

    passes = [[int(data[index]["image"].max()) for index in range(start, start + 7)] for start in (0, 7, 14)]

    assert [sorted(visited) for visited in passes] == [[1, 2, 3, 4, 5, 6, 7]] * 3
    assert len({tuple(visited) for visited in passes}) == 3


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine of one core
@pytest.mark.parametrize("shape", [(12, 13, 14), (15, 16)])
def test_items_do_not_depend_on_workers_or_on_what_came_before(shape: tuple[int, ...]) -> None:
    """Bit for bit: 0, 1 and 4 workers, and another data set that begins with the last item, as after a resume."""
    cases = [prepared_case(number, shape) for number in (1, 2, 3)]
    config = AugmentationConfig(mirror_axes=(0, 1), rotation_probability=0.5, noise_probability=1.0)
    patch = (8,) * len(shape)
    data = dataset(cases, patch, 0.5, augmentation=config, length=6)

    alone = {index: dataset(cases, patch, 0.5, augmentation=config, length=20)[index] for index in reversed(range(6))}
    assert len({float(item["image"].sum()) for item in alone.values()}) == 6
    for workers in (0, 1, 4):
        for index, item in enumerate(DataLoader(data, batch_size=1, num_workers=workers)):
            assert torch.equal(item["image"][0], alone[index]["image"])
            assert torch.equal(item["label"][0], alone[index]["label"])


def test_another_seed_gives_other_items() -> None:
    cases = [prepared_case(number, (9, 9, 9)) for number in range(20)]

    def first_visited(seed: int) -> list[float]:
        data = dataset(cases, (4, 4, 4), seed=seed)
        return [float(data[index]["image"].max()) for index in range(5)]

    assert first_visited(0) != first_visited(1)


def test_foreground_patches_hold_each_label_value_equally_often() -> None:
    data = dataset([prepared_case(1, (20, 20, 20))], (8, 8, 8), fraction=1.0)

    seen = Counter(int(data[index]["label"].max()) for index in range(200))

    assert set(seen) == {1, 2}
    assert 70 < seen[1] < 130


def test_uniform_patches_reach_every_place_and_stay_inside() -> None:
    case = prepared_case(1, (6, 6, 6))
    data = dataset([case], (4, 4, 4))

    patches = [data[index] for index in range(300)]

    assert all((patch["image"] == 1).all() for patch in patches)  # nothing padded
    assert {1, 2} <= {int(patch["label"].max()) for patch in patches}


def test_a_volume_smaller_than_the_patch_is_padded_on_both_sides() -> None:
    item = dataset([prepared_case(7, (2, 3, 6))], (4, 5, 4), fraction=1.0)[0]

    assert item["image"][0, :, 2, 2].tolist() == [0, 7, 7, 0]
    assert item["image"][0, 1, :, 2].tolist() == [0, 7, 7, 7, 0]
    assert item["image"][0, 1, 2].tolist() == [7, 7, 7, 7]
    assert not item["label"][0].any()


def test_rotated_patches_have_no_empty_corners_where_the_volume_goes_on() -> None:
    config = AugmentationConfig(
        rotation_probability=1.0,
        scale_probability=1.0,
        **dict.fromkeys(
            [f"{name}_probability" for name in ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma")],
            0.0,
        ),
    )
    case = prepared_case(3, (50, 50, 50))
    inner = dataset([case], (8, 8, 8), augmentation=config)
    inner.transforms.transforms[0].draw_centre = lambda _: [25, 25, 25]

    assert all(torch.allclose(inner[index]["image"], torch.tensor(3.0)) for index in range(20))


def test_cases_without_reference_give_images_only() -> None:
    item = dataset([prepared_case(1, (5, 5, 5), has_labels=False)], (4, 4, 4), fraction=1.0)[0]

    assert set(item) == {"image"}


def test_items_outside_the_length_are_refused() -> None:
    with pytest.raises(IndexError, match="1000"):
        dataset([prepared_case(1, (5, 5, 5))], (4, 4, 4))[1000]


def test_a_scaled_patch_of_one_slice_shows_that_slice() -> None:
    """From five slices whose voxels are their number."""
    image = np.broadcast_to(np.arange(1, 6, dtype=np.float32), (1, 8, 8, 5)).copy()
    case = PreparedCase("case", image, image[0].astype(np.uint8), prepared_case(1, (8, 8, 5)).preparation)
    cut, resample = RandBoxd((4, 4, 1), foreground_fraction=0), ResampleBoxd((4, 4, 1))
    cut.draw_centre = lambda _: [4, 4, 2]
    for scale in (0.7, 1.4):
        cut.draw_matrix = lambda scale=scale: scale * np.eye(3)
        patch = resample(cut({"case": case}))
        assert torch.allclose(patch["image"], torch.full((1, 4, 4, 1), 3.0))
        assert torch.equal(patch["label"], torch.full((1, 4, 4, 1), 3, dtype=torch.uint8))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine of one core
@pytest.mark.parametrize(
    ("shape", "patch"), [((19, 21, 14), (12, 16, 8)), ((19, 21, 5), (8, 24, 1)), ((22, 25), (16, 16))]
)
def test_patches_made_from_boxes_are_those_of_the_loader(shape: tuple[int, ...], patch: tuple[int, ...]) -> None:
    """Bit for bit, as all random numbers are the same; from this process and through a worker, in any order."""
    generator = np.random.default_rng(0)
    cases = [prepared_case(number, shape, has_labels=number > 1) for number in (1, 2, 3)]
    for case in cases:
        case.image[:] = generator.normal(size=case.image.shape)
        case.image[generator.random(case.image.shape) < 0.2] = 0
    config = AugmentationConfig(
        mirror_axes=(0, 1),
        modality_dropout=0.5,
        **dict.fromkeys([name for name in AugmentationConfig.model_fields if name.endswith("_probability")], 0.3),
    )
    expected, boxes = (
        dataset(cases, patch, 0.5, augmentation=config, length=24, gives_boxes=gives) for gives in (False, True)
    )
    loader = DataLoader(boxes, batch_size=1, num_workers=1, collate_fn=list)
    loaded = dict(enumerate(loader)) | {index: [boxes[index]] for index in range(23, 11, -1)}

    assert {"theta" in items[0] for items in loaded.values()} == {True, False}
    for index, items in loaded.items():
        made = boxes.patches_of(items, torch.device("cpu"))
        assert made.keys() == expected[index].keys()
        assert all(torch.equal(made[key][0], value) for key, value in expected[index].items())
