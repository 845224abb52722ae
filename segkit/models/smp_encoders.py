"""Access to segmentation-models-pytorch: encoder names, networks with or without contents, safe batch norms.

The library is imported inside functions, so that segkit also runs without it or without a matching torchvision.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

_TIMM = "tu-"
"""Prefix of the encoders that come from timm."""


def require_known_encoder(name: str) -> None:
    """Check that the library has an encoder `name`: one of its own, or "tu-" and the name of a timm network.

    Raises:
        ValueError: it has none (the message names close matches), or the library cannot be imported.
    """
    encoders = _library().encoders
    import timm

    own: list[str] = encoders.get_encoder_names()
    if name in own or encoders.is_equivalent_to_timm_universal(name):
        return
    if name.startswith(_TIMM) and timm.is_model(name.removeprefix(_TIMM).partition(".")[0]):
        return
    known = [*own, *(_TIMM + model for model in timm.list_models())]
    close = difflib.get_close_matches(name, known, n=4)
    hint = f"close are {', '.join(close)}" if close else f"known are {', '.join(own[:8])} and more, also tu-<timm name>"
    raise ValueError(f"encoder {name!r} is not known; {hint}")


def build_library_network(
    architecture: str, encoder: str, encoder_weights: str | None, options: Mapping[str, object]
) -> nn.Module:
    """The library's network of class `architecture`; nothing is downloaded if `encoder_weights` is None.

    On the meta device or with fake tensors it has shapes but no contents, and nothing is downloaded.

    Raises:
        ValueError: the library rejects the options, has no such weights or cannot download them.
    """
    kind = getattr(_library(), architecture)

    def make(weights: object) -> nn.Module:
        network: nn.Module = kind(encoder_name=encoder, encoder_weights=weights, **options)
        return network

    try:
        if not _has_contents():
            return _without_contents(lambda: make(None))
        # timm has the weights in the network's name and takes a boolean.
        return make(True if encoder_weights and encoder.startswith(_TIMM) else encoder_weights)
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{architecture} on {encoder} cannot be built: {str(error) or type(error).__name__}"
        ) from error


@dataclass(frozen=True)
class Sketch:
    """Result of a training step without contents: shapes of image, logits and tensors, and unused parameters."""

    image: tuple[int, ...]
    logits: tuple[int, ...]
    tensors: Mapping[str, tuple[int, ...]]
    unused: frozenset[str]


def sketch(make: Callable[[], nn.Module], images: Callable[[nn.Module], Sequence[tuple[int, ...]]]) -> Sketch:
    """Run one training step of a network on the meta device, without allocating memory.

    `images` gives shapes (B, C, H, W) for the network; the first that works is taken.

    Raises:
        ValueError: none of them works; the message is about the last.
    """
    with unset_fake_temporarily(), torch.device("meta"), torch.inference_mode(mode=False), torch.enable_grad():
        network = _without_contents(make).train()
        *others, last = images(network)
        for image in (*others, last):
            try:
                logits: Tensor = network(torch.empty(image))
                break
            except (AssertionError, RuntimeError) as error:
                if image == last:
                    raise ValueError(f"images of {image[-2]} x {image[-1]} pixels fail: {error}") from error
        torch.autograd.backward(logits.sum())
        tensors = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    unused = frozenset(name for name, parameter in network.named_parameters() if parameter.grad is None)
    return Sketch(image, tuple(logits.shape), tensors, unused)


def make_single_values_safe(network: nn.Module) -> None:
    """Let batch norms that get a single value per channel in training use their running statistics for that pass.

    A batch of one has one value per channel if the deepest map is 1 x 1, and after global pooling (DeepLab). torch
    rejects it, because one value has no variance; evaluation uses running statistics too.
    """
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(_leave_training_for_one_value)
            module.register_forward_hook(_return_to_training, always_call=True)


def _leave_training_for_one_value(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if module.training and inputs[0].numel() == inputs[0].shape[1] and isinstance(module.running_mean, Tensor):
        module.training, module.is_interrupted = False, True  # type: ignore[assignment]


def _return_to_training(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
    if getattr(module, "is_interrupted", False):
        module.training, module.is_interrupted = True, False  # type: ignore[assignment]


def _library() -> Any:
    try:
        import segmentation_models_pytorch
    except (ImportError, RuntimeError) as error:  # RuntimeError: torch and torchvision do not match
        raise ValueError(
            f"segmentation-models-pytorch cannot be imported ({error}); "
            "install it, with a torchvision that was made for the torch at hand"
        ) from error
    return segmentation_models_pytorch


def _has_contents() -> bool:
    probe = torch.empty(0)
    return not probe.is_meta and not isinstance(probe, FakeTensor)


def _without_contents(make: Callable[[], nn.Module]) -> nn.Module:
    """`make()` with tensors of the surrounding device or mode, without allocating memory.

    The library reads numbers from tensors while it builds networks and always places some weights on the CPU, so the
    network is built on the meta device, and then each tensor is replaced by one of its shape.
    """
    with unset_fake_temporarily(), torch.device("meta"), _RatesOnCpu():
        network = make()
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return network


class _RatesOnCpu(TorchFunctionMode):
    """Give `linspace` contents: rates of stochastic depth are read from one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({"device": "cpu", **kwargs} if func is torch.linspace else kwargs))
