"""Images of prepared cases, and the groups they come in."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from segkit.errors import DataError, RequestError
from segkit.labels import SCHEMES
from segkit.preparing.plan import CandidateNetwork
from segkit.preparing.preprocessing import Preparation, PreparedCase
from segkit.pretraining.sources import GroupDataset, ImagesConfig, Source, slice_axis_of
from segkit.pretraining.views import ViewIntensityConfig, ViewsConfig
from segkit.reading.geometry import Reorientation
from segkit.reading.volume import Grid

PLAIN = ViewIntensityConfig(
    noise_probability=0,
    blur_probability=0,
    brightness_probability=0,
    contrast_probability=0,
    low_resolution_probability=0,
    gamma_probability=0,
)
WHOLE = ViewsConfig(scale_range=(1.0, 1.0), aspect_range=(1.0, 1.0), mirror_axes=(), intensities=PLAIN)


def prepared(image: np.ndarray, spacing_mm: tuple[float, ...], name: str = "case") -> PreparedCase:
    shape = image.shape[1:]
    turn = Reorientation(tuple(range(len(shape))), (False,) * len(shape), shape)
    preparation = Preparation(Grid(shape, np.eye(4)), turn, ((0,) * len(shape), shape), shape, spacing_mm)
    return PreparedCase(name, image.astype(np.float32), None, preparation)


def numbered(slices: int, start: int = 1, channels: int = 1, spacing_mm: tuple[float, ...] = (1, 1, 2)) -> PreparedCase:
    """A volume of 6 x 5 voxels and slices along the last axis that hold `start`, `start` + 1, ..."""
    values = np.arange(start, start + slices, dtype=np.float32)
    planes = np.stack([values + 1000 * channel for channel in range(channels)])
    return prepared(np.broadcast_to(planes[:, None, None], (channels, 6, 5, slices)), spacing_mm)


def source(cases: list[PreparedCase], name: str = "scans", patients: list[str] | None = None) -> Source:
    return Source(name, cases, patients or [f"p{number}" for number in range(len(cases))])


def each_slice(**settings: object) -> ImagesConfig:
    """Neighbours that follow each other, whatever their distance."""
    return ImagesConfig(slice_step_mm=0, **settings)


def groups(sources: list[Source], images: ImagesConfig | None = None, **changes: object) -> GroupDataset:
    settings: dict[str, object] = {"size": (6, 5), "views": WHOLE, "seed": 0, "length": 50, **changes}
    return GroupDataset(sources, images=images or each_slice(), **settings)


def test_a_group_holds_a_run_of_one_subject_and_images_of_others() -> None:
    """Three subjects of 20 slices, whose values tell subject and slice: 1 to 20, 101 to 120, 201 to 220."""
    dataset = groups([source([numbered(20, start) for start in (1, 101, 201)])])

    for item in (dataset[index] for index in range(50)):
        values = item["first"][:, 0, 3, 2].numpy()
        assert np.diff(values[:8]).tolist() == [1] * 7
        assert len(set(values.tolist())) == 16
        subject = values // 100
        assert (subject[:8] == subject[0]).all()
        assert (subject[8:] != subject[0]).all()
        assert item["stack"].tolist() == subject.astype(int).tolist()
        assert item["place"].tolist() == ((values % 100 - 1) * 2).tolist()  # slices of 2 mm, the first one at 0


def test_keys_shapes_and_types() -> None:
    item = groups([source([numbered(20), numbered(20)])], size=(4, 7), nodes=10)[0]

    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in item.items()} == {
        "first": ((10, 1, 4, 7), torch.float32),
        "second": ((10, 1, 4, 7), torch.float32),
        "first_frame": ((10, 2, 3), torch.float32),
        "second_frame": ((10, 2, 3), torch.float32),
        "stack": ((10,), torch.int64),
        "source": ((10,), torch.int64),
        "place": ((10,), torch.float32),
        "origin": ((10, 2), torch.float32),
    }
    assert "second" not in groups([source([numbered(20)])], view_count=1)[0]


def test_items_depend_on_seed_and_index_only() -> None:
    def build(seed: int) -> GroupDataset:
        return groups([source([numbered(20), numbered(20, 50)])], views=ViewsConfig(), length=6, seed=seed)

    here = [build(3)[index] for index in reversed(range(6))][::-1]
    by_a_worker = list(DataLoader(pickle.loads(pickle.dumps(build(3))), batch_size=None, num_workers=1))
    other = [build(4)[index] for index in range(6)]

    for first, second in zip(here, by_a_worker, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first["first"], second["first"]) for first, second in zip(here, other, strict=True))
    with pytest.raises(IndexError):
        build(0)[6]


def test_the_images_of_a_group_do_not_depend_on_the_number_of_views() -> None:
    one, two = (groups([source([numbered(20), numbered(20, 50)])], view_count=count) for count in (1, 2))

    assert [one.members(index) for index in range(20)] == [two.members(index) for index in range(20)]


def test_the_only_subject_fills_a_group_with_other_modalities_then_with_its_own_slices() -> None:
    two_modalities = groups([source([numbered(12, channels=2)])])
    one_modality = groups([source([numbered(20)])])

    for index in range(20):
        stacks = Counter(stack for stack, _ in two_modalities.members(index))
        assert sorted(stacks.values()) == [8, 8]
        members = one_modality.members(index)
        assert len(set(members)) == 16
        assert np.diff([image for _, image in members[:8]]).tolist() == [1] * 7


def test_time_points_of_the_patient_are_not_other_subjects() -> None:
    dataset = groups([source([numbered(12), numbered(12), numbered(8)], patients=["a", "a", "b"])])

    for index in range(20):
        members = dataset.members(index)
        cases = [dataset.stacks[stack].case for stack, _ in members]
        others = cases[8:]
        # All 8 images of the other patient, or 8 of the 24 of the patient with two time points.
        assert set(others) == {2} if cases[0] != 2 else set(others) <= {0, 1}


def test_each_modality_is_an_image_or_all_together_are_channels() -> None:
    scans = [source([numbered(10, channels=3), numbered(10, channels=3)])]
    each = groups(scans)
    together = groups(scans, each_slice(channels="all"))

    assert (each[0]["first"].shape[1], together[0]["first"].shape[1]) == (1, 3)
    assert (each.image_counts, together.image_counts) == ({"scans": 60}, {"scans": 20})
    assert (together[0]["first"][:, 2] - together[0]["first"][:, 0] == 2000).all()


@pytest.mark.parametrize(
    ("shape", "spacing_mm", "axis"),
    [
        ((6, 5, 20), (1, 1, 1), 1),  # the shortest of equal ones
        ((6, 5, 20), (3, 1, 1), 0),
        ((6, 5, 20), (1, 2, 2), 1),
        ((6, 7, 5), (1, 1.004, 1), 2),
        ((140, 172, 146), (1, 1, 1), 0),
    ],
)
def test_slices_lie_across_the_axis_that_training_chooses(
    shape: tuple[int, ...], spacing_mm: tuple[float, ...], axis: int
) -> None:
    """Also where patches are shorter than the volumes: 4 voxels along each axis."""
    assert slice_axis_of([prepared(np.ones((1, *shape)), spacing_mm)]) == axis
    network = CandidateNetwork("vit", "tiny", {}, 1, SCHEMES["brats2023"], 3)
    assert network.suited_to(shape, (4, 4, 4), spacing_mm).arguments["slice_axis"] == axis


def test_the_median_volume_of_a_source_decides_about_its_slices() -> None:
    """Shapes 6 x 7 x 8, 6 x 7 x 8 and 9 x 5 x 8: the median is 6 x 7 x 8."""
    shapes = [(6, 7, 8), (6, 7, 8), (9, 5, 8)]
    dataset = groups([source([prepared(np.ones((1, *shape)), (1, 1, 1)) for shape in shapes])], nodes=8)

    assert [stack.axis for stack in dataset.stacks] == [0, 0, 0]


def test_slices_across_a_chosen_axis_have_the_frame_of_the_other_two() -> None:
    """Slices of 6 x 20 voxels of 1 x 2 mm at their own size, 5 of them in each volume, 3 mm apart."""
    cases = [numbered(20, spacing_mm=(1, 3, 2)) for _ in range(2)]
    images = each_slice(slice_axis=1, neighbours=5)

    item = groups([source(cases)], images, size=(6, 20), nodes=10)[0]

    assert torch.allclose(item["first"][0, 0], torch.arange(1.0, 21.0).expand(6, 20), atol=1e-5)
    assert item["first_frame"][0].tolist() == [[1, 0, 0], [0, 2, 0]]
    assert item["place"].tolist()[:5] == [0, 3, 6, 9, 12]


def test_nearly_empty_slices_are_left_out() -> None:
    """Of 10 x 10 slices with 0, 9, 10, 50, 30 and 0 voxels those below a fifth of 50 go."""
    image = np.zeros((1, 10, 10, 6), np.float32)
    for number, count in enumerate((0, 9, 10, 50, 30, 0)):
        image[0].reshape(100, 6)[:count, number] = 1
    images = each_slice(neighbours=2, slice_axis=2)

    dataset = groups([source([prepared(image, (1, 1, 1))])], images, nodes=3)

    assert dataset.stacks[0].starts[:, 2].tolist() == [2, 3, 4]


def test_an_empty_modality_gives_no_images() -> None:
    case = numbered(16, channels=2)
    case.image[1] = 0

    assert groups([source([case])]).image_counts == {"scans": 16}


def test_slices_are_closer_where_a_stack_has_too_few() -> None:
    """8 of 20 slices of 2 mm that should be 10 mm apart can be 4 mm apart."""
    members = groups([source([numbered(20)])], ImagesConfig(slice_step_mm=10.0)).members(0)
    assert np.diff([image for _, image in members[:8]]).tolist() == [2] * 7


def test_neighbouring_slices_keep_their_distance() -> None:
    """Slices of 2 mm at least 5 mm apart: every third one, in a group of one subject as long as they last."""
    images = ImagesConfig(slice_step_mm=5.0, neighbours=4)
    dataset = groups([source([numbered(20)])], images, nodes=7)

    for index in range(20):
        places = [image for _, image in dataset.members(index)]
        assert np.diff(places[:4]).tolist() == [3, 3, 3]
        assert len(set(places)) == 7
        # From 0 and from 1 on there are seven slices; from 2 on only six, and one more comes from between.
        close = sum(after - before < 3 for before, after in pairwise(sorted(places)))
        assert close <= (0 if places[0] % 3 < 2 else 2)


def test_small_sources_come_more_often_than_their_size() -> None:
    """64 and 16 images: chances 8 to 4 at power 0.5, so 667 of 1000 groups (deviation 15); 500 at power 0."""
    sources = [source([numbered(64)], "large"), source([numbered(16)], "small")]

    def from_large(balance: float) -> int:
        dataset = groups(sources, each_slice(balance=balance), length=1000)
        return sum(dataset.stacks[dataset.members(index)[0][0]].source == 0 for index in range(1000))

    assert abs(from_large(0.5) - 667) < 4 * 15
    assert abs(from_large(0.0) - 500) < 4 * 16
    assert abs(from_large(1.0) - 800) < 4 * 13


def test_groups_are_of_one_source() -> None:
    dataset = groups([source([numbered(30)], "a"), source([numbered(16), numbered(16)], "b")])

    items = [dataset[index] for index in range(20)]
    assert all(len(set(item["source"].tolist())) == 1 for item in items)
    assert {int(item["source"][0]) for item in items} == {0, 1}


def test_pictures_come_with_those_of_the_same_patient() -> None:
    """Two eyes of each of ten patients, three colours; the picture's value is its number."""
    pictures = [prepared(np.full((3, 6, 5), number + 1), (1, 1)) for number in range(20)]
    dataset = groups([source(pictures, "eyes", [f"p{number // 2}" for number in range(20)])])

    assert dataset[0]["first"].shape[1] == 3
    for index in range(20):
        item = dataset[index]
        patients = item["stack"] // 2
        assert patients[0] == patients[1]
        assert not (patients[2:] == patients[0]).any()
        assert len(set(item["stack"].tolist())) == 16
        assert torch.allclose(item["first"][:, 1, 2, 2], item["stack"] + 1.0)
        assert not item["place"].any()


