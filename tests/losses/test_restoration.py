"""The loss of made-up voxels: values by hand, and that only the hole is looked at."""

from __future__ import annotations

import pytest
import torch
from monai.metrics.regression import compute_ssim_and_cs
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from segkit.losses.restoration import RestorationConfig, restoration_loss, ssim_map

ONLY_L1 = RestorationConfig(ssim=0, mse=0)
ONLY_MSE = RestorationConfig(l1=0, ssim=0)
ONLY_SSIM = RestorationConfig(l1=0, mse=0, ssim=1)


def _case(dims: int = 3, channels: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """A random image, another one, and a hole of 3 voxels an axis in the first picture, 4 in the second."""
    generator = torch.Generator().manual_seed(dims)
    size = (2, channels, *(9, 10, 11)[:dims])
    image, found = torch.randn(size, generator=generator), torch.randn(size, generator=generator)
    hole = torch.zeros(2, 1, *size[2:], dtype=torch.bool)
    hole[(0, 0, *(slice(2, 5),) * dims)] = True
    hole[(1, 0, *(slice(0, 4),) * dims)] = True
    return found.requires_grad_(), image, hole


@pytest.mark.parametrize("dims", [2, 3])
def test_the_truth_costs_nothing_whatever_is_outside_the_hole(dims: int) -> None:
    found, image, hole = _case(dims)
    loss = restoration_loss(torch.where(hole, image, found), image, hole, RestorationConfig())
    assert loss.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_constant_offset_costs_itself_and_its_square(dims: int) -> None:
    _, image, hole = _case(dims)
    assert restoration_loss(image + 3, image, hole, ONLY_L1).item() == pytest.approx(3)
    assert restoration_loss(image - 3, image, hole, ONLY_MSE).item() == pytest.approx(0.1 * 9)
    both = RestorationConfig(l1=2, ssim=0, mse=0.5)
    assert restoration_loss(image - 3, image, hole, both).item() == pytest.approx(2 * 3 + 0.5 * 9)


def test_terms_are_means_over_hole_voxels_and_channels_of_the_whole_batch() -> None:
    image = torch.zeros(2, 2, 2, 2)
    hole = torch.tensor([[[[True, False], [False, False]]], [[[True, True], [True, False]]]])
    found = torch.full((2, 2, 2, 2), 100.0)
    found[0, :, 0, 0] = torch.tensor([1.0, 3.0])  # one hole voxel
    found[1, 0], found[1, 1, 0, :], found[1, 1, 1, 0] = 2.0, 0.0, 8.0  # three
    # (1 + 3 + 2 + 2 + 2 + 0 + 0 + 8) / 8 and (1 + 9 + 4 + 4 + 4 + 0 + 0 + 64) / 8
    assert restoration_loss(found, image, hole, ONLY_L1).item() == pytest.approx(18 / 8)
    assert restoration_loss(found, image, hole, ONLY_MSE).item() == pytest.approx(0.1 * 86 / 8)


@pytest.mark.parametrize("dims", [2, 3])
def test_no_gradient_outside_the_hole_and_some_everywhere_in_it(dims: int) -> None:
    found, image, hole = _case(dims)
    restoration_loss(found, image, hole, RestorationConfig()).backward()
    assert found.grad is not None
    has_gradient = found.grad != 0
    assert torch.equal(has_gradient, hole.expand_as(has_gradient))


def test_what_is_not_finite_outside_the_hole_does_no_harm() -> None:
    found, image, hole = _case()
    expected = restoration_loss(found, image, hole, RestorationConfig())
    wild = torch.where(hole, found, torch.inf).detach().requires_grad_()
    loss = restoration_loss(wild, image, hole, RestorationConfig())
    loss.backward()
    assert loss.item() == pytest.approx(expected.item())
    assert wild.grad is not None
    assert wild.grad.isfinite().all()


def test_a_batch_without_a_hole_costs_nothing_and_can_be_differentiated() -> None:
    found, image, hole = _case()
    loss = restoration_loss(found, image, torch.zeros_like(hole), RestorationConfig())
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(found.grad, torch.zeros_like(image))


def test_of_levels_the_first_counts() -> None:
    found, image, hole = _case()
    alone = restoration_loss(found, image, hole, RestorationConfig())
    assert torch.equal(alone, restoration_loss([found, found[..., ::2, ::2, ::2]], image, hole, RestorationConfig()))


def test_half_precision_is_summed_in_full() -> None:
    found, image, hole = _case()
    rounded = found.detach().half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = restoration_loss(rounded, image, hole, RestorationConfig())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, restoration_loss(rounded.float(), image, hole, RestorationConfig()))


