"""Losses of a batch that is spread over processes: sums, features and random numbers of the whole of it.

Data-parallel training averages the gradients of its processes. Where a loss is a mean over samples of one size, that is
the gradient of the whole batch. Where it is not, as with Dice over the batch, a mean over the voxels of all holes, or
one image against all others, each process has to see what the others have. With the functions here it computes the loss
of the whole batch L(s), where s is a sum (or a gathering) over processes; all have the same L and dL/ds. The gradient
of the whole is the sum over processes of dL/ds ds_r/dw, and as their mean will be taken, each gives `size` times its
own part: backward needs no communication.

Outside of `spread_batch` a batch is whole, in the same process group too: a validation is each process's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_is_spread = ContextVar("is_spread", default=False)


@contextmanager
def spread_batch() -> Iterator[None]:
    """Take batches for parts of one batch, those of the process group in the order of their ranks."""
    token = _is_spread.set(dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    try:
        yield
    finally:
        _is_spread.reset(token)


def batch_sum(of_part: Tensor) -> Tensor:
    """The sum over processes of what each has summed over its part of the batch, of any shape, with a gradient."""
    if not _is_spread.get():
        return of_part
    result: Tensor = _Sum.apply(of_part)
    return result


def batch_gather(part: Tensor) -> Tensor:
    """(B, ...) of each process to (size B, ...) of the whole batch, with a gradient; B is the same everywhere."""
    if not _is_spread.get():
        return part
    result: Tensor = _Gather.apply(part)
    return result


def batch_rand(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(count, *shape) uniform numbers on the CPU: this process's part of those that one process would draw for all.

    The first process draws from torch's global generator, so dropout may have another stream in each.
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
