"""Group norm and SiLU in one step against PyTorch's two layers."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from segkit.models.kernels import fused_group_norm as normalisation
from segkit.models.kernels.fused_group_norm import normalise, normalise_and_activate

_FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


def _case(dims: int, channels: int = 8) -> tuple[Tensor, nn.GroupNorm]:
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, channels).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = 3.0 + 2.0 * torch.randn(2, channels, *(3, 4, 5)[:dims], dtype=torch.float64)
    return x.contiguous(memory_format=_FORMATS[dims]).requires_grad_(), norm


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("activates", [False, True])
def test_output_and_gradients_are_those_of_the_layers(dims: int, activates: bool) -> None:
    x, norm = _case(dims)
    ours = normalise_and_activate(x, norm) if activates else normalise(x, norm)
    expected = functional.silu(norm(x)) if activates else norm(x)
    torch.testing.assert_close(ours, expected)
    assert ours.is_contiguous(memory_format=_FORMATS[dims])
    weights = torch.randn_like(expected)
    inputs = [x, norm.weight, norm.bias]
    for one, other in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("size", [1, 7, 60, 10**6])
def test_the_size_of_the_parts_does_not_matter(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    x, norm = _case(3)
    expected = functional.silu(norm(x))
    weights = torch.randn_like(expected)
    monkeypatch.setattr(normalisation, "_PART_BYTES", size * 8 * 8 // torch.get_num_threads())
    ours = normalise_and_activate(x, norm)
    torch.testing.assert_close(ours, expected)
    (gradient,), (one,) = (torch.autograd.grad((result * weights).sum(), x) for result in (expected, ours))
    torch.testing.assert_close(one, gradient)


def test_float32_keeps_six_digits_where_a_million_voxels_are_added_up() -> None:
    torch.manual_seed(0)
    x = (0.5 + torch.randn(1, 16, 64, 64, 64)).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    exact, norm = x.detach().double().requires_grad_(), nn.GroupNorm(4, 16)
    weights = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((normalise_and_activate(x, norm) * weights).sum(), x)
    expected = functional.silu(norm.double()(exact))
    (exact_gradient,) = torch.autograd.grad((expected * weights.double()).sum(), exact)
    assert (gradient - exact_gradient).norm() < 1e-6 * exact_gradient.norm()  # PyTorch's own, channels innermost: 3e-5


def test_gradients_are_those_of_finite_differences() -> None:
    x, norm = _case(3)
    assert torch.autograd.gradcheck(
        lambda value: normalise_and_activate(value, norm),
        (x[:, :, :2, :2, :1].contiguous(memory_format=torch.channels_last_3d),),
    )


def test_a_part_takes_its_groups_of_the_norm() -> None:
    x, norm = _case(3)
    whole = normalise_and_activate(x, norm)
    part = x[:, 4:8].contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(normalise_and_activate(part, norm, slice(4, 8)), whole[:, 4:8])


def test_one_pair_of_numbers_by_hand() -> None:
    norm = nn.GroupNorm(1, 2, eps=0.0)
    x = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1, 1)  # mean 2, deviation 1: normalised to -1 and 1
    expected = torch.tensor([-1 / (1 + torch.e), 1 / (1 + 1 / torch.e)])
    torch.testing.assert_close(normalise_and_activate(x, norm).flatten(), expected)


def test_channels_outermost_go_through_the_two_layers() -> None:
    x, norm = _case(3)
    outermost = x.contiguous()
    torch.testing.assert_close(normalise_and_activate(outermost, norm), functional.silu(norm(outermost)))


@pytest.mark.parametrize("activates", [False, True])
def test_bfloat16_differs_from_float64_by_its_rounding_only(activates: bool) -> None:
    x, norm = _case(3, channels=16)
    short = x.detach().bfloat16().requires_grad_()
    exact = short.detach().double().requires_grad_()
    expected = functional.silu(norm(exact)) if activates else norm(exact)
    weights = torch.randn_like(expected).bfloat16()
    parameters = [norm.weight, norm.bias]
    wanted = torch.autograd.grad((expected * weights.double()).sum(), [exact, *parameters])
    norm.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = normalise_and_activate(short, norm) if activates else normalise(short, norm)
    gradients = torch.autograd.grad(found, [short, norm.weight, norm.bias], weights)
    assert found.dtype == torch.bfloat16
    for one, other in zip((found, *gradients), (expected, *wanted), strict=True):
        assert (one.double() - other).norm() < 2**-8 * other.norm()  # 8 bits of precision
    assert gradients[1].dtype == torch.float32
    assert (gradients[1].double() - wanted[1]).norm() < 1e-5 * wanted[1].norm()  # summed in float32, not in bfloat16
