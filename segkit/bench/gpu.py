"""Whether a device computes what a CPU does, in the planned memory, and how fast: `segkit bench gpu`.

The decisive tables come first: agreement of loss and gradients with a CPU, planned and real memory, then seconds of a
training step, eager and compiled, and of the inference of a scan.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from segkit.inference.backends import TorchBackend
from segkit.inference.decode import decode_prepared
from segkit.inference.on_device import DeviceRows
from segkit.inference.sliding_window import Rows, plan_windows, predict_slabs
from segkit.labels import Output
from segkit.losses.dice_cross_entropy import SegmentationLoss
from segkit.models.table import build_model
from segkit.preparing.memory import Computation, step_bytes
from segkit.runtime import Precision, pick_precision

Row = dict[str, Any]

_CHANNELS = 4
_OUTPUTS = (Output("a", 1, (1, 2, 3)), Output("b", 2, (2, 3)), Output("c", 3, (3,)))
_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
_NETWORKS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    *(("revmbunet", "tiny", {"mode": mode}) for mode in ("plain", "checkpoint", "reversible")),
    *(("stunet", "S", {}), ("r2unet", "tiny", {}), ("plainunet", "tiny", {}), ("inpainter", "tiny", {})),
)
_LOSS_SCALE = 1024.0
"""Of fp16, whose small gradients would become 0."""
_CHANGE = 0.05
"""Deviation that is added to fresh weights: some scales start at 0 and would hide a wrong layer."""


def parity(device: torch.device, side: int) -> Iterator[Row]:
    """Loss and gradients of a step against those of a CPU in float32; the cosine of the gradients should be near 1."""
    for family, size, arguments in _NETWORKS:
        expected_loss, expected = _step(_network(family, size, arguments), Computation(torch.device("cpu"), "fp32"), 32)
        for precision in _PRECISIONS if device.type != "cpu" else _PRECISIONS[:2]:
            loss, found = _step(_network(family, size, arguments), Computation(device, precision), 32)
            cosine = round(float(cosine_similarity(found, expected, dim=0)), 6)
            row = {"table": "parity", "network": f"{family} {size}", **arguments, "precision": precision}
            yield row | {"loss": round(loss, 5), "on_cpu": round(expected_loss, 5), "cosine": cosine}


def memory(device: torch.device, side: int) -> Iterator[Row]:
    """Planned and real peak of a step of one patch, in MB, without weights; for NVIDIA GPUs only."""
    if device.type != "cuda":
        return
    for family, size, arguments in _NETWORKS:
        for precision in _PRECISIONS[:2]:
            computation = Computation(device, precision)
            network = _network(family, size, arguments).to(device)
            _step(network, computation, side)  # chooses kernels and allocates the gradients
            network.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            _step(network, computation, side)
            peak = torch.cuda.max_memory_allocated(device) - before
            shape = (1, _CHANNELS, *(side,) * 3)
            planned = step_bytes(lambda: _network(family, size, arguments), shape, _loss, computation)  # noqa: B023
            row = {"table": "memory", "network": f"{family} {size}", **arguments, "precision": precision}
            yield row | {"planned_mb": round(planned / 1024**2), "peak_mb": round(peak / 1024**2)}


def seconds(device: torch.device, side: int) -> Iterator[Row]:
    """Seconds of a forward and backward pass of one patch in the precision that training chooses."""
    for family, size, arguments in (("revmbunet", "base", {"mode": "plain"}), ("stunet", "S", {})):
        computation = Computation(device, pick_precision("auto", device))
        row = {"table": "seconds", "network": f"{family} {size}", **arguments, "precision": computation.precision}
        for is_compiled in (False, True) if device.type == "cuda" else (False,):
            network = _network(family, size, arguments)
            if is_compiled:
                network.compile(fullgraph=True, dynamic=False)
            began = time.perf_counter()
            _step(network, computation, side)
            first_s = time.perf_counter() - began
            began = time.perf_counter()
            _step(network, computation, side)  # ends with a copy of the gradients, which waits for the device
            times = {"first_s": round(first_s, 3), "seconds": round(time.perf_counter() - began, 3)}
            yield row | {"compiled": is_compiled} | times


def inference(device: torch.device, side: int) -> Iterator[Row]:
    """Seconds of a scan, blended and painted on the device or by the CPU, and the share of equal labels."""
    for outputs in (3, 26, 105):
        network = build_model("stunet", in_channels=_CHANNELS, out_channels=outputs, dims=3, size="S").to(device)
        backend = TorchBackend(network, device, precision=pick_precision("auto", device))
        shape = (side, side * 3 // 2, side * 2)
        image = np.random.default_rng(0).normal(size=(_CHANNELS, *shape)).astype(np.float32)
        plan, masks = plan_windows(shape, (side,) * 3, 0.5), []
        row: Row = {"table": "inference", "outputs": outputs, "windows": plan.count, "precision": backend.precision}
        for name, rows in (("device_s", DeviceRows), ("host_s", Rows)):
            for _ in range(2):  # the first run chooses kernels
                began = time.perf_counter()
                slabs = predict_slabs(backend, image, plan, rows=rows(backend, plan, ()))
                masks.append(decode_prepared(slabs, shape, "softmax", range(outputs)))
                row[name] = round(time.perf_counter() - began, 3)
        yield row | {"equal": round(float((masks[1] == masks[3]).mean()), 6)}


TABLES: dict[str, Callable[[torch.device, int], Iterator[Row]]] = {
    "parity": parity,
    "memory": memory,
    "seconds": seconds,
    "inference": inference,
}
"""Table name -> the function that measures it row by row, for a device and the side of a patch in voxels."""


def _network(family: str, size: str, arguments: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    network = build_model(family, in_channels=_CHANNELS, out_channels=3, dims=3, size=size, **arguments)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(_CHANGE * torch.randn_like(parameter))
    return network


def _loss(*given: Any) -> Tensor:
    loss: Tensor = SegmentationLoss("sigmoid", _OUTPUTS)(*given)
    return loss


def _step(network: nn.Module, computation: Computation, side: int) -> tuple[float, Tensor]:
    """Loss and all gradients (N,) float64 on the CPU, of one patch of noise, the same on every device."""
    device = computation.device
    network = network.to(device).train()
    network.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(0)
    sides = [max(side, 2 * step) for step in network.divisor]  # type: ignore[union-attr]
    image = torch.randn(1, _CHANNELS, *sides, generator=generator).to(device)
    labels = torch.randint(0, 4, (1, *sides), generator=generator, dtype=torch.uint8).to(device)
    loss_function = SegmentationLoss("sigmoid", _OUTPUTS).to(device)
    with computation.autocast():
        loss = loss_function(network(image), labels)
    scale = _LOSS_SCALE if computation.precision == "fp16" else 1.0
    torch.autograd.backward(loss * scale)
    of_each = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return float(loss.detach()), torch.cat([gradient.flatten().cpu().double() / scale for gradient in of_each])