@pytest.mark.parametrize(
    ("images", "along"),
    [
        (ImagesConfig(), ([0, 15], [0, 15, 30], [0, 16])),
        (ImagesConfig(crop_overlap=0.5), ([0, 15], [0, 10, 20, 30], [0, 16])),
        (ImagesConfig(slice_step_mm=50), ([7], [0, 30], [8])),
    ],
)
def test_crops_overlap_by_no_more_than_allowed(images: ImagesConfig, along: tuple[list[int], ...]) -> None:
    """Crops of 20 in 35 x 50 x 36 voxels of 2 mm: at least 15 voxels on at an overlap of a quarter, 25 for 50 mm."""
    changed = images.model_copy(update={"neighbours": 2})
    cases = [prepared(np.ones((1, 35, 50, 36)), (2, 2, 2))]
    (stack,) = groups([source(cases)], changed, size=(20, 20, 20), nodes=2).stacks

    assert tuple(np.unique(column).tolist() for column in stack.starts.T) == along
    assert len(stack) == np.prod([len(starts) for starts in along])
    assert stack.origin_mm(len(stack) - 1).tolist() == [2 * starts[-1] for starts in along]


def test_crops_of_volumes_are_neighbours_where_they_overlap() -> None:
    """A volume of 16 x 16 x 8 voxels in crops of 8: a quarter on along each axis, so 5 x 5 x 1 of them."""
    generator = np.random.default_rng(0)
    cases = [prepared(generator.uniform(1, 2, (1, 16, 16, 8)), (1.0, 1.0, 2.0)) for _ in range(2)]
    dataset = groups([source(cases)], each_slice(crop_overlap=0.75), size=(8, 8, 8))

    assert dataset.image_counts == {"scans": 50}
    assert dataset.stacks[0].starts[:, 0].tolist() == sorted([0, 2, 4, 6, 8] * 5)
    for index in range(10):
        item, members = dataset[index], dataset.members(index)
        starts = np.array([dataset.stacks[stack].starts[image] for stack, image in members])
        assert (np.abs(starts[:8] - starts[0]).max(axis=1) <= 4).all()
        assert item["place"].tolist() == (starts[:, 0] + 3.5).tolist()
        x, y, z = starts[5]
        expected = cases[dataset.stacks[members[5][0]].case].image[:, x : x + 8, y : y + 8, z : z + 8]
        assert np.allclose(item["first"][5], expected, atol=1e-4)
        assert torch.allclose(item["first_frame"][5], torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0]]))


