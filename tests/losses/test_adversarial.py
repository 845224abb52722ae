"""Adversarial terms: values by hand, and that one backward pass does what two would."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from monai.losses import PatchAdversarialLoss
from torch import nn

from segkit.losses.restoration import adversarial_terms, discriminator_loss, generator_loss
from segkit.models.generator import build_discriminator


def test_undecided_logits_cost_log_2() -> None:
    undecided = torch.zeros(2, 1, 3, 3)
    assert generator_loss(undecided).item() == pytest.approx(math.log(2))
    assert discriminator_loss(undecided, undecided).item() == pytest.approx(math.log(2))


def test_values_by_hand() -> None:
    logits = torch.tensor([math.log(3.0), -math.log(3.0)])  # true with 3/4 and 1/4
    both = (math.log(4 / 3) + math.log(4)) / 2
    assert generator_loss(logits).item() == pytest.approx(both)
    assert discriminator_loss(logits[:1], logits[1:]).item() == pytest.approx(math.log(4 / 3))
    assert discriminator_loss(logits[1:], logits[:1]).item() == pytest.approx(math.log(4))
    assert discriminator_loss(logits[:1], logits[:1]).item() == pytest.approx(both)


def test_values_are_those_of_monai() -> None:
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(2, 1, 3, 3, generator=generator) for _ in range(2))
    monai = PatchAdversarialLoss(criterion="bce")
    torch.testing.assert_close(generator_loss(fake), monai(fake, True, False))
    half_the_sum = (monai(real, True, True) + monai(fake, False, True)) / 2
    torch.testing.assert_close(discriminator_loss(real, fake), half_the_sum)


def test_who_is_wrong_for_certain_learns_still() -> None:
    fake = torch.tensor([-40.0, 40.0], requires_grad=True)
    (of_generator,) = torch.autograd.grad(generator_loss(fake), fake)
    assert of_generator.tolist() == pytest.approx([-0.5, 0])
    (of_discriminator,) = torch.autograd.grad(discriminator_loss(torch.zeros(1), fake), fake)
    assert of_discriminator.tolist() == pytest.approx([0, 0.25])


def test_half_precision_is_summed_in_full() -> None:
    logits = torch.randn(2, 1, 3, 3).bfloat16()
    assert generator_loss(logits).dtype == discriminator_loss(logits, logits).dtype == torch.float32


@pytest.mark.parametrize("dims", [2, 3])
def test_one_backward_pass_gives_the_gradients_of_two(dims: int) -> None:
    torch.manual_seed(0)
    discriminator = build_discriminator(2, dims, width=4)
    generator = {2: nn.Conv2d, 3: nn.Conv3d}[dims](2, 2, 3, padding=1)
    image, x = torch.randn(2, 3, 2, *(26, 24, 24)[:dims])
    other_generator, other_discriminator = copy.deepcopy(generator), copy.deepcopy(discriminator)

    terms = adversarial_terms(discriminator, generator(x), image)
    (0.1 * terms.generator + terms.discriminator).backward()

    # Spectral norm comes closer with each pass, so the passes are made in the same order.
    real, fake = other_discriminator(torch.cat((image, other_generator(x).detach()))).chunk(2)
    discriminator_loss(real, fake).backward()
    expected = [parameter.grad.clone() for parameter in other_discriminator.parameters()]
    (0.1 * generator_loss(other_discriminator(other_generator(x)))).backward()

    for parameter, gradient in zip(discriminator.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
        assert gradient.any()
    for parameter, other in zip(generator.parameters(), other_generator.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)
        assert other.grad.any()


def test_a_discriminator_that_learns_tells_noise_from_a_pattern() -> None:
    torch.manual_seed(0)
    discriminator = build_discriminator(1, 2, width=8)
    optimiser = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.0, 0.9))
    stripes = torch.tensor([1.0, -1.0]).repeat(16).expand(4, 1, 32, 32)
    losses = []
    for _ in range(30):
        terms = adversarial_terms(discriminator, torch.randn(4, 1, 32, 32), stripes)
        optimiser.zero_grad()
        terms.discriminator.backward()
        optimiser.step()
        losses.append(terms.discriminator.item())
    assert losses[-1] < 0.5 * losses[0]
