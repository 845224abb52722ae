"""How much memory a training run takes, found out without taking it.

A training step is played through with fake tensors, which have shapes but no contents, and every storage that is alive
at the same time is added up: activations, what the backward pass recomputes, gradients. This holds for any network, and
it sees the transient peak that counting saved tensors misses. Fake tensors instead of the meta device, because they say
that they lie on the CPU, and networks choose their kernels and memory formats by that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 1024**3

_FLOAT_BYTES = 4

_PROCESS_BYTES = int(0.92 * GIB)
"""The interpreter and the libraries that training loads, those that draw its pictures last; with torch 2.15."""

_GPU_CONTEXT_BYTES = int(0.6 * GIB)

_KERNEL_BYTES = int(0.18 * GIB)
_KERNEL_SHARE = 0.6
"""What storages do not show, on a CPU: compiled kernels and allocator reserve, and scratch space that grows with the
transient part of a step. Fitted to the peak of real steps, 24 to 96 voxels, three networks, three memory modes, of
which this explains all within 15 % (torch 2.15, x86)."""

Loss = Callable[[Any, Tensor], Tensor]
"""A network's training output and labels (B, *spatial) uint8 to a scalar."""


def activation_bytes(build: Callable[[], nn.Module], input_shape: Sequence[int]) -> int:
    """Bytes that one forward pass of (B, C, *spatial) keeps for the backward pass, parameters not counted.

    `build` makes the network; nothing it makes takes memory. Storages are counted once however often they are saved.
    Transient memory of the backward pass is not in it: see `step_bytes`.
    """
    with FakeTensorMode():
        return _forward(build().train(), torch.empty(tuple(input_shape)))[1]


def step_bytes(build: Callable[[], nn.Module], input_shape: Sequence[int], loss: Loss) -> int:
    """Largest number of bytes alive during forward and backward of (B, C, *spatial), without weights, with gradients.

    `build` and `loss` are called with fake tensors and may make tensors of their own.
    """
    with FakeTensorMode():
        return _trace_step(build().train(), input_shape, loss)[1]


def window_bytes(build: Callable[[], nn.Module], input_shape: Sequence[int]) -> int:
    """Largest number of bytes alive while one inference window (B, C, *spatial) is computed, without weights."""
    with FakeTensorMode():
        return _trace_window(build().eval(), input_shape)


def parameter_bytes(build: Callable[[], nn.Module]) -> int:
    """Bytes of a network's parameters and buffers."""
    with FakeTensorMode():
        return _weight_bytes(build())


@dataclass(frozen=True)
class StepCost:
    """Bytes of one training step on a patch: weights, kept activations, transient peak; and of an inference window."""

    weights: int
    saved: int
    peak: int
    window: int

    def scaled(self, factor: float) -> StepCost:
        """The cost at `factor` times the voxels; weights and their gradients stay."""
        peak = int((self.peak - self.weights) * factor) + self.weights if self.peak > self.weights else self.peak
        return StepCost(self.weights, int(self.saved * factor), peak, int(self.window * factor))


def step_cost(build: Callable[[], nn.Module], input_shape: Sequence[int], loss: Loss) -> StepCost:
    """The cost of training `build()` on patches (B, C, *patch): one step and one window are traced, without memory."""
    with FakeTensorMode():
        network = build().train()
        saved, peak = _trace_step(network, input_shape, loss)
        window = _trace_window(network.eval(), (1, *input_shape[1:]))
        return StepCost(_weight_bytes(network), saved, peak, window)


def _trace_step(network: nn.Module, input_shape: Sequence[int], loss: Loss) -> tuple[int, int]:
    """Bytes that the forward pass keeps, and the largest number of bytes alive during forward and backward."""
    x = torch.empty(tuple(input_shape))
    labels = torch.empty((input_shape[0], *input_shape[2:]), dtype=torch.uint8)
    with _LiveBytes(network) as live:
        output, saved = _forward(network, x)
        scalar = loss(output, labels)
        del output  # training holds no logits during the backward pass either
        torch.autograd.backward(scalar)
    return saved, int(live.peak + x.nbytes + labels.nbytes)


