"""What a network costs whose weights several processes share, and when planning shares them."""

from __future__ import annotations

import pytest
import torch

from segkit.errors import RequestError
from segkit.preparing.memory import GIB, StepCost, Volumes, estimate_memory_gb

CONTEXT_GB = 0.6


@pytest.mark.parametrize(
    ("shards", "expected_gb"),
    [
        (1, 4 * 8 + 10),  # weights, two moments, average; gradients and activations
        (4, 4 * 8 / 4 + 8 + 1),  # a validation, for which each process is lent the whole; training is 8 + 10 - 6
    ],
)
def test_memory_of_a_part(shards: int, expected_gb: float) -> None:
    cost = StepCost(weights=8 * GIB, saved=GIB, peak=10 * GIB, window=GIB)
    nothing = Volumes(channels=0, outputs=-2, prepared_voxels=0, source_voxels=0)
    found = estimate_memory_gb(cost, nothing, device=torch.device("cuda"), shards=shards)
    assert found == pytest.approx(CONTEXT_GB + expected_gb)


def test_on_a_cpu_the_first_process_holds_the_whole_state_to_write_it() -> None:
    cost = StepCost(weights=8 * GIB, saved=0, peak=8 * GIB, window=0)
    nothing = Volumes(channels=0, outputs=-2, prepared_voxels=0, source_voxels=0)
    found = estimate_memory_gb(cost, nothing, device=torch.device("cpu"), shards=8)
    assert found == pytest.approx(4 * 8 / 8 + 4 * 8, abs=1.2)  # the process itself is about 1


def test_a_single_process_has_nobody_to_share_with() -> None:
    from segkit.models.table import build_model
    from segkit.training.distributed import Ranks
    from segkit.training.sharding import require_units

    with pytest.raises(RequestError, match="shares a network between processes, but there is one"):
        require_units(build_model("stunet", in_channels=1, out_channels=1, size="S", width=2), torch.float32, Ranks())
