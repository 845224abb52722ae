"""Host work of an inference window besides the network: blending and decoding on the CPU, or starting them on a GPU.

    OMP_NUM_THREADS=1 python benchmarks/window_cost.py [--side 128]

For each number of outputs: milliseconds of processor time a window in which the host adds up logits and paints labels
(numpy), and those in which it only starts these operations (tensors without contents, on torch's meta device; CUDA adds
some microseconds a launch), with the operations and copies that it starts. The network itself is left out. A scan of
one by two by three windows that overlap by half, resampled to a finer grid.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from segkit.inference.backends import TorchBackend
from segkit.inference.decode import decode
from segkit.inference.on_device import DeviceRows, painted
from segkit.inference.sliding_window import Rows, Slab, WindowPlan, plan_windows
from segkit.preparing.preprocessing import Preparation
from segkit.reading.geometry import reorientation_to
from segkit.reading.volume import Grid

VIEWS = ("view", "slice", "select", "unsqueeze", "expand", "transpose", "unbind", "detach", "alias", "permute")


class Operations(TorchDispatchMode):
    """Counts operations that a GPU would be given; those that only make another view of a tensor are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func).removeprefix("aten.").split(".")[0]
        if name not in VIEWS:
            self.counts["copy" if name == "_to_copy" else "launch"] += 1
        return func(*args, **(kwargs or {}))


class Nothing(nn.Module):
    """Stands for a network: logits without contents."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return windows.new_empty(len(windows), self.outputs, *windows.shape[2:])


def slabs(rows: Rows, image: Any, plan: WindowPlan) -> Any:
    (first, *_), *others = plan.starts
    places = [(first, y, z) for y in others[0] for z in others[1]]
    rows.compute(image, places)
    for begin, logits in rows.finish(plan.window[0]):
        yield Slab(0, begin, begin + logits.shape[1], logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=128)
    side = parser.parse_args().side
    mock.patch("segkit.inference.on_device.available_memory_gb", return_value=float("inf")).start()
    shape = (side, side * 3 // 2, side * 2)
    plan = plan_windows(shape, (side,) * 3, 0.5, axis=0)
    grid = Grid(tuple(round(1.1 * size) for size in shape), np.eye(4))
    way = Preparation(grid, reorientation_to(grid, "IJK"), ((0, 0, 0), grid.shape), shape, (1.0,) * 3)
    image = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    print("outputs  ms a window on the CPU  ms a window to start it  launches a window  copies a case")
    for outputs in (3, 26, 105):
        logits = np.random.default_rng(0).normal(size=(outputs, *plan.window)).astype(np.float32)
        smooth = np.cumsum(logits, 3, dtype=np.float32)  # labels in larger parts, as in scans
        values = tuple(range(outputs))

        began = time.process_time()
        rows = Rows(lambda _: smooth[None], plan, ())  # noqa: B023
        decode(slabs(rows, image, plan), way, "softmax", values)
        on_cpu = (time.process_time() - began) / plan.count

        backend = TorchBackend(Nothing(outputs), "meta")
        table = np.arange(outputs, dtype=np.uint8)

        def started() -> None:
            on_device = DeviceRows(backend, plan, ())  # noqa: B023
            painted(slabs(on_device, image, plan), grid.shape, shape, "softmax", table, way)  # noqa: B023

        started()
        began = time.process_time()
        started()
        to_start = (time.process_time() - began) / plan.count
        with Operations() as operations:
            started()
        launches, copies = operations.counts["launch"] / plan.count, operations.counts["copy"]
        print(f"{outputs:7} {1000 * on_cpu:23.1f} {1000 * to_start:24.1f} {launches:18.1f} {copies:14}")


if __name__ == "__main__":
    main()
