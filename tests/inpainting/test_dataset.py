"""Training patches with holes: where they may lie, what the network sees, and that all of it is repeatable."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from segkit.checkpoint.card import Context, Fill
from segkit.inpainting.dataset import HoleDataset, HoleRules
from segkit.inpainting.inputs import rough_fill, stack_inputs
from segkit.preparing.holes import HoleMaker, HolesConfig
from segkit.preparing.preprocessing import Preparation, PreparedCase
from segkit.reading.geometry import Reorientation
from segkit.reading.volume import Grid

SIZE = 24
HOLES = HolesConfig(boxes=1, strokes=0, blobs=0, tumours=0, diameter_range=(5, 7), margin_voxels=3, min_voxels=8)


def head(channels: int = 1, lesion: tuple[slice, ...] | None = None, *, is_voided: bool = False) -> PreparedCase:
    """A head that is its own mirror image, each voxel with a value of its own; background around it."""
    values = np.random.default_rng(0).uniform(1, 2, size=(channels, SIZE, SIZE, SIZE)).astype(np.float32)
    values = values + values[:, ::-1]
    values[:, :2] = values[:, -2:] = 0
    labels: NDArray[np.uint8] | None = None
    if lesion is not None:
        labels = np.zeros((SIZE,) * 3, np.uint8)
        labels[lesion] = 2
        if is_voided:
            values[:, labels > 0] = 0
    shape = (SIZE,) * 3
    way = Preparation(
        Grid(shape, np.eye(4)), Reorientation((0, 1, 2), (False,) * 3, shape), ((0,) * 3, shape), shape, (1.0,) * 3
    )
    return PreparedCase("head", values, labels, way)


def dataset(
    case: PreparedCase,
    context: Context = "mirror",
    patch: tuple[int, ...] = (16,) * 3,
    fill: Fill = "biharmonic",
    **rules: object,
) -> HoleDataset:
    settings: dict[str, object] = {"margin_voxels": 3, "hidden_lesions": 0.0, **rules}
    return HoleDataset([case], patch, context, fill, HoleRules(HoleMaker(HOLES), **settings), seed=3, length=40)  # type: ignore[arg-type]


def test_an_item_is_the_image_without_its_hole() -> None:
    patches = dataset(head(2))
    for index in range(10):
        item = patches[index]
        assert {name: (tuple(value.shape), value.dtype) for name, value in item.items()} == {
            "x": ((6, 16, 16, 16), torch.float32),
            "image": ((2, 16, 16, 16), torch.float32),
            "hole": ((1, 16, 16, 16), torch.bool),
        }
        hole = item["hole"][0]
        assert 8 <= int(hole.sum()) < 0.35 * hole.numel()
        assert torch.equal(item["x"][:2, ~hole], item["image"][:, ~hole])
        expected = rough_fill(np.where(hole, np.float32(0), item["image"]), hole.numpy())
        assert torch.equal(item["x"][:2], torch.from_numpy(expected))
        assert torch.equal(item["x"][2], hole.float())


def test_the_other_half_is_shown_where_it_is_known() -> None:
    """The head is its own mirror image, so what is shown of the other half is what is missing here."""
    seen, patches = 0, dataset(head())
    for index in range(20):
        item = patches[index]
        mirrored, is_known = item["x"][2], item["x"][3] > 0
        torch.testing.assert_close(mirrored[is_known], item["image"][0][is_known], atol=0.1, rtol=0)
        assert not bool(mirrored[~is_known].any())
        seen += int((is_known & item["hole"][0]).sum())
    assert seen > 0


def test_no_hole_comes_near_a_lesion() -> None:
    lesion = (slice(8, 14),) * 3
    case = head(lesion=lesion)
    assert case.labels is not None
    forbidden = ndimage.distance_transform_edt(case.labels == 0) <= 3
    shown, patches = set(), dataset(case, context="hole")
    for index in range(40):
        item = patches[index]
        hole, image = item["hole"][0].numpy(), item["image"][0].numpy()
        # Every voxel of tissue has a value of its own in its half: values tell where the patch lies.
        inside = set(image[hole & (image > 0)].tolist()) - {0.0}
        shown |= inside
        assert not inside & set(case.image[0][forbidden & forbidden[::-1]].tolist())
    assert shown


@pytest.mark.parametrize(("is_voided", "hidden", "share"), [(True, 0.0, 1.0), (False, 1.0, 1.0), (False, 0.0, 0.0)])
def test_lesions_are_hidden_where_they_are_asked_to_be_or_are_not_there(
    is_voided: bool, hidden: float, share: float
) -> None:
    case = head(lesion=(slice(6, 18),) * 3, is_voided=is_voided)
    missing_beyond_hole = [
        bool(((item["x"][1] > 0) & ~item["hole"][0]).any())
        for item in map(dataset(case, context="hole", hidden_lesions=hidden).__getitem__, range(10))
    ]
    assert np.mean(missing_beyond_hole) == share  # every patch shows some of the lesion


def test_items_depend_on_seed_and_index_only() -> None:
    first, second = (
        dataset(head(), gain=0.1, shift=0.1, mirror_axes=(0,)),
        dataset(head(), gain=0.1, shift=0.1, mirror_axes=(0,)),
    )
    _ = second[0]
    for name, value in first[5].items():
        assert torch.equal(value, second[5][name])
    assert not torch.equal(first[5]["image"], first[6]["image"])
    with pytest.raises(IndexError):
        first[40]


def test_intensities_change_tissue_only() -> None:
    plain, changed = dataset(head())[1], dataset(head(), gain=0.2, shift=0.2)[1]
    tissue = plain["image"] != 0
    assert not bool(changed["image"][~tissue].any())
    before, after = plain["image"][tissue].double(), changed["image"][tissue].double()
    slope = after.std() / before.std()
    assert abs(float(slope) - 1) > 1e-3
    torch.testing.assert_close(after, slope * before + (after.mean() - slope * before.mean()), atol=1e-4, rtol=0)
    is_known = plain["x"][3] > 0
    torch.testing.assert_close(changed["x"][2][is_known], changed["image"][0][is_known], atol=0.1, rtol=0)


def test_slices_of_a_volume_are_patches_of_two_axes() -> None:
    item = dataset(head(2), patch=(16, 12))[0]
    assert item["x"].shape == (6, 16, 12)
    assert item["hole"].shape == (1, 16, 12)
    assert bool(item["hole"].any())


def test_what_a_network_without_context_sees() -> None:
    image, hole = np.ones((2, 3, 3), np.float32), np.eye(3, dtype=bool)
    assert stack_inputs(image, hole, "none").shape == (2, 3, 3)
    hidden = np.where(hole, np.float32(9), image)
    np.testing.assert_allclose(stack_inputs(hidden, hole, "none"), image, atol=1e-2)
    assert not stack_inputs(image, np.ones((3, 3), bool), "none").any()
    assert stack_inputs(image, hole, "hole")[2].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert stack_inputs(hidden, hole, "none", fill="constant")[0].tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    with pytest.raises(ValueError, match="mirrored"):
        stack_inputs(image, hole, "mirror")
    with pytest.raises(ValueError, match="mirrored"):
        stack_inputs(image, hole, "hole", fill="mirrored-detail")


def test_detail_of_the_other_half_is_nearer_to_the_truth_than_the_fill() -> None:
    """The head is its own mirror image, so that all detail of the other half is right."""
    fills = {fill: list(map(dataset(head(), "hole", fill=fill).__getitem__, range(6))) for fill in get_args(Fill)}
    errors = {
        fill: sum(float((item["x"][0] - item["image"][0])[item["hole"][0]].square().sum()) for item in items)
        for fill, items in fills.items()
    }
    assert errors["mirrored-detail"] < errors["biharmonic"] < errors["constant"]
