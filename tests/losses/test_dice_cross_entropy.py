"""The segmentation losses: values by hand, levels of deep supervision, precision, gradients."""

from __future__ import annotations

import math
import time

import pytest
import torch
from pydantic import ValidationError

from segkit.labels import SCHEMES, classes_scheme, outputs_of
from segkit.losses.dice_cross_entropy import (
    LossConfig,
    SegmentationLoss,
    class_loss,
    deep_supervision_weights,
    nearest_labels,
    region_loss,
)

ONLY_CROSS_ENTROPY = LossConfig(dice_weight=0)
ONLY_DICE = LossConfig(cross_entropy_weight=0, smooth=0)
REGIONS = outputs_of(SCHEMES["brats2023"])  # WT 1 2 3, TC 1 3, ET 3
CLASSES = outputs_of(classes_scheme("organs", {"liver": 1, "spleen": 5}))


def certain(planes: torch.Tensor) -> torch.Tensor:
    """Logits whose sigmoid or softmax is 0 or 1 to float precision."""
    return (planes.float() * 2 - 1) * 50


def test_cross_entropy_of_undecided_regions_is_log_2():
    targets = torch.tensor([[[1.0, 0.0]]])
    loss = region_loss(torch.zeros(1, 1, 2), targets, ONLY_CROSS_ENTROPY)
    assert loss.item() == pytest.approx(math.log(2))


def test_region_loss_adds_weighted_terms():
    targets = torch.tensor([[[1.0, 0.0]]])  # p = 1/2 everywhere: dice = 2 * 0.5 / (1 + 1) = 1/2
    config = LossConfig(dice_weight=3, cross_entropy_weight=2, smooth=0)
    loss = region_loss(torch.zeros(1, 1, 2), targets, config)
    assert loss.item() == pytest.approx(3 * 0.5 + 2 * math.log(2))


def test_class_loss_leaves_background_out_of_dice():
    classes = torch.tensor([[0, 0, 0, 1]])
    logits = certain(torch.tensor([[[1, 1, 1, 1], [0, 0, 0, 0]]]))  # all background: the class is missed entirely
    assert class_loss(logits, classes, ONLY_DICE).item() == pytest.approx(1.0)


def test_class_loss_of_undecided_classes():
    classes = torch.tensor([[1, 0]])  # p = 1/3: intersection 1/3, sums 2/3 and 1 -> dice 2/5; class 2 absent -> dice 0
    loss = class_loss(torch.zeros(1, 3, 2), classes, LossConfig(smooth=0))
    assert loss.item() == pytest.approx(1 - (2 / 5 + 0) / 2 + math.log(3))


def test_labels_are_encoded_into_overlapping_regions():
    labels = torch.tensor([[[0, 1], [2, 3]]], dtype=torch.uint8)
    wt, tc, et = [[0, 1], [1, 1]], [[0, 1], [0, 1]], [[0, 0], [0, 1]]
    loss = SegmentationLoss("sigmoid", REGIONS)
    assert loss(certain(torch.tensor([[wt, tc, et]])), labels).item() == pytest.approx(0, abs=1e-5)
    assert loss(certain(torch.tensor([[wt, et, tc]])), labels).item() > 1


def test_each_sample_is_compared_with_its_own_labels():
    labels = torch.tensor([[[3, 0]], [[0, 3]]], dtype=torch.uint8)
    planes = (labels == 3).unsqueeze(1).expand(-1, 3, -1, -1)
    loss = SegmentationLoss("sigmoid", REGIONS)
    assert loss(certain(planes), labels).item() == pytest.approx(0, abs=1e-5)
    assert loss(certain(planes.flip(0)), labels).item() > 1


def test_label_values_become_channels_and_unlisted_values_background():
    labels = torch.tensor([[[0, 1], [5, 7]]], dtype=torch.uint8)
    channels = torch.tensor([[[0, 1], [2, 0]]])
    planes = torch.nn.functional.one_hot(channels, 3).movedim(-1, 1)
    loss = SegmentationLoss("softmax", CLASSES)
    assert loss(certain(planes), labels).item() == pytest.approx(0, abs=1e-5)


def test_weights_of_levels_halve_and_sum_to_one():
    assert deep_supervision_weights(3) == pytest.approx([4 / 7, 2 / 7, 1 / 7])


def test_levels_are_weighted_sums_of_single_losses():
    labels = torch.randint(0, 4, (2, 8, 8, 8), dtype=torch.uint8)
    full, half = torch.randn(2, 3, 8, 8, 8), torch.randn(2, 3, 4, 4, 4)
    loss = SegmentationLoss("sigmoid", REGIONS)
    expected = loss(full, labels) * 2 / 3 + loss(half, nearest_labels(labels, (4, 4, 4))) / 3
    assert loss([full, half], labels).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("size", "coarse", "expected"),
    [(4, 2, [1, 3]), (8, 2, [2, 6]), (6, 2, [1, 4]), (5, 2, [1, 3]), (3, 3, [0, 1, 2])],
)
def test_coarse_labels_are_those_at_the_centres(size, coarse, expected):
    line = torch.arange(size, dtype=torch.uint8)
    labels = line.view(1, size, 1).expand(1, size, 4)
    sampled = nearest_labels(labels, (coarse, 4))
    assert sampled.shape == (1, coarse, 4)
    assert sampled[0, :, 0].tolist() == expected


