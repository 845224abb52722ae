"""Soft Dice against fractions worked out by hand."""

from __future__ import annotations

import pytest
import torch

from segkit.losses.dice_cross_entropy import soft_dice_loss


def planes(*rows: list[float]) -> torch.Tensor:
    """One channel per sample, (B, 1, 4)."""
    return torch.tensor(rows).unsqueeze(1)


def test_value_of_one_sample():
    # intersection 0.5 + 0.25 = 0.75; sums 1.0 and 2; dice = 1.5 / 3
    loss = soft_dice_loss(planes([0.5, 0.25, 0.25, 0.0]), planes([1.0, 1.0, 0.0, 0.0]), batch_dice=False, smooth=0.0)
    assert loss.item() == pytest.approx(0.5)


def test_smoothing_is_added_to_both_sides_of_the_fraction():
    # (2 * 1 + 1) / (2 + 2 + 1)
    loss = soft_dice_loss(planes([1.0, 1.0, 0.0, 0.0]), planes([0.0, 1.0, 1.0, 0.0]), batch_dice=False, smooth=1.0)
    assert loss.item() == pytest.approx(1 - 3 / 5)


def test_batch_dice_pools_samples_where_sample_dice_averages_them():
    probabilities = planes([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0])
    targets = planes([0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0])
    pooled = soft_dice_loss(probabilities, targets, batch_dice=True, smooth=0.0)
    averaged = soft_dice_loss(probabilities, targets, batch_dice=False, smooth=0.0)
    assert pooled.item() == pytest.approx(1 - 6 / 7)  # 2 * 3 / (4 + 3)
    assert averaged.item() == pytest.approx(1 - (0 / 1 + 6 / 6) / 2)


def test_channels_are_averaged():
    probabilities = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    targets = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    loss = soft_dice_loss(probabilities, targets, batch_dice=True, smooth=0.0)
    assert loss.item() == pytest.approx(0.5)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_absent_and_unpredicted_structure_costs_nothing(batch_dice):
    empty = torch.zeros(2, 1, 3, 3, 3)
    assert soft_dice_loss(empty, empty, batch_dice=batch_dice, smooth=1e-5).item() == 0.0
