"""Sums, features and random numbers of a batch that is spread over processes.

Data-parallel training averages the gradients of its processes, which is the gradient of the whole batch if the loss is
a mean over samples of one size. For other losses (Dice over the batch, a mean over the voxels of all holes, one image
against all others) each process computes the loss of the whole batch L(s), where s is a sum or a gathering over
processes; all have the same L and dL/ds. The gradient of the whole is the sum over processes of dL/ds ds_r/dw, and
because their mean is taken, each gives `size` times its own part: backward needs no communication.

Outside of `spread_batch` a batch is not spread, also within a process group: each process validates on its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

_is_spread = ContextVar("is_spread", default=False)


@contextmanager
def spread_batch() -> Iterator[None]:
    """Treat batches as parts of one batch, those of the process group in the order of their ranks."""
    token = _is_spread.set(dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    try:
        yield
    finally:
        _is_spread.reset(token)


def batch_sum(*sums: Tensor) -> tuple[Tensor, ...]:
    """Sums over the whole batch, with a gradient, of each process's sums over its part; all of one shape and type."""
    return cast(Tensor, _Sum.apply(torch.stack(sums))).unbind() if _is_spread.get() else sums


def batch_gather(part: Tensor) -> Tensor:
    """(B, ...) of each process to (size B, ...) of the whole batch, with a gradient; B is the same everywhere."""
    return cast(Tensor, _Gather.apply(part)) if _is_spread.get() else part


def batch_rand(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(count, *shape) uniform numbers on the CPU: this process's part of the numbers for the whole batch.

    The first process draws them from torch's global generator; the generators of the others may differ.
    """
    if not _is_spread.get():
        return torch.rand(count, *shape, dtype=dtype)
    rank, size = dist.get_rank(), dist.get_world_size()
    make = torch.rand if rank == 0 else torch.empty
    numbers = make(size * count, *shape, dtype=dtype)
    dist.broadcast(numbers, src=0)
    return numbers[rank * count : (rank + 1) * count]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, of_part: Tensor) -> Tensor:
        total = of_part.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * dist.get_world_size()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.detach().contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.chunk(dist.get_world_size())[dist.get_rank()] * dist.get_world_size()