@pytest.mark.parametrize(("activation", "outputs"), [("sigmoid", REGIONS), ("softmax", CLASSES)])
@pytest.mark.parametrize("shape", [(8, 8), (4, 8, 8)])
def test_gradient_descends_to_the_labels_in_2d_and_3d(activation, outputs, shape):
    values = torch.tensor(sorted({value for output in outputs for value in output.members} | {0}), dtype=torch.uint8)
    labels = values[torch.randint(len(values), (2, *shape))]  # every output occurs
    logits = torch.zeros(2, 3, *shape, requires_grad=True)
    loss = SegmentationLoss(activation, outputs)
    optimiser = torch.optim.Adam([logits], lr=1.0)
    first = loss(logits, labels)
    for _ in range(30):
        optimiser.zero_grad()
        loss(logits, labels).backward()
        optimiser.step()
    assert loss(logits, labels).item() < 0.05 < first.item()


@pytest.mark.parametrize(("activation", "outputs"), [("sigmoid", REGIONS), ("softmax", CLASSES)])
def test_computed_in_float32_under_autocast(activation, outputs):
    labels = torch.randint(0, 2, (1, 16, 16, 16), dtype=torch.uint8)
    logits = torch.randn(1, 3, 16, 16, 16).bfloat16()
    loss = SegmentationLoss(activation, outputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = loss(logits, labels)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(loss(logits.float(), labels).item(), rel=1e-6)


@pytest.mark.parametrize(("activation", "outputs"), [("sigmoid", REGIONS), ("softmax", CLASSES)])
def test_extreme_logits_give_finite_losses_and_gradients(activation, outputs):
    logits = torch.full((1, 3, 4, 4), 1e4)
    logits[:, 1:] = -1e4
    logits.requires_grad_()
    loss = SegmentationLoss(activation, outputs)(logits, torch.full((1, 4, 4), 1, dtype=torch.uint8))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(("activation", "outputs"), [("sigmoid", REGIONS), ("softmax", CLASSES)])
@pytest.mark.parametrize("batch_dice", [True, False])
def test_ignored_voxels_give_neither_loss_nor_gradient(activation, outputs, batch_dice):
    """The loss is that of the other voxels alone; here the right half of each image is ignored."""
    loss = SegmentationLoss(activation, outputs, LossConfig(batch_dice=batch_dice), ignore=9)
    labels = torch.randint(0, 4, (2, 6, 8), dtype=torch.uint8)
    labels[..., 4:] = 9
    logits = torch.randn(2, 3, 6, 8, requires_grad=True)
    found = loss(logits, labels)
    found.backward()
    assert found.item() == pytest.approx(loss(logits[..., :4], labels[..., :4]).item())
    assert torch.count_nonzero(logits.grad[..., 4:]) == 0
    assert torch.count_nonzero(logits.grad[..., :4]) > 0
    changed = logits.detach().clone()
    changed[..., 4:] = torch.tensor([1e30, -5.0, math.inf, -math.inf]).expand(2, 3, 6, 4)
    assert loss(changed, labels).item() == found.item()


@pytest.mark.parametrize(("activation", "outputs"), [("sigmoid", REGIONS), ("softmax", CLASSES)])
def test_a_patch_of_ignored_voxels_has_loss_and_gradient_0(activation, outputs):
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = SegmentationLoss(activation, outputs, ignore=9)(logits, torch.full((1, 4, 4), 9, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.count_nonzero(logits.grad) == 0


def test_without_ignored_voxels_the_loss_is_the_same():
    labels, logits = torch.randint(0, 3, (2, 6, 8), dtype=torch.uint8), torch.randn(2, 3, 6, 8)
    for activation, outputs in (("sigmoid", REGIONS), ("softmax", CLASSES)):
        plain, ignoring = (SegmentationLoss(activation, outputs, ignore=ignore) for ignore in (None, 9))
        assert ignoring(logits, labels).item() == pytest.approx(plain(logits, labels).item())


def test_table_moves_with_the_module_and_is_not_saved():
    loss = SegmentationLoss("sigmoid", REGIONS)
    assert dict(loss.named_buffers())["table"].shape == (3, 256)
    assert loss.state_dict() == {}


def test_unknown_settings_and_negative_weights_are_refused():
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        LossConfig(dice_weight=-1)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        LossConfig(focal=2)


def test_is_cheap_beside_a_network_step():
    labels = torch.randint(0, 4, (2, 64, 64, 64), dtype=torch.uint8)
    logits = torch.randn(2, 3, 64, 64, 64, requires_grad=True)
    loss = SegmentationLoss("sigmoid", REGIONS)
    durations = []
    for _ in range(5):
        began = time.perf_counter()
        loss(logits, labels).backward()
        durations.append(time.perf_counter() - began)
    assert min(durations) < 0.5  # 0.02 s on two idle cores; a per-voxel or int64 one-hot slip costs far more
