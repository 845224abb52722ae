"""What is asked of the library around its networks: sketches, and batch norms that meet a single value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from segkit.models.smp import make_single_values_safe, sketch


class _Halved(nn.Module):
    """A convolution, one that is never used, and a step down by two and up again."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Conv2d(3, 2, 1)
        self.idle = nn.Conv2d(3, 2, 1)
        # Stochastic depth is set up like this.
        self.rates = [rate.item() for rate in torch.linspace(0, 0.5, 3)]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x)
        return y + nn.functional.avg_pool2d(y, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)


def _images(*shapes: tuple[int, int]) -> Callable[[nn.Module], list[tuple[int, ...]]]:
    return lambda network: [(1, 3, *shape) for shape in shapes]


def test_a_sketch_tells_shapes_and_what_is_never_used() -> None:
    found = sketch(_Halved, _images((4, 6)))
    assert found.logits == (1, 2, 4, 6)
    assert found.tensors["used.weight"] == (2, 3, 1, 1)
    assert found.unused == {"idle.weight", "idle.bias"}


def test_a_sketch_takes_the_first_images_that_work() -> None:
    assert sketch(_Halved, _images((5, 6), (6, 5), (6, 6), (8, 8))).image == (1, 3, 6, 6)


def test_a_sketch_tells_which_images_fail() -> None:
    with pytest.raises(ValueError, match=r"images of 7 x 6 pixels fail: .*broadcast"):
        sketch(_Halved, _images((5, 6), (7, 6)))


def test_a_sketch_is_taken_without_gradients_too() -> None:
    with torch.inference_mode():
        assert sketch(_Halved, _images((4, 6))).unused == {"idle.weight", "idle.bias"}


def test_one_value_is_left_to_running_statistics_and_two_are_not() -> None:
    norm = nn.BatchNorm2d(1, eps=1e-12, momentum=1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        norm(torch.zeros(1, 1, 1, 1))
    make_single_values_safe(norm)
    norm.running_mean.fill_(1)  # type: ignore[union-attr]
    norm.running_var.fill_(4)  # type: ignore[union-attr]
    assert norm(torch.full((1, 1, 1, 1), 7.0)).item() == pytest.approx((7 - 1) / 2)
    assert norm.training
    assert norm(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)).flatten().tolist() == pytest.approx([-1, 1])
    assert norm.running_mean.item() == 2  # type: ignore[union-attr]


def test_a_norm_that_fails_stays_in_training() -> None:
    norm = nn.BatchNorm2d(2)
    make_single_values_safe(norm)
    with pytest.raises(RuntimeError, match="running_mean should contain 3 elements"):
        norm(torch.zeros(1, 3, 1, 1))
    assert norm.training