def _trace_window(network: nn.Module, input_shape: Sequence[int]) -> int:
    x = torch.empty(tuple(input_shape))
    with torch.no_grad(), _LiveBytes(network) as live:
        network(x)
    return int(live.peak + x.nbytes)


def _forward(network: nn.Module, x: Tensor) -> tuple[Any, int]:
    """The output of a forward pass, and the bytes of the storages, those of `network` left out, that it keeps."""
    weights = {_address(tensor) for tensor in network.state_dict(keep_vars=True).values()}
    saved: dict[int, Tensor] = {}  # holds the tensors, because an address must not be used again while counting

    def note(tensor: Tensor) -> Tensor:
        if _address(tensor) not in weights:
            saved[_address(tensor)] = tensor
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = network(x)
    size = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    saved.clear()  # autograd keeps `note`, which would keep all of them until the backward pass is done
    return output, size


def _weight_bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in network.state_dict().values())


def has_room_to_keep(arguments: Mapping[str, object], needed_gb: float, memory_gb: float) -> bool:
    """Whether training with these network arguments may keep the memory it frees, which is faster but takes more.

    What is freed between blocks that stay is not always filled again. Plain and reversible training, which ask for the
    same sizes at every step, took up to 1.3 times the memory of the whole process so; checkpointing and chunks up to
    2.5 times.
    """
    has_gaps = arguments.get("mode") == "checkpoint" or arguments.get("chunks", 1) != 1
    return needed_gb * (_GAPS if has_gaps else _FEW_GAPS) <= memory_gb


_GAPS, _FEW_GAPS = 2.5, 1.3


@dataclass(frozen=True)
class Volumes:
    """What else is held: channels of image and logits, voxels of the largest prepared case and of the largest file."""

    channels: int
    outputs: int
    prepared_voxels: int
    source_voxels: int


def estimate_memory_gb(
    cost: StepCost,
    volumes: Volumes,
    *,
    has_average: bool = True,
    device: torch.device | None = None,
    shards: int = 1,
) -> float:
    """Peak memory of a training run in GiB: resident memory of the process, or what it takes of a GPU.

    With `shards`, so many processes share the weights and all that is kept for them; for a validation each is lent the
    whole, and the first one has the whole state in the memory of the CPU when it writes it.

    The phases of a run do not come at the same time, so the largest counts: preparing a case, a training step (weights,
    gradients, two moments of Adam, moving average, activations), a validation.
    """
    copies = 4 if has_average else 3
    # The image and its logits, and the sums of weights, planes and labels that blending and decoding need beside them.
    volume = _FLOAT_BYTES * volumes.prepared_voxels * (volumes.channels + volumes.outputs + 2)
    kept = cost.weights * copies // shards
    gradients_elsewhere = cost.weights - cost.weights // shards
    training = kept + cost.peak - gradients_elsewhere
    validation = kept + cost.weights + cost.window + volume
    if device is not None and device.type == "cuda":
        return (_GPU_CONTEXT_BYTES + max(training, validation)) / GIB
    # The files of a case as they were read and stacked, and the cropped copy that is normalised.
    source = _FLOAT_BYTES * volumes.source_voxels * (volumes.channels + 1)
    preparation = source + _FLOAT_BYTES * volumes.prepared_voxels * volumes.channels
    training += int(_KERNEL_SHARE * max(cost.peak - cost.saved, 0))
    validation += int(_KERNEL_SHARE * cost.window) + source
    process = _PROCESS_BYTES + min(_KERNEL_BYTES, cost.peak)
    writing = kept + cost.weights * copies if shards > 1 else 0
    return (process + max(preparation, training, validation, writing)) / GIB


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make, for as long as they live; those of `network` do not count."""

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