@pytest.mark.parametrize("dims", [2, 3])
def test_ssim_of_two_constant_patches(dims: int) -> None:
    size = (1, 1) + (8,) * dims
    x, y = torch.full(size, 0.25), torch.full(size, 0.75)
    # Nothing varies: c2 / c2. Of the means, with c1 = 1e-4: (2 * 3/16 + c1) / (1/16 + 9/16 + c1), at borders as well.
    expected = (0.375 + 1e-4) / (0.625 + 1e-4)
    # Rounding of the variances, 1e-7, is seen against c2.
    torch.testing.assert_close(ssim_map(x, y, window=7, data_range=1), torch.full(size, expected), atol=5e-4, rtol=0)
    # Of 6 intensities, with black at 0 or, as in z-scores, at -3.
    everywhere = torch.ones(size, dtype=torch.bool)
    for darkest in (0.0, -3.0):
        config = ONLY_SSIM.model_copy(update={"darkest": darkest})
        loss = restoration_loss(6 * x + darkest, 6 * y + darkest, everywhere, config)
        assert loss.item() == pytest.approx(1 - expected, abs=5e-4)


def test_ssim_of_a_window_by_hand() -> None:
    x = torch.tensor([0.0, 0, 0, 0, 3, 0, 0, 0, 0]).view(1, 1, 3, 3)
    y = torch.tensor([0.0, 0, 0, 0, 6, 0, 0, 0, 0]).view(1, 1, 3, 3)
    # Means of nine: 1/3 and 2/3; squares 1 and 4, product 2; variances 8/9 and 32/9, covariance 16/9. c1 = 1, c2 = 9.
    centre = (2 * 2 / 9 + 1) * (2 * 16 / 9 + 9) / ((5 / 9 + 1) * (40 / 9 + 9))
    # The window of a corner holds four voxels: means 3/4 and 3/2, squares 9/4 and 9, product 9/2.
    means, squares = (0.75, 1.5), (2.25, 9.0)
    covariance = 4.5 - 0.75 * 1.5
    spread = squares[0] - means[0] ** 2 + squares[1] - means[1] ** 2
    corner = (2 * 0.75 * 1.5 + 1) * (2 * covariance + 9) / ((0.75**2 + 1.5**2 + 1) * (spread + 9))
    found = ssim_map(x, y, window=3, data_range=100)
    assert found[0, 0, 1, 1].item() == pytest.approx(centre)
    assert found[0, 0, 0, 0].item() == pytest.approx(corner)


@pytest.mark.parametrize("dims", [2, 3])
def test_ssim_is_that_of_monai_where_the_window_lies_in_the_image(dims: int) -> None:
    found, image, _ = _case(dims)
    x, y = found.detach().sigmoid(), image.sigmoid()
    theirs, _ = compute_ssim_and_cs(x, y, dims, [7] * dims, [1.5] * dims, data_range=0.5, kernel_type="uniform")
    ours = ssim_map(x, y, window=7, data_range=0.5)[(..., *(slice(3, -3),) * dims)]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_ssim_has_the_gradient_of_its_value() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(1, 2, 5, 6, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: ssim_map(a, b, window=3, data_range=1), (x, y))


def test_windows_around_a_hole_see_known_voxels() -> None:
    image = functional.pad(torch.ones(1, 1, 1, 1), (4, 4, 4, 4)) * 2  # one bright pixel, which is the hole
    hole = image > 0
    # In a window of 9, the truth has mean 2/9 and mean square 4/9, the filled picture nothing; range 100: c1 1, c2 9.
    config = RestorationConfig(l1=0, mse=0, ssim=1, ssim_window=3, darkest=0, data_range=100)
    expected = 1 * 9 / (((2 / 9) ** 2 + 1) * (4 / 9 - (2 / 9) ** 2 + 9))
    loss = restoration_loss(torch.zeros_like(image), image, hole, config)
    assert loss.item() == pytest.approx(1 - expected, rel=1e-4)


def test_what_does_not_go_together_is_refused() -> None:
    found, image, hole = _case(2)
    with pytest.raises(ValueError, match=r"found \(2, 1, 9, 10\), image \(2, 2, 9, 10\)"):
        restoration_loss(found[:, :1], image, hole, ONLY_L1)
    with pytest.raises(ValueError, match=r"hole \(2, 1, 9, 10\) of torch.float32; expected .* \(2, 1, 9, 10\) of"):
        restoration_loss(found, image, hole.float(), ONLY_L1)
    with pytest.raises(ValidationError, match="a window of 4 voxels has no voxel in its centre; use an odd number"):
        RestorationConfig(ssim_window=4)
