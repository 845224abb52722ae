"""Threads that each compute some samples of a batch, in place of threads that share the loops of every operation.

The threads of OpenMP wait for each other at the end of every operation, hundreds of times in a training step. If they
sleep there, two cores lose a third of their speed; if they spin, a step beside one other busy process takes several
times as long. Threads with samples of their own wait twice in a step and lose less in both cases (docs/distributed.md
has the times).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from segkit.models.kernels.convolutions import SmallMapsInFloat32
from segkit.models.region_layers import RegionNormLearnable

Output: TypeAlias = Tensor | list[Tensor]
Setting: TypeAlias = Callable[[], AbstractContextManager[None]]


class SampleThreads:
    """Runs a network on a batch (B, *) by as many threads as PyTorch would use for an operation.

    Outputs and gradients are those of the whole batch up to rounding, and the same whichever thread is faster. Where
    that cannot be, the whole batch is computed at once: on GPUs, for one sample or one thread, between several
    processes, and by networks that are compiled or whose samples depend on each other or on random numbers.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor()
        self._network: nn.Module | None = None
        self._replicas: list[nn.Module] = []

    def __call__(self, network: nn.Module, x: Tensor, method: str = "__call__") -> Any:
        """What `method` of the network returns for x: (B, *), or a list of such."""
        run = operator.methodcaller(method, x)
        count = _count(network, x)
        if count < 2:
            return run(network)
        with torch.inference_mode(False):  # tensors that are made in this mode could not be trained
            self._update_replicas(network, count)
        parts = [operator.methodcaller(method, part) for part in x.tensor_split(count)]
        is_cast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        setting = partial(_setting, torch.get_num_threads() // count, dtype, is_guarded=is_cast)
        has_gradients, is_inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        mode = torch.inference_mode if is_inference else partial(torch.set_grad_enabled, has_gradients)
        forward = partial(self._map, partial(setting, is_cast=is_cast, mode=mode), parts)
        if not has_gradients:
            return _joined(forward())
        backward = partial(self._map, setting)
        found = _InThreads.apply(forward, backward, *_trained(network))
        return list(found) if isinstance(found, tuple) else found

    def __deepcopy__(self, memo: dict[int, Any]) -> SampleThreads:
        return SampleThreads()  # a copy of a network has replicas of its own

    def _update_replicas(self, network: nn.Module, count: int) -> None:
        """One network for each thread, with the present weights and modes, and gradients of its own."""
        if network is not self._network or len(self._replicas) != count:
            self._network, self._replicas = network, [copy.deepcopy(network) for _ in range(count)]
        for replica in self._replicas:
            for own, other in zip(replica.parameters(), network.parameters(), strict=True):
                own.data, own.requires_grad, own.grad = other.data, other.requires_grad, None
            for kept, present in zip(replica.buffers(), network.buffers(), strict=True):
                kept.data = present.data
            for module, same in zip(replica.modules(), network.modules(), strict=True):
                module.training = same.training

    def _map(self, setting: Setting, functions: Sequence[Callable[[nn.Module], Any]]) -> list[Any]:
        """The result of each function for its replica, in threads of their own; their errors are raised here."""

        def run(function: Callable[[nn.Module], Any], replica: nn.Module) -> Any:
            with setting():
                return function(replica)

        return list(self._pool.map(run, functions, self._replicas))


def _count(network: nn.Module, x: Tensor) -> int:
    is_alone = x.device.type == "cpu" and not x.requires_grad and not torch.distributed.is_initialized()
    is_compiled = network._compiled_call_impl is not None  # copies of it would not be
    if not is_alone or is_compiled or any(map(_is_of_batch, network.modules())):
        return 1
    return min(len(x), torch.get_num_threads())


def _is_of_batch(module: nn.Module) -> bool:
    """Whether it takes statistics of the batch, keeps what it found in it, or draws random numbers."""
    if isinstance(module, _BatchNorm):
        return module.training or module.running_mean is None
    return isinstance(module, RegionNormLearnable) or (isinstance(module, _DropoutNd) and module.training)


class _InThreads(torch.autograd.Function):
    """The forward pass of every part, and later the backward pass, which adds up their gradients in order."""

    @staticmethod
    def forward(ctx: Any, forward: Callable[[], list[Output]], backward: Callable[..., Any], *_: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.run_backward, ctx.outputs = backward, forward()
        joined = _joined(ctx.outputs)
        return tuple(joined) if isinstance(joined, list) else joined

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        outputs, ctx.outputs = ctx.outputs, None
        sizes = [len(_levels(output)[0]) for output in outputs]
        unused = [None] * len(sizes)
        levels = (unused if gradient is None else torch.split(gradient, sizes) for gradient in gradients)
        parts = zip(*levels, strict=True)
        found = ctx.run_backward([partial(_gradients, *pair) for pair in zip(outputs, parts, strict=True)])
        return None, None, *map(_sum, zip(*found, strict=True))


def _gradients(output: Output, gradients: Sequence[Tensor | None], replica: nn.Module) -> list[Tensor | None]:
    """Gradients of the trained parameters of a replica, from those of its output; None where it was not used."""
    used = [
        (level, gradient) for level, gradient in zip(_levels(output), gradients, strict=True) if gradient is not None
    ]
    torch.autograd.backward([level for level, _ in used], [gradient for _, gradient in used])
    return [parameter.grad for parameter in _trained(replica)]


def _sum(gradients: Iterable[Tensor | None]) -> Tensor | None:
    """The sum, in the first of them; None where a parameter was not used."""
    used = [gradient for gradient in gradients if gradient is not None]
    return reduce(Tensor.add_, used) if used else None


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _levels(output: Output) -> list[Tensor]:
    return output if isinstance(output, list) else [output]


def _joined(outputs: Sequence[Output]) -> Output:
    """The outputs of all parts as that of the whole batch."""
    levels = [torch.cat([level.detach() for level in same]) for same in zip(*map(_levels, outputs), strict=True)]
    return levels if isinstance(outputs[0], list) else levels[0]


@contextmanager
def _setting(
    threads: int,
    dtype: torch.dtype,
    *,
    is_guarded: bool,
    is_cast: bool = False,
    mode: Callable[[], AbstractContextManager[Any]] = torch.enable_grad,
) -> Iterator[None]:
    """What belongs to a thread: the threads of its operations, autocast, and whether gradients are recorded (`mode`).

    A backward pass is guarded without autocast: what it computes again sets autocast itself.
    """
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    guard = SmallMapsInFloat32() if is_guarded else nullcontext()
    with mode(), torch.autocast("cpu", dtype, enabled=is_cast), guard:
        yield
