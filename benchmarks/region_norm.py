"""Memory and time of region norm beside instance norm: forward and backward on a map of 1 x 64 x 64 x 64 x 64.

Run with `python benchmarks/region_norm.py`; two minutes on one core. Each line is a process of its own, because a peak
of memory can only be read once. Memory is the peak above what the process held with the input, which serves as the
gradient of the output too, after a small map had loaded the kernels; so it holds output, gradient and scratch space.
Time is the best of seven, taken in turn with instance norm, because others may use the machine too. One region is a
box, the third of three a slab at the border, as a hole and a background are.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from segkit.models.kernels.region_norm import Rule, masks_of, normalise_regions
from segkit.models.region_layers import RegionNormBasic, RegionNormLearnable
from segkit.process_memory import current_rss_mb, peak_rss_mb, return_freed_memory

CHANNELS, SIDE, WARM_UP_SIDE, REPEATS = 64, 64, 8, 7

Layer = Callable[[Tensor, Tensor], Tensor]
"""Map and regions 0, 1, 2 to the map of the same shape."""

LAYERS: dict[str, Callable[[], Layer]] = {
    "InstanceNorm3d": lambda: _alone(nn.InstanceNorm3d(CHANNELS)),
    "region_norm, 2 regions": lambda: lambda x, regions: region_norm(x, regions == 1),
    "region_norm, 3 regions": lambda: lambda x, regions: region_norm(x, regions, 3),
    "InstanceNorm3d, affine": lambda: _alone(nn.InstanceNorm3d(CHANNELS, affine=True)),
    "RN-B, 3 regions": lambda: RegionNormBasic(CHANNELS, 3),
    "RN-L": lambda: _alone(RegionNormLearnable(3)),
}


def region_norm(x: Tensor, regions: Tensor, count: int = 2) -> Tensor:
    """Each region normalised by its own mean and deviation, without gain and bias."""
    masks, channels = masks_of(x, regions, count), (x.shape[1], count)
    return normalise_regions(x, masks, masks, masks.new_ones(channels), masks.new_zeros(channels), Rule())


def _alone(layer: nn.Module) -> Layer:
    return lambda x, _: layer(x)


def inputs(side: int, innermost: bool) -> tuple[Tensor, Tensor]:
    """Map (1, C, side, side, side), channels outermost or innermost in memory, and regions (1, 1, side, side, side)."""
    x = torch.randn(1, CHANNELS, side, side, side)
    regions = torch.zeros(1, 1, side, side, side, dtype=torch.uint8)
    regions[..., side // 4 : side // 2, side // 4 : side // 2, side // 4 : side // 2] = 1
    regions[..., : side // 8] = 2
    return x.contiguous(memory_format=torch.channels_last_3d) if innermost else x, regions


def take(layer: Layer, x: Tensor, regions: Tensor) -> float:
    """Seconds of one forward and backward."""
    leaf = x.detach().requires_grad_()
    began = time.perf_counter()
    layer(leaf, regions).backward(x)
    return time.perf_counter() - began


def measure(name: str, innermost: bool) -> tuple[float, float, float]:
    """MiB and seconds of a layer, and seconds of instance norm, in this process."""
    torch.manual_seed(0)
    return_freed_memory(torch.device("cpu"))
    layer = LAYERS[name]()
    take(layer, *inputs(WARM_UP_SIDE, innermost))
    x, regions = inputs(SIDE, innermost)
    if sys.platform == "linux":
        # What the warm-up has freed goes back to the system: else the layer would use it again, uncounted.
        ctypes.CDLL(None).malloc_trim(0)
        # From here on the peak is the present: making the input took more than the input.
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:  # noqa: PTH123  not a file to be replaced
            file.write("5")
    before = current_rss_mb()
    take(layer, x, regions)
    peak = peak_rss_mb()
    seconds = [[take(one, x, regions) for one in (layer, LAYERS["InstanceNorm3d"]())] for _ in range(REPEATS)]
    ours, plain = (min(values) for values in zip(*seconds, strict=True))
    return peak - before, ours, plain


def main() -> None:
    """Print both numbers of every layer, and what multiple of instance norm's they are."""
    print(f"{'channels':10} {'layer':24} {'MiB':>7} {'times':>6} {'seconds':>8} {'times':>6}")
    for innermost in (False, True):
        first = None
        for name in LAYERS:
            command = [sys.executable, __file__, json.dumps([name, innermost])]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            megabytes, seconds, plain = json.loads(done.stdout)
            first = first or megabytes
            order = "innermost" if innermost else "outermost"
            memory, time_ = megabytes / first, seconds / plain
            print(f"{order:10} {name:24} {megabytes:7.0f} {memory:6.2f} {seconds:8.3f} {time_:6.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(*json.loads(sys.argv[1]))))
    else:
        main()
