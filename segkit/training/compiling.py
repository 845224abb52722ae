"""`torch.compile` of a network in training, where it becomes one graph; else it is computed as it is, with a notice.

Compiled operations move fewer bytes, which is what limits these networks on a GPU. Names and values of the weights do
not change. `benchmarks/compiling.py` counts the graphs of each network.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from segkit.training.config import LoopConfig

_LONG_STEPS, _LONG_MINUTES = 2000, 30.0
"""Runs for which compiling, a minute or more, is worth its time."""
_BACKEND = "inductor"

T = TypeVar("T")

_log = logging.getLogger(__name__)


def compile_network(model: nn.Module, training: LoopConfig, device: torch.device) -> None:
    """Compile the network of a model at its first step, if the settings ask for it; None: on GPUs, in long runs."""
    budget = training.budget_minutes
    is_long = training.steps >= _LONG_STEPS if budget is None else budget >= _LONG_MINUTES
    if (device.type == "cuda" and is_long) if training.compile is None else training.compile:
        _network(model).compile(fullgraph=True, dynamic=False, backend=_BACKEND)


def is_compiled(model: nn.Module) -> bool:
    """Whether the network of a model is compiled in training."""
    return _network(model)._compiled_call_impl is not None


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, the network is computed as it is: for inference, whose batches differ in size."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


def or_uncompiled(model: nn.Module, compute: Callable[[], T]) -> T:
    """The result of `compute`; if compiling fails there, a warning says why and the network is computed as it is."""
    try:
        return compute()
    except Exception as error:
        if not is_compiled(model) or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        reason = str(error).strip().splitlines()
    _log.warning("the network is not compiled: %s", reason[0] if reason else "torch does not say why")
    _network(model)._compiled_call_impl = None
    model.zero_grad(set_to_none=True)
    return compute()


def _network(model: nn.Module) -> nn.Module:
    """The network that a model of pre-training or inpainting calls, else the model itself."""
    network = getattr(model, "network", model)
    return network if isinstance(network, nn.Module) else model