def test_empty_crops_are_left_out_by_exact_counts() -> None:
    generator = np.random.default_rng(0)
    volume = generator.uniform(1, 2, (1, 12, 9, 7)) * (generator.random((1, 12, 9, 7)) < 0.2)
    volume[0, :6] = 0
    images = each_slice(crop_size=(4, 4, 4), crop_overlap=0.5, empty_below=0.5, neighbours=2)
    dataset = groups([source([prepared(volume, (1, 1, 1))])], images, size=(4, 4, 4), nodes=4)

    def count(x: int, y: int, z: int) -> int:
        return int(np.count_nonzero(volume[0, x : x + 4, y : y + 4, z : z + 4]))

    candidates = [(x, y, z) for x in (0, 2, 4, 6, 8) for y in (0, 2, 5) for z in (0, 3)]
    most = max(count(*start) for start in candidates)
    expected = [start for start in candidates if count(*start) >= 0.5 * most]
    assert [tuple(start) for start in dataset.stacks[0].starts.tolist()] == expected
    assert 0 < len(expected) < len(candidates)


def test_a_volume_smaller_than_a_crop_is_one_image() -> None:
    cases = [prepared(np.ones((1, 5, 6, 7)), (1, 1, 1)) for _ in range(4)]
    dataset = groups([source(cases)], each_slice(neighbours=1), size=(8, 8, 8), nodes=4)

    assert dataset.image_counts == {"scans": 4}
    assert dataset[0]["first"].shape == (4, 1, 8, 8, 8)


