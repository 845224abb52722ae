"""How many processes prepare patches."""

from __future__ import annotations

import pytest

from segkit.training.batches import _workers


@pytest.mark.parametrize(
    ("cores", "on_cpu", "on_gpu"), [(1, 0, 2), (2, 0, 2), (3, 2, 2), (8, 7, 7), (12, 8, 11), (64, 8, 16)]
)
def test_a_gpu_needs_more_patches_and_leaves_the_cores_to_them(cores: int, on_cpu: int, on_gpu: int) -> None:
    assert (_workers(cores, is_gpu=False), _workers(cores, is_gpu=True)) == (on_cpu, on_gpu)
