"""Processes that each compute some samples of a batch, in place of threads that share the loops of every operation.

The threads of OpenMP wait for each other at the end of every operation, hundreds of times in a training step. If they
sleep there, two cores lose a third of their speed; if they spin, a step beside one other busy process takes several
times as long. Processes with samples of their own wait twice in a step and are the fastest in both cases
(docs/distributed.md has the times).
"""

from __future__ import annotations

import copy
import itertools
import logging
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from segkit.errors import SegkitError
from segkit.models.kernels.convolutions import SmallMapsInFloat32
from segkit.models.region_layers import RegionNormLearnable
from segkit.runtime import devices

_log = logging.getLogger(__name__)

Output: TypeAlias = Tensor | list[Tensor]
Levels: TypeAlias = Sequence[Tensor | None]

_SHARED = "shared_at"
"""Attribute of tensors whose memory other processes see: its address."""


@dataclass(frozen=True)
class Mode:
    """How a part of a batch is computed: which method, the threads of an operation, gradients and autocast."""

    method: str
    threads: int
    has_gradients: bool
    dtype: torch.dtype | None
    """Of autocast; None: none."""


class LostProcessError(SegkitError):
    """A process that computed samples has ended, probably because memory ran out."""


class SampleProcesses:
    """Runs a network on a batch (B, *): this process takes the first samples, others that it starts take the rest.

    There are as many processes as PyTorch would use threads for an operation, and at most one for each sample. Outputs
    and gradients are those of the whole batch up to rounding, and the same in every run. Where that cannot be, the
    whole batch is computed at once: on GPUs, beside them (CUDA forbids the fork) and outside Linux; for one sample or
    one thread; in several ranks; and by networks that are compiled or whose samples depend on each other or on random
    numbers.

    The processes see the present values of weights and buffers; the network is copied again whenever anything else
    about it has changed. They end with this object.
    """

    def __init__(self) -> None:
        self._group: _Group | None = None
        self._can_fork = True

    def __call__(self, network: nn.Module, x: Tensor, method: str = "__call__") -> Any:
        """What `method` of the network returns for x: (B, *), or a list of such.

        Raises:
            LostProcessError: one of the processes was killed.
        """
        count = _count(network, x)
        group = self._group_for(network, count) if count > 1 and self._can_fork else None
        if group is None:
            return getattr(network, method)(x)
        is_cast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if is_cast else None
        mode = Mode(method, max(1, torch.get_num_threads() // count), torch.is_grad_enabled(), dtype)
        parts = x.tensor_split(count)
        if not mode.has_gradients:
            return _joined(group.forward(_Call(), mode, parts))
        found = _InProcesses.apply(group, mode, parts, *_trained(network))
        return list(found) if isinstance(found, tuple) else found

    def __deepcopy__(self, memo: dict[int, Any]) -> SampleProcesses:
        return SampleProcesses()

    def _group_for(self, network: nn.Module, count: int) -> _Group | None:
        """The processes for the network as it is now; None if the system starts none."""
        with torch.inference_mode(False):  # tensors that are made in this mode could not be trained
            _share(network)
            wanted = network, count, _state_of(network)
            if self._group is None or self._group.is_broken or self._group.is_of != wanted:
                for other in self._group.others if self._group else ():
                    other.end()
                self._group = None
                try:
                    self._group = _Group(network, count)
                except (OSError, RuntimeError, LostProcessError) as error:
                    self._can_fork = False
                    _log.warning("all samples are computed in one process: %s", error)
        return self._group


def _count(network: nn.Module, x: Tensor) -> int:
    count = min(len(x), torch.get_num_threads())
    is_alone = x.device.type == "cpu" and not x.requires_grad and not torch.distributed.is_initialized()
    is_compiled = network._compiled_call_impl is not None  # copies of it would not be
    if count < 2 or not is_alone or is_compiled or any(map(_is_of_batch, network.modules())):
        return 1
    can_start = sys.platform == "linux" and not multiprocessing.current_process().daemon
    return count if can_start and devices() == ("cpu",) else 1


def _is_of_batch(module: nn.Module) -> bool:
    """Whether it takes statistics of the batch, keeps what it found in it, or draws random numbers."""
    if isinstance(module, _BatchNorm):
        return module.training or module.running_mean is None
    return isinstance(module, RegionNormLearnable) or (isinstance(module, _DropoutNd) and module.training)


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _state_of(network: nn.Module) -> tuple[Any, ...]:
    """All about a network but the values of its tensors."""
    tensors = ((tensor.data_ptr(), tensor.requires_grad) for tensor in _tensors(network))
    return *tensors, *(module.training for module in network.modules())


def _share(network: nn.Module) -> None:
    """Move its tensors to memory that other processes see; anonymous, as /dev/shm is small in containers."""
    for tensor in _tensors(network):
        if getattr(tensor, _SHARED, None) != tensor.data_ptr():
            tensor.data = _shared_like(tensor).copy_(tensor.data)
            setattr(tensor, _SHARED, tensor.data_ptr())


def _shared_like(tensor: Tensor) -> Tensor:
    memory = mmap.mmap(-1, max(1, tensor.nbytes))
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()) if tensor.numel() else tensor.data
    return flat.view(tensor.shape)


class _InProcesses(torch.autograd.Function):
    """The forward pass of every part, and later the backward pass, which adds up their gradients in order."""

    @staticmethod
    def forward(ctx: Any, group: _Group, mode: Mode, parts: Sequence[Tensor], *_: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.group, ctx.mode, ctx.sizes, ctx.call = group, mode, [len(part) for part in parts], _Call()
        joined = _joined(group.forward(ctx.call, mode, parts))
        return tuple(joined) if isinstance(joined, list) else joined

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        unused = [None] * len(ctx.sizes)
        levels = (unused if gradient is None else torch.split(gradient, ctx.sizes) for gradient in gradients)
        return None, None, None, *ctx.group.backward(ctx.call, ctx.mode, list(zip(*levels, strict=True)))


class _Call:
    """One forward pass of a batch; the processes keep its graph as long as this exists."""


class _Group:
    """The parts of a batch: that of this process, and those of the processes that are forked here."""

    def __init__(self, network: nn.Module, count: int) -> None:
        self.is_of = network, count, _state_of(network)
        self.is_broken = False
        """Whether a call was left before all processes had answered."""
        self._own = _Part(network)
        self.others: list[_Other] = []
        self._calls: weakref.WeakKeyDictionary[_Call, int] = weakref.WeakKeyDictionary()
        self._numbers = itertools.count()
        for _ in range(1, count):
            self.others.append(_Other(self._own, self.others))

    def forward(self, call: _Call, mode: Mode, parts: Sequence[Tensor]) -> list[Output]:
        """What the network returns for each part, without graph."""
        self.is_broken, kept = True, list(self._calls.values())
        number = self._calls[call] = next(self._numbers)
        for other, part in zip(self.others, parts[1:], strict=True):
            other.send("forward", mode, number, _packed(part), kept)
        outputs = [self._own.forward(mode, number, parts[0], kept)]
        outputs += [_unpacked(other.receive()) for other in self.others]
        self.is_broken = False
        return outputs

    def backward(self, call: _Call, mode: Mode, gradients: Sequence[Levels]) -> list[Tensor | None]:
        """The sum over parts of the gradients of each trained parameter."""
        self.is_broken, number = True, self._calls.pop(call)
        for other, levels in zip(self.others, gradients[1:], strict=True):
            other.send("backward", mode, number, [_packed(level) for level in levels])
        total = self._own.backward(mode, number, gradients[0])
        for other in self.others:
            for index in other.receive():
                own, found = total[index], other.gradients[index]
                total[index] = found.clone() if own is None else own.add_(found)
        self.is_broken = False
        return total


class _Part:
    """A copy of the network with the same weights, and gradients of its own."""

    def __init__(self, network: nn.Module) -> None:
        self.network = copy.deepcopy(network)
        for own, other in zip(_tensors(self.network), _tensors(network), strict=True):
            own.data = other.data
        self._graphs: dict[int, Output] = {}

    def forward(self, mode: Mode, number: int, x: Tensor, kept: Iterable[int]) -> Output:
        """What the network returns; its graph gets a number, and those that are not among `kept` are dropped."""
        self._graphs = {key: self._graphs[key] for key in kept}
        with _set(mode), nullcontext() if mode.has_gradients else torch.inference_mode():
            output: Output = getattr(self.network, mode.method)(x)
        if not mode.has_gradients:
            return output
        self._graphs[number] = output
        return [level.detach() for level in output] if isinstance(output, list) else output.detach()

    def backward(self, mode: Mode, number: int, gradients: Levels) -> list[Tensor | None]:
        """Gradients of the trained parameters from those of the output; None where a parameter was not used."""
        levels = _levels(self._graphs.pop(number))
        self.network.zero_grad()
        used = [pair for pair in zip(levels, gradients, strict=True) if pair[1] is not None]
        with _set(mode, is_backward=True):
            torch.autograd.backward([level for level, _ in used], [gradient for _, gradient in used])
        return [parameter.grad for parameter in _trained(self.network)]


@contextmanager
def _set(mode: Mode, *, is_backward: bool = False) -> Iterator[None]:
    """The threads of an operation, gradients and autocast.

    A backward pass is guarded without autocast: what it computes again sets autocast itself.
    """
    before, is_cast = torch.get_num_threads(), mode.dtype is not None
    torch.set_num_threads(mode.threads)
    guard = SmallMapsInFloat32() if is_cast else nullcontext()
    try:
        with torch.enable_grad(), torch.autocast("cpu", mode.dtype, enabled=is_cast and not is_backward), guard:
            yield
    finally:
        torch.set_num_threads(before)


class _Other:
    """A process with a part of the batch, seen from the one that started it."""

    def __init__(self, part: _Part, others: Sequence[_Other]) -> None:
        self.gradients = [_shared_like(parameter) for parameter in _trained(part.network)]
        self._connection, end = multiprocessing.Pipe()
        held = [self._connection, *(other._connection for other in others)]
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_serve, args=(end, part, self.gradients, held), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the threads of a training hold no lock needed there
            self._process.start()
        end.close()
        self.end = weakref.finalize(self, _end, self._connection, self._process, os.getpid())
        try:
            self.receive()
        except BaseException:
            self.end()
            raise

    def send(self, *message: object) -> None:
        """Ask for something; see `_answer`."""
        try:
            self._connection.send(message)
        except OSError as error:
            raise self._lost() from error

    def receive(self) -> Any:
        """The answer; an error there is raised here."""
        try:
            answer = self._connection.recv()
        except (OSError, EOFError) as error:
            raise self._lost() from error
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _lost(self) -> LostProcessError:
        self._process.join(1)
        found = f"a process that computed a part of a batch has ended (exit code {self._process.exitcode})"
        remedy = "Probably memory ran out: take a smaller batch or patch; a training continues with --resume"
        return LostProcessError(found, remedy=remedy)


def _end(connection: Connection, process: Any, parent: int) -> None:
    if os.getpid() == parent:  # other processes have copies of the object
        connection.close()
        process.kill()
        process.join()


def _serve(connection: Connection, part: _Part, gradients: Sequence[Tensor], held: Sequence[Connection]) -> None:
    """Compute parts until the first process closes its end of the connection, or ends."""
    for name, handler in (("SIGINT", signal.SIG_IGN), ("SIGUSR1", signal.SIG_IGN), ("SIGTERM", signal.SIG_DFL)):
        signal.signal(getattr(signal, name), handler)
    for other in held:
        other.close()  # else they would stay open when the first process ends

    def answer_all() -> None:
        with suppress(OSError, EOFError):
            connection.send(_found_unable())
            while True:
                connection.send(_answer(part, gradients, *connection.recv()))

    # In a new thread: the threads of OpenMP that the forked one counts on do not exist here.
    thread = threading.Thread(target=answer_all)
    thread.start()
    thread.join()


def _found_unable() -> RuntimeError | None:
    """Why autograd does not work in this process, if torch forbids it: that depends on what ran before the fork."""
    try:
        torch.autograd.backward(torch.zeros((), requires_grad=True))
    except RuntimeError as error:
        return error
    return None


def _answer(
    part: _Part, gradients: Sequence[Tensor], kind: str, mode: Mode, number: int, values: Any, *kept: Any
) -> Any:
    """The packed output of a forward pass, the numbers of parameters with a gradient of a backward one, or an error."""
    try:
        if kind == "forward":
            return _packed(part.forward(mode, number, _unpacked(values), *kept))
        found = enumerate(part.backward(mode, number, _unpacked(values)))
        used = {index: gradient for index, gradient in found if gradient is not None}
        for index, gradient in used.items():
            gradients[index].copy_(gradient)
        part.network.zero_grad()
        return list(used)
    except MemoryError as error:
        return error
    except Exception as error:  # not all can be sent
        return RuntimeError(str(error))


def _packed(value: Any) -> Any:
    """A tensor, None or a list of them as arrays of numpy, which can be sent fast."""
    if isinstance(value, list):
        return [_packed(one) for one in value]
    if value is None or value.dtype != torch.bfloat16:
        return None if value is None else value.numpy()
    return value.dtype, value.view(torch.int16).numpy()  # numpy has no bfloat16


def _unpacked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpacked(one) for one in value]
    if isinstance(value, tuple):
        return torch.from_numpy(value[1]).view(value[0])
    return None if value is None else torch.from_numpy(value)


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _levels(output: Output) -> list[Tensor]:
    return output if isinstance(output, list) else [output]


def _joined(outputs: Sequence[Output]) -> Output:
    """The outputs of all parts as that of the whole batch."""
    levels = [torch.cat(same) for same in zip(*map(_levels, outputs), strict=True)]
    return levels if isinstance(outputs[0], list) else levels[0]
