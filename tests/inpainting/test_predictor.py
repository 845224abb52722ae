"""A scan through a network that fills holes, and back: geometry, intensities, and voxels that must not change."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from segkit.checkpoint.card import ModelCard
from segkit.errors import DataError, RequestError
from segkit.inpainting.predictor import InpaintingPredictor
from segkit.reading.volume import Grid

Array = NDArray[np.float32]


@dataclass
class Recorder:
    """A backend that answers with `value` everywhere, or with the mirrored image, and keeps what it was shown."""

    name: str = "torch"
    value: float | None = 1.0
    shown: list[Array] = field(default_factory=list)

    def __call__(self, windows: Array) -> Array:
        self.shown.append(windows)
        return windows[:, 2:3] if self.value is None else np.full_like(windows[:, :1], self.value)


def card(**changes: object) -> ModelCard:
    document = {
        "task": "inpainting",
        "network": {"family": "inpainter", "in_channels": 1, "out_channels": 1},
        "modalities": ("t1n",),
        "patch_size": (8, 8, 8),
        "divisor": (4, 4, 4),
        "context": "mirror",
        "normalisation": "scale-nonzero",
        "training_data": {"identity": "none"},
    }
    return ModelCard.model_validate({**document, **changes})


def grid(shape: tuple[int, ...], affine: list[float] | None = None) -> Grid:
    return Grid(shape, np.diag([*(affine or [1.0, 1.0, 1.0]), 1.0]))


def scan(shape: tuple[int, ...] = (20, 24, 22)) -> Array:
    image = np.zeros((1, *shape), np.float32)
    inside = image[:, 2:-2, 3:-3, 2:-2]
    inside[...] = np.random.default_rng(0).uniform(500, 700, inside.shape)
    return image


def test_known_voxels_come_back_and_the_hole_is_filled() -> None:
    image = scan()
    hole = np.zeros(image.shape[1:], bool)
    hole[5:9, 6:10, 7:12] = True
    given = image.copy()
    given[:, hole] = 1e30  # what the hole holds does not matter
    backend = Recorder(value=9.0)
    filled = InpaintingPredictor(backend, card()).fill(given, hole, grid(hole.shape))
    assert np.array_equal(filled[:, ~hole], image[:, ~hole])
    scale = image[0][~hole & (image[0] != 0)].std()
    assert np.allclose(filled[:, hole], min(9.0 * scale, image[:, ~hole].max()), rtol=1e-5)
    assert np.array_equal(given[:, hole], np.full((1, int(hole.sum())), 1e30, np.float32))
    (window,) = backend.shown
    assert window.shape[1] == 4
    assert window[0, 1].sum() == hole.sum()
    assert np.isclose(window[0, 0].max(), image[:, ~hole].max() / scale, rtol=1e-4)
    filled_roughly = window[0, 0][window[0, 1] > 0]
    assert (
        image[0][~hole & (image[0] != 0)].min() / scale < filled_roughly
    ).mean() > 0.9  # of tissue, amid which it is


@pytest.mark.parametrize("directions", [(1, 1, 1), (-1, -1, 1), (-1, 1, -1)])
def test_left_is_found_on_the_right_whatever_the_file_calls_it(directions: tuple[int, int, int]) -> None:
    """A network that answers with the other half of a head that is its own mirror image makes the scan whole."""
    shape = (20, 24, 22)
    half = np.random.default_rng(0).uniform(500, 700, (1, 8, 18, 18)).astype(np.float32)
    image = np.zeros((1, *shape), np.float32)
    image[:, 2:18, 3:21, 2:20] = np.concatenate((half, half[:, ::-1]), 1)
    hole = np.zeros(shape, bool)
    hole[4:8, 6:10, 7:12] = True
    turn = tuple(slice(None, None, direction) for direction in directions)
    predictor = InpaintingPredictor(Recorder(value=None), card())
    filled = predictor.fill(
        np.where(hole, np.float32(0), image)[(slice(None), *turn)],
        hole[turn],
        grid(shape, [float(d) for d in directions]),
    )
    np.testing.assert_allclose(filled[(slice(None), *turn)], image, rtol=0.05)


def test_a_graph_takes_windows_of_one_size_until_all_is_filled() -> None:
    image = scan((30, 30, 30))
    hole = np.zeros(image.shape[1:], bool)
    hole[4:26, 5:25, 6:13] = True
    backend = Recorder(name="onnxruntime", value=3.0)
    filled = InpaintingPredictor(backend, card()).fill(image, hole, grid(hole.shape))
    assert {window.shape for window in backend.shown} == {(1, 4, 8, 8, 8)}
    assert len(backend.shown) == 6 * 5 * 2
    scale = image[0][~hole & (image[0] != 0)].std()
    assert np.allclose(filled[:, hole], np.clip(3.0 * scale, 0, image[:, ~hole].max()), rtol=1e-4)
    # What an earlier window filled is shown to the next as known.
    assert min(float(window[0, 1].mean()) for window in backend.shown) < 0.6


def test_separate_holes_are_windows_of_their_own() -> None:
    image = scan((64, 30, 30))
    hole = np.zeros(image.shape[1:], bool)
    hole[5:8, 8:11, 8:11] = True
    hole[50:55, 8:11, 8:11] = True
    backend = Recorder()
    InpaintingPredictor(backend, card()).fill(image, hole, grid(hole.shape))
    assert sorted(window.shape[2:] for window in backend.shown) == [(36, 36, 36), (40, 36, 36)]


def test_another_spacing_is_brought_to_that_of_the_training() -> None:
    image = scan((20, 24, 11))
    hole = np.zeros(image.shape[1:], bool)
    hole[5:9, 6:10, 4:6] = True
    backend = Recorder(value=2.0)
    predictor = InpaintingPredictor(backend, card(spacing_mm=(1.0, 1.0, 1.0)))
    filled = predictor.fill(image, hole, grid(hole.shape, [1.0, 1.0, 2.0]))
    assert np.array_equal(filled[:, ~hole], image[:, ~hole])
    scale = image[0][~hole & (image[0] != 0)].std()
    assert np.allclose(filled[:, hole], 2.0 * scale, rtol=1e-4)
    assert backend.shown[0][0, 1].sum() > 1.5 * hole.sum()  # twice as many voxels, and those it only touches


def test_slices_are_filled_one_by_one() -> None:
    image = scan()
    hole = np.zeros(image.shape[1:], bool)
    hole[5:9, 6:10, 7:10] = True
    backend = Recorder()
    planar = card(dims=2, patch_size=(8, 8), divisor=(4, 4), context="hole")
    filled = InpaintingPredictor(backend, planar).fill(image, hole, grid(hole.shape))
    assert [window.shape for window in backend.shown] == [(1, 2, 36, 36)] * 3
    assert np.array_equal(filled[:, ~hole], image[:, ~hole])
    assert (filled[:, hole] != image[:, hole]).all()


def test_nothing_to_fill_is_a_copy() -> None:
    image = scan()
    filled = InpaintingPredictor(Recorder(), card()).fill(image, np.zeros(image.shape[1:], bool), grid(image.shape[1:]))
    assert filled is not image
    assert np.array_equal(filled, image)


def test_bad_input_is_refused() -> None:
    image = scan()
    predictor = InpaintingPredictor(Recorder(), card())
    with pytest.raises(DataError, match="the hole covers all of the image"):
        predictor.fill(image, np.ones(image.shape[1:], bool), grid(image.shape[1:]))
    with pytest.raises(DataError, match=r"on a grid of \(4, 4, 4\)"):
        predictor.fill(image, np.ones(image.shape[1:], bool), grid((4, 4, 4)))


def test_models_of_other_tasks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps(card(task="pretraining", context="none").to_json()))
    with pytest.raises(RequestError, match="pretraining model, which fills no holes"):
        InpaintingPredictor.load(tmp_path)


def test_smaller_windows_need_less_memory_at_once() -> None:
    """A hole of 12 voxels has one window of 12 + 2 x 16 = 44 voxels; when memory runs out, windows of a patch, 8."""
    image = scan()
    hole = np.zeros(image.shape[1:], bool)
    hole[4:16, 6:18, 4:16] = True
    used = InpaintingPredictor(Recorder(value=2.0), card(context="none"))
    shown: list[tuple[int, ...]] = []
    smaller: InpaintingPredictor | None = used
    while smaller is not None:
        used.backend.shown.clear()
        filled = smaller.fill(image, hole, grid(hole.shape))
        assert np.array_equal(filled[:, ~hole], image[:, ~hole])
        assert np.ptp(filled[:, hole]) == 0
        shown.append(max(window.shape[2:] for window in used.backend.shown))
        smaller = smaller.with_smaller_window()
    assert shown[0] == (44, 44, 44)
    assert shown[-1] == (8, 8, 8)
    assert InpaintingPredictor(Recorder(name="openvino"), card()).with_smaller_window() is None
