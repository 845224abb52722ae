"""The path of a GPU gives the logits and masks of the host's path; on a CPU, where both are equal bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from segkit.checkpoint.run_folder import load_card
from segkit.errors import CheckpointError
from segkit.inference import on_device, sliding_window
from segkit.inference.backend_loading import inference_precision
from segkit.inference.backends import TorchBackend
from segkit.inference.decode import Activation, decode, merged
from segkit.inference.on_device import DeviceRows
from segkit.inference.sliding_window import Rows, Slab, plan_windows, predict_slabs
from segkit.preparing.preprocessing import Preparation
from segkit.reading.geometry import reorientation_to
from segkit.reading.volume import Grid
from tests.helpers import write_segmentation_run


class Voxelwise(nn.Module):
    """Two logits of each voxel, which also depend on its place in the window, so that blending matters."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        place = torch.linspace(-1, 1, x[0, 0].numel()).view(x.shape[2:])
        return torch.cat([x[:, :1] * 1.7 - place, place - x[:, -1:]], 1)


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliding_window, "rows_for", DeviceRows)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("blending", ["gaussian", "constant", "half"])
@pytest.mark.parametrize("mirror_axes", [(), (0, 1)])
@pytest.mark.parametrize(("shape", "window"), [((11, 9, 20), (8, 8, 8)), ((3, 5, 9), (4, 4, 4)), ((10, 7), (4, 8))])
def test_logits_are_those_of_the_host(
    blending: Any, mirror_axes: Sequence[int], shape: tuple[int, ...], window: tuple[int, ...], as_on_gpu: None
) -> None:
    image, plan = noise(2, *shape), replace(plan_windows(shape, window, 0.5), blending=blending)
    backend = TorchBackend(Voxelwise())
    found = list(predict_slabs(backend, image, plan, mirror_axes=mirror_axes))
    assert all(isinstance(slab.values, torch.Tensor) for slab in found)
    expected = list(predict_slabs(backend, image, plan, rows=Rows(backend, plan, mirror_axes)))
    assert [(slab.axis, slab.start, slab.stop) for slab in found] == [(s.axis, s.start, s.stop) for s in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)


def test_small_windows_are_computed_in_batches(as_on_gpu: None) -> None:
    network = Voxelwise()
    plan = plan_windows((8, 8, 8), (8, 4, 4), 0.5)
    assert plan.starts == ((0,), (0, 2, 4), (0, 2, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_device, "_VOXELS_AT_ONCE", 2 * 8 * 4 * 4 + 1)
        list(predict_slabs(TorchBackend(network), noise(1, 8, 8, 8), replace(plan, axis=0)))
    assert network.seen == [2, 2, 2, 2, 1]


def test_a_batch_that_has_no_room_is_computed_window_by_window(as_on_gpu: None) -> None:
    class Small(Voxelwise):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 1:
                raise RuntimeError("CUDA out of memory")
            return super().forward(x)

    network, plan = Small(), plan_windows((8, 8, 8), (8, 4, 4), 0.5)
    list(predict_slabs(TorchBackend(network), noise(1, 8, 8, 8), replace(plan, axis=0)))
    assert network.seen == [1] * 9


def test_sums_without_room_are_on_the_cpu(as_on_gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(on_device, "available_memory_gb", lambda _: 1e-6)
    slabs = list(predict_slabs(TorchBackend(Voxelwise()), noise(1, 8, 8, 8), plan_windows((8, 8, 8), (8, 8, 8), 0.5)))
    assert {slab.values.device.type for slab in slabs} == {"cpu"}
    assert "have no room" in caplog.text


def preparation(old: tuple[int, ...], new: tuple[int, ...], **others: Any) -> Preparation:
    grid = Grid(new, np.eye(len(new) + 1))
    turn = reorientation_to(grid, "IJK"[: len(new)])
    return Preparation(grid, turn, ((0,) * len(new), new), old, (1.0,) * len(new), **others)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("new", [(6, 7, 5), (9, 5, 8)])
@pytest.mark.parametrize("others", [{}, {"rounds_to_half": True, "nearest_axis": 1}], ids=str)
@pytest.mark.parametrize("at_once", [1, 2**25])
def test_masks_are_those_of_the_host(
    activation: Activation, new: tuple[int, ...], others: dict[str, Any], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_device, "_PART_VALUES", at_once)
    old, values = (6, 7, 5), (1, 5, 3)
    logits = noise(3, *old)
    if others:
        logits = np.round(logits, 1).astype(np.float16).astype(np.float32)  # with ties
    way = preparation(old, new, **others)
    for axis in range(3):
        whole = Slab(axis, 0, old[axis], logits)
        expected = decode([whole], way, activation, values)
        for depth in (2, 9):
            bounds = [(start, min(start + depth, old[axis])) for start in range(0, old[axis], depth)]
            slabs = [
                replace(part, values=torch.from_numpy(part.values)) for part in (whole.part(*one) for one in bounds)
            ]
            assert np.array_equal(decode(slabs, way, activation, values), expected)


def test_not_a_number_is_refused() -> None:
    logits = torch.zeros(2, 1, 4)
    logits[1, 0, 2] = torch.nan
    with pytest.raises(CheckpointError, match="gave NaN"):
        decode([Slab(0, 0, 1, logits)], preparation((1, 4), (1, 4)), "sigmoid", (1, 2))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("of_logits", [False, True])
def test_members_are_averaged_where_their_logits_are(activation: Activation, of_logits: bool) -> None:
    members = [noise(3, 4, 5) * scale for scale in (1, 2, 3)]

    def mean(arrays: Sequence[Any]) -> Slab:
        (slab,) = merged([iter([Slab(0, 0, 4, array)]) for array in arrays], activation, of_logits=of_logits)
        return slab

    expected, found = mean(members), mean([torch.from_numpy(member) for member in members])
    assert isinstance(found.values, torch.Tensor)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.spread, expected.spread, rtol=1e-5, atol=1e-6)
    mixed = mean([members[0], *map(torch.from_numpy, members[1:])])
    np.testing.assert_array_equal(mixed.logits, expected.logits)


@pytest.mark.parametrize(
    ("trained", "generation", "expected"),
    [("fp32", 9, "fp32"), ("bf16", 9, "bf16"), ("bf16", 7, "fp16"), ("bf16", 6, "fp32"), ("fp16", 9, "fp16")],
)
def test_a_gpu_infers_in_the_precision_of_the_training(
    trained: str, generation: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (generation, 0))
    data = {"identity": "none", "cases": 0, "precision": trained}
    card = load_card(write_segmentation_run(tmp_path, training_data=data))
    assert inference_precision(card, torch.device("cuda", 0)) == expected
    assert inference_precision(card, torch.device("cpu")) == inference_precision(card, torch.device("mps")) == "fp32"
