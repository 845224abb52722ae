"""Views: what they show, and that their frames say where it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from segkit.preparing.transforms import run
from segkit.pretraining.views import ViewIntensityConfig, ViewsConfig, cell_positions, view_transforms

PLAIN = ViewIntensityConfig(
    noise_probability=0,
    blur_probability=0,
    brightness_probability=0,
    contrast_probability=0,
    low_resolution_probability=0,
    gamma_probability=0,
)
WHOLE = ViewsConfig(scale_range=(1.0, 1.0), aspect_range=(1.0, 1.0), mirror_axes=(), intensities=PLAIN)


def coordinates(shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> np.ndarray:
    """An image whose channels are the mm coordinates of its voxels, and one more that is 1 everywhere."""
    places = np.indices(shape, dtype=np.float32) * np.reshape(spacing_mm, (-1, *(1 for _ in shape)))
    return np.concatenate([places, np.ones((1, *shape))]).astype(np.float32)


def voxel_positions(frame: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """What the frame says of every voxel of the view, (dims, *shape) in mm."""
    index = np.indices(shape).reshape(len(shape), -1)
    linear, offset = frame.double().numpy()[:, :-1], frame.double().numpy()[:, -1:]
    return (linear @ index + offset).reshape(len(shape), *shape)


def draw_view(
    image: np.ndarray,
    spacing_mm: tuple[float, ...],
    size: tuple[int, ...],
    config: ViewsConfig,
    seed: int,
    content: object = None,
) -> dict[str, torch.Tensor]:
    transforms = view_transforms(config, size)
    transforms.set_random_state(seed)
    return run(transforms, {"image": image, "spacing_mm": spacing_mm, "content": content})


@pytest.mark.parametrize("mirror_axes", [(), (0,), None])
@pytest.mark.parametrize(
    ("shape", "spacing_mm", "size"),
    [
        ((50, 40), (1.0, 1.0), (32, 32)),
        ((30, 44), (0.8, 2.5), (24, 40)),
        ((90, 84), (0.5, 0.4), (12, 10)),  # several voxels of the image to one of the view: blocks are averaged
        ((20, 24, 18), (1.0, 1.0, 1.0), (16, 16, 16)),
        ((40, 36, 10), (0.5, 0.7, 4.0), (24, 20, 6)),
    ],
)
def test_an_image_of_its_own_coordinates_shows_what_the_frame_says(
    shape: tuple[int, ...],
    spacing_mm: tuple[float, ...],
    size: tuple[int, ...],
    mirror_axes: tuple[int, ...] | None,
) -> None:
    image = coordinates(shape, spacing_mm)
    config = WHOLE.model_copy(
        update={
            "scale_range": (0.4, 1.0),
            "aspect_range": (0.75, 4 / 3),
            "mirror_axes": mirror_axes,
        }
    )
    step = np.reshape(spacing_mm, (-1, *(1 for _ in shape)))
    last = (np.reshape(shape, step.shape) - 1) * step

    for seed in range(6):
        view = draw_view(image, spacing_mm, size, config, seed)
        expected = voxel_positions(view["frame"], size)
        block = np.floor(np.linalg.norm(view["frame"].numpy()[:, :-1], axis=1).reshape(step.shape) / step)
        margin = np.where(block > 1, 1.5 * block * step, 1e-4)  # at its edge an image is continued, not extrapolated
        is_inside = ((expected >= margin) & (expected <= last - margin)).all(axis=0)

        assert is_inside.mean() > 0.4
        assert view["image"].shape == (len(shape) + 1, *size)
        assert np.abs(view["image"].numpy()[:-1] - expected)[:, is_inside].max() < 2e-3
        assert np.allclose(view["image"].numpy()[-1][is_inside], 1, atol=1e-5)


def test_all_of_an_image_at_its_own_size_is_the_image() -> None:
    image = np.random.default_rng(0).normal(size=(2, 6, 5)).astype(np.float32)

    view = draw_view(image, (2.0, 3.0), (6, 5), WHOLE, 0)

    assert torch.allclose(view["image"], torch.from_numpy(image), atol=1e-5)
    assert view["frame"].tolist() == [[2, 0, 0], [0, 3, 0]]


def test_half_the_size_by_hand() -> None:
    """Voxel 0 of the view covers voxels 0 and 1 of the image, so its centre lies half a voxel from that of voxel 0."""
    image = np.arange(16, dtype=np.float32).reshape(1, 4, 4) + 1

    view = draw_view(image, (1.0, 2.0), (2, 2), WHOLE, 0)

    assert view["image"].tolist() == [[[3.5, 5.5], [11.5, 13.5]]]
    assert view["frame"].tolist() == [[2, 0, 0.5], [0, 4, 1]]


def test_mirroring_by_hand() -> None:
    image = np.arange(4, dtype=np.float32).reshape(1, 2, 2) + 1
    config = WHOLE.model_copy(update={"mirror_axes": (1,)})

    views = [draw_view(image, (1.0, 2.0), (2, 2), config, seed) for seed in range(12)]
    shown = {str(view["image"].int().tolist()): view["frame"].tolist() for view in views}

    assert shown == {
        "[[[1, 2], [3, 4]]]": [[1, 0, 0], [0, 2, 0]],
        "[[[2, 1], [4, 3]]]": [[1, 0, 0], [0, -2, 2]],
    }


def test_a_view_shows_a_share_of_the_content() -> None:
    """Content of 20 x 20 mm within 40 x 40: a quarter of it is 10 mm wide, wherever it lies."""
    image = np.zeros((1, 40, 40), np.float32)
    image[0, 10:30, 5:25] = 1
    config = WHOLE.model_copy(update={"scale_range": (0.25, 0.25)})

    frames = [draw_view(image, (1, 1), (20, 20), config, seed)["frame"] for seed in range(30)]
    offsets = np.array([frame.numpy()[:, -1] for frame in frames])

    assert all(frame[:, :-1].tolist() == [[0.5, 0], [0, 0.5]] for frame in frames)
    # The first voxel of the view is half a mm wide; the edges of the content lie half a mm before voxels 10 and 5.
    assert (offsets.min(axis=0) >= [9.75, 4.75]).all()
    assert (offsets.max(axis=0) <= [19.75, 14.75]).all()
    assert (np.ptp(offsets, axis=0) > 7).all()


def test_a_view_of_narrow_content_keeps_its_shape() -> None:
    """All of a content of 10 x 40 would be squeezed into a square view; it shows a square of 10 x 10 instead."""
    image = np.ones((1, 10, 40), np.float32)

    view = draw_view(image, (1, 1), (5, 5), WHOLE, 0)

    assert view["frame"][:, :-1].tolist() == [[2, 0], [0, 2]]


def test_intensities_change_and_zeros_stay() -> None:
    image = np.zeros((2, 24, 24), np.float32)
    image[:, 4:20, 4:20] = np.random.default_rng(0).uniform(1, 2, (2, 16, 16))
    changed = ViewsConfig(scale_range=(1, 1), aspect_range=(1, 1), mirror_axes=())

    for seed in range(5):
        plain = draw_view(image, (1, 1), (24, 24), WHOLE, seed, content=((0, 0), (24, 24)))
        view = draw_view(image, (1, 1), (24, 24), changed, seed, content=((0, 0), (24, 24)))
        assert torch.equal(view["frame"], plain["frame"])
        assert not torch.equal(view["image"], plain["image"])
        assert not view["image"][plain["image"] == 0].any()


def test_the_image_is_not_changed_and_the_view_depends_on_the_generator_only() -> None:
    image = np.random.default_rng(0).normal(size=(1, 20, 20)).astype(np.float32)
    before = image.copy()

    first, again = (draw_view(image, (1, 1), (16, 16), ViewsConfig(), 4) for _ in range(2))

    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["frame"], again["frame"])
    assert np.array_equal(image, before)


def test_cell_positions_by_hand() -> None:
    """Four voxels of 2 mm from 10 mm on, in two cells: their centres at voxels 0.5 and 2.5; the other axis mirrored."""
    frame = torch.tensor([[[2.0, 0.0, 10.0], [0.0, -1.0, 5.0]]])

    positions = cell_positions(frame, (4, 6), (2, 3))

    assert positions.tolist() == [[[11, 4.5], [11, 2.5], [11, 0.5], [15, 4.5], [15, 2.5], [15, 0.5]]]


def test_cell_positions_of_a_map_as_large_as_the_view_are_its_voxels() -> None:
    view = draw_view(np.ones((1, 9, 8, 7), np.float32), (1, 2, 3), (4, 5, 6), ViewsConfig(), 0)

    positions = cell_positions(view["frame"][None], (4, 5, 6), (4, 5, 6))[0].numpy()

    assert np.allclose(positions.T.reshape(3, 4, 5, 6), voxel_positions(view["frame"], (4, 5, 6)), atol=1e-4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"scale_range": (0.8, 0.2)}, "the smaller one first"),
        ({"aspect_range": (0.0, 1.0)}, "two positive numbers"),
        ({"scale_range": (0.5, 1.5)}, "more than all of the content"),
    ],
)
def test_impossible_ranges_are_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ViewsConfig(**setting)
