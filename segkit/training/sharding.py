"""The loss of a batch that is divided between ranks, with the whole network in each rank or a part of it.

Either each rank has the whole network and gradients are averaged (`DistributedDataParallel`), or each has its part of
every weight, gradient, moment of Adam and moving average (`fully_shard`, FSDP2). A unit of the network (`StuNet.units`)
is then gathered while it computes, so a rank holds at most its part and one unit. Checkpoints and models have whole
tensors, as those of a single process.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from segkit.errors import RequestError, some
from segkit.losses.global_batch import spread_batch
from segkit.runtime import Precision
from segkit.training.distributed import Ranks
from segkit.training.task import Batch, Task


class TaskLoss(nn.Module):
    """A task's loss as the forward pass of a module, which data parallelism can wrap."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._task = task

    def forward(self, batch: Batch) -> Tensor:
        """The loss of this rank's part of a batch, a scalar."""
        with spread_batch():
            return self._task.loss(batch)


def data_parallel(task: Task, ranks: Ranks) -> nn.Module:
    """The task's loss of a batch; its backward pass computes the mean gradient of all ranks.

    All ranks start with the weights of rank 0. Batch norms use the statistics of the whole batch on GPUs, and of each
    rank's part on CPUs, where torch has no synchronised batch norm.
    """
    if ranks.size == 1:
        return TaskLoss(task)
    if next(task.model.parameters()).is_cuda:
        task.model = nn.SyncBatchNorm.convert_sync_batchnorm(task.model)  # type: ignore[no-untyped-call]
    return DistributedDataParallel(TaskLoss(task), gradient_as_bucket_view=True)


def accumulating(loss: nn.Module, *, is_last: bool) -> AbstractContextManager[object]:
    """Sum the gradients of several batches in each rank, and exchange the sum after the last one."""
    return nullcontext() if is_last or not isinstance(loss, DistributedDataParallel) else loss.no_sync()


def require_units(network: nn.Module, precision: Precision, ranks: Ranks) -> None:
    """Check that a network can be sharded.

    Raises:
        RequestError: the network has no `units`, there is one process only, or the precision is fp16.
    """
    if ranks.size == 1:
        found = "training.sharding=full shares a network between processes, but there is one"
        raise RequestError(found, remedy="Start more with torchrun or --gpus, or leave it at auto")
    if not hasattr(network, "units"):
        found = f"training.sharding=full does not know the units of {type(network).__name__}"
        expected = "stunet, whose sizes L and H need it"
        raise RequestError(found, expected=expected, remedy="Set training.sharding=none")
    if precision == "fp16":
        raise RequestError("training.sharding=full does not support fp16", remedy="Set training.precision=bf16")


class Shards:
    """A task's sharded network, and the loss that gathers it unit by unit.

    The weights come from rank 0; the networks of the others may be on the meta device. `whole` is the whole network
    without weights, for validation with weights from `lending`.
    """

    def __init__(self, task: Task, device: torch.device, ranks: Ranks, precision: Precision = "fp32") -> None:
        network = task.model
        first = dict(network.state_dict()) if ranks.is_first else {}
        self.whole = copy.deepcopy(network.to("meta"))
        self.loss: nn.Module = TaskLoss(task)
        mesh = init_device_mesh(device.type, (ranks.size,))
        # On GPUs a unit is gathered in the precision that it is computed in: half of the bytes.
        is_half = precision == "bf16" and device.type == "cuda"
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if is_half else MixedPrecisionPolicy()
        for unit in network.units():  # type: ignore[operator]
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        fully_shard(self.loss, mesh=mesh)
        network.to_empty(device=device)
        for name, part in network.state_dict().items():
            given = first.pop(name) if ranks.is_first else torch.empty(part.shape, dtype=part.dtype)
            _take(part, given.to(device), source=0)
            del given

    @contextmanager
    def lending(self, task: Task, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the task use the whole network with these whole weights inside the block."""
        in_parts, task.model = task.model, self.whole
        self.whole.load_state_dict(weights, assign=True)
        try:
            yield
        finally:
            task.model = in_parts
            self.whole.to("meta")


def whole(tree: Any) -> Any:
    """Nested lists and dicts with every tensor whole, in all ranks; all must call it."""
    return _map_tensors(tree, lambda tensor: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def whole_for_first(tree: Any, ranks: Ranks) -> Any:
    """The same in rank 0, sharded tensors gathered in CPU memory one by one; the other ranks get None for them."""

    def gather(tensor: Tensor) -> Tensor | None:
        if not isinstance(tensor, DTensor):
            return tensor
        full = tensor.full_tensor()
        return full.cpu() if ranks.is_first else None

    return _map_tensors(tree, gather)


@torch.no_grad()
def take_parts(into: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Copy each rank's part of whole tensors, which all ranks have.

    Raises:
        RuntimeError: names or shapes differ.
    """
    differing = into.keys() ^ given.keys()
    differing |= {name for name in into.keys() & given.keys() if into[name].shape != given[name].shape}
    if differing:
        raise RuntimeError(f"tensors of other names or shapes: {some(sorted(differing))}")
    for name, part in into.items():
        _take(part, given[name], source=None)


def parts_like(tree: Any, parameters: Mapping[int, Tensor]) -> Any:
    """The state of an optimiser, by number of the parameter, sharded as its parameters are."""

    def part(value: Any, like: Tensor | None) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or not isinstance(like, DTensor):
            return value
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    return {
        number: {key: part(value, parameters.get(number)) for key, value in moments.items()}
        for number, moments in tree.items()
    }


@torch.no_grad()
def _take(part: Tensor, given: Tensor, *, source: int | None) -> None:
    """Copy a part of a whole tensor of rank `source`; None: each rank has the whole tensor."""
    if isinstance(part, DTensor):
        part.copy_(distribute_tensor(given.to(part.device), part.device_mesh, part.placements, src_data_rank=source))
        return
    whole = given.to(part.device)
    if source is not None:
        dist.broadcast(whole, src=source)
    part.copy_(whole)


def _map_tensors(tree: Any, function: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: _map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_map_tensors(value, function) for value in tree)
    return tree
