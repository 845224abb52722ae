"""Kernels for other image channels; one output, kernel of one voxel, so that each number can be checked by eye."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from segkit.checkpoint.transfer import InputAdapt, adapt_by_modality, adapt_channels


def kernels(*values: float) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("before", "rule", "after"),
    [
        ((6.0,), "mean", (2.0, 2.0, 2.0)),
        ((6.0,), "repeat", (6.0, 6.0, 6.0)),
        ((6.0,), "zero", (6.0, 0.0, 0.0)),
        ((1.0, 2.0, 5.0), "mean", (8.0,)),
        ((1.0, 2.0, 5.0), "repeat", (1.0,)),
        ((1.0, 2.0, 5.0), "zero", (1.0,)),
        ((1.0, 2.0, 4.0), "mean", (0.75, 1.5, 3.0, 0.75)),
        ((1.0, 2.0, 4.0), "repeat", (1.0, 2.0, 4.0, 1.0)),
        ((2.0, 4.0, 6.0, 8.0), "mean", (4.0, 8.0)),
        ((1.0, 2.0), "zero", (1.0, 2.0, 0.0)),
    ],
)
def test_another_number_of_channels(before: tuple[float, ...], rule: InputAdapt, after: tuple[float, ...]) -> None:
    adapted = adapt_channels(kernels(*before), len(after), rule)
    assert torch.equal(adapted, kernels(*after))


def test_mean_keeps_the_answer_to_one_image_in_all_channels() -> None:
    weight = torch.randn(4, 1, 3, 3, 3)
    image = torch.randn(1, 1, 5, 5, 5)
    before = torch.nn.functional.conv3d(image, weight)
    after = torch.nn.functional.conv3d(image.expand(-1, 4, -1, -1, -1), adapt_channels(weight, 4, "mean"))
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(
    ("names", "after"),
    [
        (("t1ce", "T1w"), (2.0, 1.0)),
        (("FLAIR",), (9.0,)),
        (("t2f", "CT"), (9.0, 4.0)),
        (("CT", "PET"), None),
    ],
)
def test_channels_by_the_name_of_their_modality(names: tuple[str, ...], after: tuple[float, ...] | None) -> None:
    adapted = adapt_by_modality(kernels(1.0, 2.0, 9.0), ("t1n", "t1c", "t2f"), names)
    if after is None:
        assert adapted is None
    else:
        assert adapted is not None
        assert torch.equal(adapted, kernels(*after))


def test_adapting_works_without_memory() -> None:
    weight = torch.empty(8, 1, 3, 3, 3, device="meta")
    for rule in ("mean", "repeat", "zero"):
        assert adapt_channels(weight, 4, rule).shape == (8, 4, 3, 3, 3)
