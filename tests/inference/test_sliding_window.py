"""Windows over volumes of any size, blended to what one whole pass would give, slab by slab."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from segkit.inference.backends import TorchBackend
from segkit.inference.sliding_window import Logits, Network, Slab, plan_windows, predict_slabs


def double(windows: Logits) -> Logits:
    return np.concatenate([2 * windows, -windows], axis=1)


def noise(*shape: int) -> Logits:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def predict(
    network: Network,
    image: NDArray[np.floating],
    window: Sequence[int],
    *,
    overlap: float = 0.5,
    axis: int | None = None,
    mirror_axes: Sequence[int] = (),
) -> Logits:
    """All logits; slabs must follow one another without gaps."""
    plan = plan_windows(image.shape[1:], window, overlap, axis)
    image = np.asarray(image, np.float32)
    slabs = list(predict_slabs(network, image, plan, mirror_axes=mirror_axes))
    assert [slab.start for slab in slabs] == [0, *(slab.stop for slab in slabs[:-1])]
    assert slabs[-1].stop == image.shape[plan.axis + 1]
    return np.concatenate([slab.logits for slab in slabs], plan.axis + 1)


@pytest.mark.parametrize("shape", [(8, 8, 8), (11, 9, 20), (3, 8, 5), (1, 1, 1)])
@pytest.mark.parametrize("axis", [0, 1, 2, None])
def test_blending_a_voxelwise_network_gives_its_values(shape: tuple[int, ...], axis: int | None) -> None:
    image = noise(1, *shape)
    logits = predict(double, image, (8, 8, 8), axis=axis)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, np.concatenate([2 * image, -image]), rtol=1e-4, atol=1e-5)


def test_pictures_have_two_axes() -> None:
    image = noise(3, 10, 7)
    logits = predict(lambda windows: windows[:, :1].copy(), image, (4, 8), overlap=0.25)
    np.testing.assert_allclose(logits, image[:1], rtol=1e-4, atol=1e-5)


def test_blending_weighs_windows_by_a_gaussian() -> None:
    # A network that gives the number of its window: 0 for the first (voxels 0 to 3), 1 for the second (2 to 5).
    calls = iter((0.0, 1.0))
    logits = predict(lambda windows: np.full_like(windows, next(calls)), noise(1, 6), (4,), axis=0)
    # Sigma is 0.5 voxels: 0.5 and 1.5 voxels from the centre weigh exp(-0.5) and exp(-4.5).
    near, far = np.exp(-0.5), np.exp(-4.5)
    np.testing.assert_allclose(logits[0], [0, 0, far / (near + far), near / (near + far), 1, 1], rtol=1e-5)


def test_small_volumes_are_padded_with_zeros_half_on_each_side() -> None:
    seen: list[Logits] = []

    def remember(windows: Logits) -> Logits:
        seen.append(windows)
        return windows.copy()

    predict(remember, np.ones((1, 2, 3, 4)), (4, 4, 4))
    (window,) = seen
    assert window.shape == (1, 1, 4, 4, 4)
    assert window[0, 0, :, 0, 0].tolist() == [0, 1, 1, 0]
    assert window[0, 0, 1, :, 0].tolist() == [1, 1, 1, 0]


def test_windows_overlap_by_half_and_the_last_ends_at_the_edge() -> None:
    assert plan_windows((9, 4, 4), (4, 4, 4), 0.5).starts == ((0, 2, 4, 5), (0,), (0,))
    assert plan_windows((9, 4, 4), (4, 4, 4), 0.5).count == 4


def test_slabs_follow_the_axis_along_which_they_are_smallest() -> None:
    plan = plan_windows((40, 100, 30), (20, 20, 20), 0.5)
    assert plan.axis == 1
    assert plan.slab_voxels == 40 * 20 * 30


def test_only_one_row_of_windows_is_held() -> None:
    plan = plan_windows((4, 64, 4), (4, 8, 4), 0.5)
    largest = max(slab.logits.nbytes for slab in predict_slabs(double, noise(1, 4, 64, 4), plan))
    assert largest <= 2 * 4 * plan.slab_voxels


def test_windows_without_contrast_are_computed_once() -> None:
    count = 0

    def network(windows: Logits) -> Logits:
        nonlocal count
        count += len(windows)
        return 3 * windows + 1

    image = np.zeros((2, 64, 8, 8), np.float32)
    image[1] = 5
    image[0, 60, 4, 4] = 7  # in the last window only
    logits = predict(network, image, (8, 8, 8), overlap=0)
    assert count == 2
    np.testing.assert_allclose(logits, 3 * image + 1, rtol=1e-6)


def test_mirroring_averages_over_all_flips() -> None:
    image = np.zeros((1, 4, 4, 4), np.float32)
    image[0, 1] = 1.0
    logits = predict(lambda windows: np.roll(windows, 1, axis=2), image, (4, 4, 4), mirror_axes=(0,))
    # Shifted forward the plane lies at 2; flipped, shifted and flipped back it lies at 0.
    assert logits[0, :, 0, 0].tolist() == [0.5, 0.0, 0.5, 0.0]


def test_mirroring_three_axes_calls_the_network_eight_times() -> None:
    calls = 0

    def count(windows: Logits) -> Logits:
        nonlocal calls
        calls += 1
        return windows.copy()

    image = noise(1, 4, 4, 4)
    logits = predict(count, image, (4, 4, 4), mirror_axes=(0, 1, 2))
    assert calls == 8
    np.testing.assert_allclose(logits, image, rtol=1e-5)


def test_a_part_of_a_slab_keeps_its_place() -> None:
    slab = Slab(1, 10, 14, np.arange(8, dtype=np.float32).reshape(1, 2, 4), np.arange(8.0).reshape(2, 4))
    part = slab.part(11, 13)
    assert (part.start, part.stop) == (11, 13)
    assert part.logits.tolist() == [[[1, 2], [5, 6]]]
    assert part.spread is not None
    assert part.spread.tolist() == [[1, 2], [5, 6]]


class Counting(TorchBackend):
    """Doubles windows, and notes their number of each call."""

    def __init__(self, threads: int | None = None) -> None:
        super().__init__(Doubling(), threads=threads)
        self.calls: list[int] = []

    def compute(self, windows: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(windows))
        return super().compute(windows)


class Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_torch_computes_as_many_windows_at_once_as_it_has_threads(two_threads: None) -> None:
    image = noise(1, 8, 12, 4)
    image[:, :, :8] = 3  # of three rows of two windows the first two are constant
    backend = Counting()
    found = predict(backend, image, (4, 4, 4), overlap=0)
    np.testing.assert_allclose(found, 2 * image, rtol=1e-6)
    assert backend.calls == [2, 2]  # the second row is known
    alone = Counting(threads=1)
    np.testing.assert_allclose(predict(alone, image, (4, 4, 4), overlap=0), found, rtol=1e-6)
    assert alone.calls == [1] * 3
