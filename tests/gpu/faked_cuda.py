"""CUDA tensors without a GPU: in `faked_cuda()` fake tensors lie on `cuda:0`, with CUDA's autocast and a backward pass.

FakeTensorMode alone fails in two places on a machine without a GPU. `autocast("cuda")` switches itself off, by a check
in Python that is replaced here. And the autograd engine asks the CUDA driver for contexts ("hasPrimaryContext expects a
valid device index"), which the library made of `no_driver.c` answers where it is preloaded. Both rest on private names
of torch. The work of the device is done in the calling thread, because multithreading of the engine is off.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.cuda.amp.common
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = torch.device("cuda", 0)
_GUARDS = 8
"""Devices that PyTorch's guard of fake devices has."""


@contextlib.contextmanager
def faked_cuda() -> Iterator[FakeTensorMode]:
    """A mode in which a tensor made on `DEVICE` is a fake one; torch says that there is one GPU."""
    torch._C._ensureCUDADeviceGuardSet()  # the guard that does nothing, which is taken as long as there is no device
    count = ctypes.c_int.in_dll(ctypes.CDLL(None), "fake_device_count")
    engine: Callable[..., Any] = torch.autograd.graph._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        count.value = _GUARDS
        try:
            return engine(*args, **kwargs)
        finally:
            count.value = 0

    with contextlib.ExitStack() as stack:
        for name, replacement in {
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.cuda.is_bf16_supported": lambda *_, **__: True,
            "torch.cuda.get_device_capability": lambda _=None: (9, 0),
            "torch.cuda.device_count": lambda: 1,
            "torch.cuda.current_device": lambda: 0,
            "torch.cuda.synchronize": lambda _=None: None,
            "torch.autograd.graph._engine_run_backward": run_backward,
            "torch.autograd._engine_run_backward": run_backward,
        }.items():
            stack.enter_context(mock.patch(name, replacement))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        mode = stack.enter_context(FakeTensorMode())
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(mock.patch("torch.cuda.is_available", return_value=True))
        yield mode


def to_cuda(module: nn.Module) -> nn.Module:
    """`module.to(DEVICE)`, whose way of exchanging parameters fake tensors do not allow; shared ones stay shared."""
    moved: dict[torch.Tensor, nn.Parameter] = {}
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                if value not in moved:
                    moved[value] = nn.Parameter(value.detach().to(DEVICE), value.requires_grad)
                part._parameters[name] = moved[value]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(DEVICE)
    return module
