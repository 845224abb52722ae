"""The memory of a training run, counted without allocating it.

A training step is traced with fake tensors, which have shapes but no values, and the sizes of all storages that exist
at the same time are added up: activations, recomputed activations, gradients. This works for any network, and includes
the transient peak, unlike a count of saved tensors. Fake tensors report the device of the run, unlike those of the meta
device; networks choose kernels and memory formats by it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segkit.runtime import Precision, autocast

GIB = 1024**3
_FLOAT_BYTES = 4
_PROCESS_BYTES = int(0.92 * GIB)  # the interpreter and the libraries of training and figures; with torch 2.15
_GPU_CONTEXT_BYTES = int(0.6 * GIB)
_KERNEL_BYTES = int(0.18 * GIB)
_KERNEL_SHARE = 0.6
"""Other memory on a CPU: compiled kernels and allocator reserve, and scratch space that grows with the transient part
of a step. Fitted to the peaks of real steps, 24 to 96 voxels, three networks, three memory modes; all are within 15 %
of the fit (torch 2.15, x86)."""
_GAPS, _FEW_GAPS = 2.5, 1.3
"""Largest factors by which kept memory increased the memory of a process; see `has_room_to_keep`."""

Loss = Callable[[Any, Tensor], Tensor]
"""From the training output of a network and labels (B, *spatial) uint8 to a scalar."""


@dataclass(frozen=True)
class Computation:
    """The device of a run and the precision of its forward pass."""

    device: torch.device
    precision: Precision

    @contextmanager
    def faked(self) -> Iterator[None]:
        """Inside, tensors are fake ones on the device.

        The first backward pass of a process counts its devices. With fake tensors it would find one too many, and
        torch would let no forked process train after that (see `SampleProcesses`).
        """
        torch.autograd.backward(torch.zeros((), requires_grad=True))
        with FakeTensorMode(), torch.device(self.device):
            yield

    def autocast(self) -> AbstractContextManager[object]:
        """Inside, operations compute in the precision."""
        return autocast(self.device, self.precision)


ON_CPU = Computation(torch.device("cpu"), "fp32")


def step_bytes(
    build: Callable[[], nn.Module], input_shape: Sequence[int], loss: Loss, computation: Computation = ON_CPU
) -> int:
    """Peak bytes of a forward and backward pass of (B, C, *spatial), without weights, with gradients."""
    with computation.faked():
        return _trace_step(build().train(), input_shape, loss, computation)[1]


def window_bytes(build: Callable[[], nn.Module], input_shape: Sequence[int], computation: Computation = ON_CPU) -> int:
    """Peak bytes of the inference of one window (B, C, *spatial), without weights."""
    with computation.faked():
        return _trace_window(build().eval(), input_shape, computation)


@dataclass(frozen=True)
class StepCost:
    """Bytes of one training step on a patch (weights, saved activations, transient peak) and of an inference window."""

    weights: int
    saved: int
    peak: int
    window: int

    def scaled(self, factor: float) -> StepCost:
        """The cost at `factor` times the voxels; that of weights and their gradients does not change."""
        peak = int((self.peak - self.weights) * factor) + self.weights if self.peak > self.weights else self.peak
        return StepCost(self.weights, int(self.saved * factor), peak, int(self.window * factor))


def step_cost(
    build: Callable[[], nn.Module], input_shape: Sequence[int], loss: Loss, computation: Computation = ON_CPU
) -> StepCost:
    """The cost of training `build()` on patches (B, C, *patch)."""
    with computation.faked():
        network = build().train()
        saved, peak = _trace_step(network, input_shape, loss, computation)
        window = _trace_window(network.eval(), (1, *input_shape[1:]), computation)
        weights = sum(tensor.nbytes for tensor in network.state_dict().values())
        return StepCost(weights, saved, peak, window)


def _trace_step(
    network: nn.Module, input_shape: Sequence[int], loss: Loss, computation: Computation
) -> tuple[int, int]:
    """Bytes that the forward pass saves for the backward pass, and the peak of both."""
    x = torch.empty(tuple(input_shape))
    labels = torch.empty((input_shape[0], *input_shape[2:]), dtype=torch.uint8)
    weights = {_address(tensor) for tensor in network.state_dict(keep_vars=True).values()}
    saved: dict[int, Tensor] = {}  # holds the tensors, because an address must not be used again while counting

    def note(tensor: Tensor) -> Tensor:
        if _address(tensor) not in weights:
            saved[_address(tensor)] = tensor
        return tensor

    with _LiveBytes(network) as live:
        with computation.autocast():
            with saved_tensors_hooks(note, lambda tensor: tensor):
                output = network(x)
            saved_bytes = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
            saved.clear()  # autograd keeps `note`, which would keep all of them until the backward pass is done
            scalar = loss(output, labels)
        del output  # training holds no logits during the backward pass either
        torch.autograd.backward(scalar)
    return saved_bytes, int(live.peak + x.nbytes + labels.nbytes)


def _trace_window(network: nn.Module, input_shape: Sequence[int], computation: Computation) -> int:
    x = torch.empty(tuple(input_shape))
    with torch.no_grad(), _LiveBytes(network) as live, computation.autocast():
        network(x)
    return int(live.peak + x.nbytes)


def has_room_to_keep(arguments: Mapping[str, object], needed_gb: float, memory_gb: float) -> bool:
    """Whether training with these network arguments may keep freed memory, which is faster but takes more.

    Gaps between blocks in use are not always filled again. Measured on whole processes, plain and reversible training,
    with the same sizes at every step, took up to 1.3 times the memory; checkpointing and chunks up to 2.5 times.
    """
    has_gaps = arguments.get("mode") == "checkpoint" or arguments.get("chunks", 1) != 1
    return needed_gb * (_GAPS if has_gaps else _FEW_GAPS) <= memory_gb


@dataclass(frozen=True)
class Volumes:
    """Channels of image and logits, and voxels of the largest prepared case and of the largest file."""

    channels: int
    outputs: int
    prepared_voxels: int
    source_voxels: int


def slab_share(shape: Sequence[int], window: Sequence[int]) -> float:
    """Share of a case of `shape` voxels whose logits are in memory at a time when windows are computed row by row."""
    return min(min(1.0, length / size) for length, size in zip(window, shape, strict=True))


def estimate_memory_gb(
    cost: StepCost,
    volumes: Volumes,
    *,
    slab: float = 1.0,
    has_average: bool = True,
    device: torch.device | None = None,
    shards: int = 1,
    sample_processes: int = 1,
) -> float:
    """Peak memory of a training run in GiB: resident memory of the process, or memory of the GPU.

    It is that of the largest phase: preparing a case, a training step (weights, gradients, two moments of Adam, moving
    average, activations) or a validation. `shards` processes share weights, gradients and optimiser state; in a
    validation each holds all weights, and the first one holds the whole state on the CPU when it writes it. `slab` is
    the `slab_share` of the largest prepared case. Each of `sample_processes` but the first has
    gradients of its own, and hands over a copy.
    """
    copies = 4 if has_average else 3
    kept = cost.weights * copies // shards
    gradients_elsewhere = cost.weights - cost.weights // shards
    training = kept + cost.peak - gradients_elsewhere
    validation = kept + cost.weights + cost.window
    if device is not None and device.type == "cuda":
        return (_GPU_CONTEXT_BYTES + max(training, validation)) / GIB  # logits are blended on the CPU
    # The files of a case as they were read and stacked, and the cropped copy that is normalised.
    source = _FLOAT_BYTES * volumes.source_voxels * (volumes.channels + 1)
    preparation = source + _FLOAT_BYTES * volumes.prepared_voxels * volumes.channels
    training += int(_KERNEL_SHARE * max(cost.peak - cost.saved, 0))
    training += 2 * (sample_processes - 1) * cost.weights if shards == 1 else 0
    # The image; a row of windows of logits and weights, with the finished slab; the mask and its copies.
    rows = int(_FLOAT_BYTES * volumes.prepared_voxels * slab * (volumes.outputs + 1) * 1.5)
    volume = volumes.prepared_voxels * (_FLOAT_BYTES * volumes.channels + 3) + rows
    validation += int(_KERNEL_SHARE * cost.window) + source + volume
    process = _PROCESS_BYTES + min(_KERNEL_BYTES, cost.peak)
    writing = kept + cost.weights * copies if shards > 1 else 0
    return (process + max(preparation, training, validation, writing)) / GIB


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make, while they exist, without those of `network`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known = {_address(tensor) for tensor in network.state_dict(keep_vars=True).values()}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls; it makes nothing
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._known:
            return
        size = storage.nbytes()
        self._known.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
