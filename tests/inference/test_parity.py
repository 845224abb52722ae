"""When a graph counts as the network that it was made from."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segkit.errors import CheckpointError
from segkit.inference.backends import Array
from segkit.inference.parity import (
    HoledWindow,
    check_parity,
    check_restored,
    random_windows,
    relative_difference,
    seconds_per_window,
    windows_with_holes,
)


class _Same(nn.Module):
    """Logits are the window."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class _Rounding(nn.Module):
    """Logits are the window, with the rounding of numbers near 100,000."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1e5) - 1e5


class _Changed:
    """The window with `change` added to its first voxel."""

    name = "changed"

    def __init__(self, change: float) -> None:
        self.change = change

    def __call__(self, windows: Array) -> Array:
        logits = windows.copy()
        logits.flat[0] += self.change
        return logits


def _plus_minus(size: float) -> Array:
    """(1, 2, 2, 2): the first output on everywhere, the second nowhere."""
    return np.array([[[[size, size], [size, size]], [[-size, -size], [-size, -size]]]], np.float32)


def test_small_differences_pass_and_are_told() -> None:
    window = _plus_minus(1.0)
    parity = check_parity(_Same(), _Changed(5e-4), [window, window], [window, window], "sigmoid")
    assert parity.to_json() == {"largest_difference": 5e-4, "largest_logit": 1.0, "dice": 1.0, "windows": 2}


def test_larger_logits_may_differ_by_more() -> None:
    window = _plus_minus(100.0)
    assert check_parity(_Same(), _Changed(5e-3), [window], [window], "sigmoid").largest_logit == 100
    with pytest.raises(CheckpointError, match=r"up to 1\.5e-02 from the exact logits, the network itself 0"):
        check_parity(_Same(), _Changed(1.5e-2), [window], [window], "sigmoid")


def test_a_graph_as_exact_as_the_network_passes() -> None:
    network = _Rounding()
    window = _plus_minus(1.003)
    expected = network(torch.from_numpy(window)).numpy()
    assert np.abs(expected - window).max() > 1e-3
    assert check_parity(network, _Changed(0.0), [window], [expected], "sigmoid").dice == 1
    with pytest.raises(CheckpointError, match="from the exact logits"):
        check_parity(network, _Changed(0.02), [window], [expected], "sigmoid")


def test_nan_never_passes() -> None:
    window = _plus_minus(1.0)
    with pytest.raises(CheckpointError, match="from the exact logits"):
        check_parity(_Same(), _Changed(float("nan")), [window], [window], "sigmoid")


def test_masks_must_agree() -> None:
    window = _plus_minus(1e-4)  # the first voxel of four falls out of the mask: Dice 2 * 3 / (4 + 3)
    with pytest.raises(CheckpointError, match=r"Dice 0\.85714 only"):
        check_parity(_Same(), _Changed(-5e-4), [window], [window], "sigmoid")


def test_background_of_a_softmax_is_no_mask() -> None:
    window = _plus_minus(1e-4)  # everything background; the change makes it more so
    assert check_parity(_Same(), _Changed(5e-4), [window], [window], "softmax").dice == 1
    with pytest.raises(CheckpointError, match=r"Dice 0\.00000 only"):
        check_parity(_Same(), _Changed(-5e-4), [window], [window], "softmax")


def test_differences_are_relative_to_logits_above_1() -> None:
    small, large = _plus_minus(0.5), _plus_minus(4.0)
    assert relative_difference(_Changed(0.125), _Changed(0.0), small) == 0.125
    assert relative_difference(_Changed(0.125), _Changed(0.0), large) == 0.125 / 4


def test_windows_and_times() -> None:
    one, two = random_windows(2, (3, 4), 2)
    assert one.shape == (1, 2, 3, 4)
    assert one.dtype == np.float32
    assert not np.array_equal(one, two)
    assert all(seconds > 0 for seconds in seconds_per_window([_Changed(0.0), _Changed(1.0)], one, rounds=2))


class _Shifted:
    """The window with 0.2 added to its first `count` voxels."""

    name = "shifted"

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, windows: Array) -> Array:
        images = windows.copy()
        images.flat[: self.count] += 0.2
        return images


def _holed(image: Array) -> HoledWindow:
    """A window whose hole are all but the last row of pixels."""
    hole = np.ones(image.shape[2:], bool)
    hole[-1] = False
    return HoledWindow(image, hole)


def test_a_few_voxels_of_a_filled_hole_may_differ() -> None:
    image = np.ones((1, 1, 41, 50), np.float32)  # 2000 of its pixels are missing
    window = _holed(image)
    parity = check_restored(_Shifted(4), [window, window], [image, image])
    assert parity.to_json() == {"largest_difference": 0.2, "largest_logit": 1.0, "dice": None, "windows": 2}
    with pytest.raises(CheckpointError, match=r"by 1\.3e-02 .* and 0\.4% of their voxels"):  # 0.2 sqrt(8 / 2000)
        check_restored(_Shifted(8), [window], [image])
    with pytest.raises(CheckpointError, match="in shifted the filled holes differ by nan"):
        check_restored(_Shifted(1), [window], [np.full_like(image, np.nan)])
    changed = image.copy()
    changed[0, 0, 0, :22] += 0.002
    with pytest.raises(CheckpointError, match=r"1\.1% of their voxels by more than 0\.001"):
        check_restored(_Shifted(0), [window], [changed])
    changed = image.copy()
    changed[0, 0, -1] = 5  # outside the hole
    assert check_restored(_Shifted(0), [window], [changed]).largest_difference == 0


@pytest.mark.parametrize(("context", "channels"), [("none", 2), ("hole", 3), ("mirror", 6)])
def test_windows_with_holes_are_what_inpainting_networks_are_given(
    context: Literal["none", "hole", "mirror"], channels: int
) -> None:
    windows = windows_with_holes(2, context, (16, 12, 16), 3)
    assert [window.stacked.shape for window in windows] == [(1, channels, 16, 12, 16)] * 3
    assert not np.array_equal(windows[0].stacked, windows[1].stacked)
    for (stacked,), hole in windows:
        assert stacked.dtype == np.float32
        assert np.count_nonzero(hole) == 6 * 4 * 6
        assert not stacked[:2, 0, 0].any()  # outside the ball
        assert not stacked[:2, hole].any()
        if context != "none":
            assert np.array_equal(stacked[2] > 0, hole)
        if context == "mirror":
            assert np.array_equal(stacked[3:5, ::-1], stacked[:2])
            assert np.array_equal(stacked[5, ::-1] > 0, stacked[0] != 0)
