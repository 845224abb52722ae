"""The tables for a GPU, on the CPU: it agrees with itself, and bfloat16 nearly so."""

from __future__ import annotations

import pytest
import torch

from segkit.bench import gpu

CPU = torch.device("cpu")


def test_a_cpu_agrees_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_NETWORKS", (("r2unet", "tiny", {}), ("revmbunet", "tiny", {"mode": "reversible"})))
    rows = list(gpu.parity(CPU, 32))
    assert [(row["network"], row["precision"]) for row in rows] == [
        *(("r2unet tiny", "fp32"), ("r2unet tiny", "bf16"), ("revmbunet tiny", "fp32"), ("revmbunet tiny", "bf16")),
    ]
    assert [row["cosine"] for row in rows[::2]] == pytest.approx([1, 1], abs=1e-5)
    assert all(0.9 < row["cosine"] < 1 - 1e-6 for row in rows[1::2]), "another precision was computed"
    assert all(row["loss"] == pytest.approx(row["on_cpu"], rel=0.05) for row in rows)


def test_memory_is_measured_on_gpus_only() -> None:
    assert list(gpu.memory(CPU, 32)) == []


def test_masks_of_a_device_are_those_of_the_host() -> None:
    row = next(gpu.inference(CPU, 32))
    assert (row["windows"], row["equal"]) == (6, 1.0)
