"""Overlaps of views that one can count: boxes of 8 voxels of 1 mm, moved by whole voxels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from segkit.pretraining.overlap import overlap_measures, view_overlaps


def frames(*moved_mm: float, scale: float = 1.0, dims: int = 3) -> Tensor:
    """Frames of views whose first voxel lies so far along axis 0 of their image."""
    frame = torch.zeros(len(moved_mm), dims, dims + 1)
    frame[:, :, :dims] = scale * torch.eye(dims)
    frame[:, 0, dims] = torch.tensor(moved_mm)
    return frame


def batch_of(first: Tensor, second: Tensor, stack: list[int], starts_mm: list[float]) -> dict[str, Tensor]:
    """`starts_mm`: the first voxel of each image along axis 0 of its case."""
    count, dims = first.shape[:2]
    origin = torch.zeros(count, dims)
    origin[:, 0] = torch.tensor(starts_mm)
    image = torch.zeros(count, 1, *(8,) * dims)
    frames = {"first_frame": first, "second_frame": second}
    return {"first": image, "stack": torch.tensor(stack), "place": origin[:, 0], "origin": origin, **frames}


def test_two_crops_of_a_case_and_one_of_another() -> None:
    """Second views lie 2 mm on: 6 of 8 voxels in common, of 10; crops 4 mm apart have 2 of 14 or 6 of 10."""
    batch = batch_of(frames(0, 0, 0), frames(2, 2, 2), [0, 0, 1], [0.0, 4.0, 0.0])
    expected = torch.tensor([[[6 / 10, 2 / 14, 0], [6 / 10, 6 / 10, 0], [0, 0, 6 / 10]]])
    assert torch.allclose(view_overlaps(batch, 3), expected)


def test_a_view_inside_another() -> None:
    """A view of half the length along each axis is an eighth of the other, also if it is mirrored."""
    inner = frames(0, scale=0.5)
    mirrored = inner.clone()
    mirrored[:, 0, 0], mirrored[:, 0, 3] = -0.5, 3.5
    for second in (inner, mirrored):
        assert view_overlaps(batch_of(frames(0), second, [0], [0.0]), 1).item() == pytest.approx(1 / 8)


def test_different_slices_of_a_volume_do_not_overlap() -> None:
    batch = batch_of(frames(0, 0, dims=2), frames(0, 0, dims=2), [0, 0], [0.0, 0.0])
    batch["place"] = torch.tensor([0.0, 3.0])
    assert view_overlaps(batch, 2).tolist() == [[[1, 0], [0, 1]]]


def test_an_oracle_is_wrong_where_the_views_of_another_image_overlap_more() -> None:
    """In the first group second views show the other crop, in the second their own."""
    first, second = frames(0, 0, 0, 0), frames(4, -4, 1, -1)
    batch = batch_of(first, second, [0, 0, 1, 1], [0.0, 4.0, 0.0, 4.0])
    overlaps = view_overlaps(batch, 2)
    assert torch.allclose(overlaps[0], torch.tensor([[4 / 12, 1], [1, 4 / 12]]))
    assert torch.allclose(overlaps[1], torch.tensor([[7 / 9, 5 / 11], [5 / 11, 7 / 9]]))
    assert overlap_measures(batch, 2) == pytest.approx(
        {"own": (4 / 12 + 7 / 9) / 2, "other": (1 + 5 / 11) / 2, "oracle": 0.5}
    )