@pytest.mark.parametrize(
    ("cases", "images", "message"),
    [
        ([numbered(15)], each_slice(), "scans: has 15 images; expected at least the 16 of one group"),
        ([numbered(6) for _ in range(5)], each_slice(), "scans: no case has 8 neighbouring images; the most .* is 6"),
        ([prepared(np.zeros((1, 6, 5, 20)), (1, 1, 2))], each_slice(), "scans: has 0 images"),
    ],
)
def test_a_source_that_is_too_small_is_named(cases: list[PreparedCase], images: ImagesConfig, message: str) -> None:
    with pytest.raises(DataError, match=message):
        groups([source([numbered(20)], "enough"), source(cases)], images)


def test_sources_that_do_not_fit_together_are_refused() -> None:
    scans = source([numbered(20)])
    pictures = source([prepared(np.ones((3, 6, 5)), (1, 1), "eye") for _ in range(16)], "eyes")

    with pytest.raises(DataError, match="different numbers of channels: 1 in scans, 3 in eyes"):
        groups([scans, pictures])
    assert groups([scans, pictures], each_slice(channels="each"))[0]["first"].shape[1] == 1
    with pytest.raises(DataError, match="eye: is a picture; expected a volume"):
        groups([pictures], size=(4, 4, 4))
    with pytest.raises(DataError, match="scans: 2 patients for 1 cases"):
        groups([source([numbered(20)], patients=["a", "b"])])


def test_impossible_groups_are_refused() -> None:
    with pytest.raises(RequestError, match="a group of 4 images cannot hold 8 neighbours"):
        groups([source([numbered(20)])], nodes=4)
