"""A network in parts: each process keeps its part of every weight, gradient, moment of Adam and moving average.

PyTorch's `fully_shard` (FSDP2). A unit of the network (`StuNet.units`) is put together when it computes, forward and
backward, and taken apart again behind it, so a process never holds more than its part and one unit, and between steps
only its part. What leaves the training is whole: the state has the tensors of a single process, and so has the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from segkit.errors import RequestError
from segkit.training.distributed import LossOfPart, is_first, size
from segkit.training.task import Task


def require_units(network: nn.Module, precision: torch.dtype) -> None:
    """Refuse what cannot be trained in parts.

    Raises:
        RequestError: the network does not name its units, there is one process only, or arithmetic is fp16.
    """
    if size() == 1:
        raise RequestError(
            "training.sharding=full shares a network between processes, but there is one",
            remedy="Start more with torchrun or --gpus, or leave it at auto",
        )
    if not hasattr(network, "units"):
        raise RequestError(
            f"training.sharding=full does not know the units of {type(network).__name__}",
            expected="stunet, whose sizes L and H need it",
            remedy="Set training.sharding=none",
        )
    if precision == torch.float16:
        raise RequestError("training.sharding=full has no scaled losses", remedy="Set training.precision=bf16")


class Shards:
    """A task's network in parts, with the loss that puts it together unit by unit.

    The network of the first process has weights, which are handed out; those of the others may lie on the meta device.
    `whole` is the network as one, without weights: it validates with those that it is lent.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        network = task.model
        first = dict(network.state_dict()) if is_first() else {}
        self.whole = copy.deepcopy(network.to("meta"))
        self.loss: nn.Module = LossOfPart(task)
        mesh = init_device_mesh(device.type, (size(),))
        for unit in network.units():  # type: ignore[operator]
            fully_shard(unit, mesh=mesh)
        fully_shard(self.loss, mesh=mesh)
        network.to_empty(device=device)
        for name, part in network.state_dict().items():
            given = first.pop(name) if is_first() else torch.empty(part.shape, dtype=part.dtype)
            _take(part, given.to(device), source=0)
            del given

    @contextmanager
    def lending(self, task: Task, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The task with the network as one, which has these whole weights for a while."""
        in_parts, task.model = task.model, self.whole
        self.whole.load_state_dict(weights, assign=True)
        try:
            yield
        finally:
            task.model = in_parts
            self.whole.to("meta")


def whole(tree: Any) -> Any:
    """A nest of lists and dicts with every tensor whole, in all processes; all have to ask."""
    return _mapped(tree, lambda tensor: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def whole_for_first(tree: Any) -> Any:
    """The same in the memory of the CPU, one tensor after the other, with nothing in place of tensors in the others."""

    def gather(tensor: Tensor) -> Tensor | None:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return full.cpu() if is_first() else None

    return _mapped(tree, gather)


@torch.no_grad()
def take_parts(into: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Let each process take its part of whole tensors that all have.

    Raises:
        RuntimeError: they are others by name or shape, as `nn.Module.load_state_dict` has it.
    """
    if into.keys() != given.keys() or any(into[name].shape != given[name].shape for name in into):
        raise RuntimeError("tensors of other names or shapes")
    for name, part in into.items():
        _take(part, given[name], source=None)


def parts_like(tree: Any, parameters: Mapping[int, Tensor]) -> Any:
    """The state of an optimiser, by number of the parameter, in parts as its parameters are."""
    return {
        number: {
            key: _part(value, parameters[number]) if isinstance(value, Tensor) and value.dim() else value
            for key, value in moments.items()
        }
        for number, moments in tree.items()
    }


def _part(value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def _take(part: Tensor, given: Tensor, *, source: int | None) -> None:
    """Fill a tensor with its part of a whole one: that of the process `source`, or None where each has it."""
    if isinstance(part, DTensor):
        part.copy_(distribute_tensor(given.to(part.device), part.device_mesh, part.placements, src_data_rank=source))
        return
    whole = given.to(part.device)
    if source is not None:
        dist.broadcast(whole, src=source)
    part.copy_(whole)


def _mapped(tree: Any, function: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: _mapped(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(value, function) for value in tree)
    return tree
