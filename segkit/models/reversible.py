"""Reversible sequences: block inputs are recomputed from outputs, so memory does not grow with depth.

Additive coupling (Gomez et al. 2017, "The Reversible Residual Network", section 3.1): channels split in halves,
y1 = x1 + F(x2), y2 = x2 + G(y1); inverse x2 = y2 - G(y1), x1 = y1 - F(x2). Backward:
dx1 = dy1 + J_G(y1)^T dy2 and dx2 = dy2 + J_F(x2)^T dx1.

One autograd Function covers a whole sequence and saves only its output. Parameters are passed to it explicitly, so
frozen parameters, inputs without gradient, `torch.autograd.grad`, accumulation and DDP behave as with plain layers.
Under autocast the stream between blocks stays in float32: sums in bfloat16 lose the bits that the inversion needs.
With `torch.compile` F and G must not contain dropout: their two compiled passes may draw different numbers. Double
backward and torch.func transforms need mode "plain".
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from segkit.models.blocks import checkpointed, is_stochastic, without_statistics

Mode = Literal["plain", "checkpoint", "reversible"]
"""Memory mode of a sequence: keep every activation, one per block, or one per sequence."""


class ReversibleBlock(nn.Module):
    """One coupling of two shape-preserving modules `f` and `g`, each on half of the channels."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.g = g

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Halves (B, C/2, *spatial) to halves of the same shape."""
        y1 = x1 + self.f(x2)
        return y1, x2 + self.g(y1)


class ReversibleSequence(nn.Module):
    """Reversible blocks in a row on (B, C, *spatial), C even; the mode changes memory, never weights or results."""

    def __init__(self, blocks: Sequence[ReversibleBlock], mode: Mode = "reversible") -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"mode {mode!r} is not one of {', '.join(get_args(Mode))}")
        self.blocks = nn.ModuleList(blocks)
        self.mode: Mode = mode

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) to the same shape.

        Raises:
            ValueError: C is odd.
        """
        if not len(self.blocks):
            return x
        if x.shape[1] % 2:
            raise ValueError(f"a reversible sequence splits channels in halves, but got {x.shape[1]} channels (odd)")
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()
        parameters = [parameter for block in self.blocks for parameter in block.parameters()]
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))
        if needs_grad and self.mode == "reversible":
            return cast(Tensor, _Reversible.apply(tuple(self.blocks), x, *parameters))
        x1, x2 = x.chunk(2, dim=1)
        for block in self.blocks:
            if needs_grad and self.mode == "checkpoint":
                x1, x2 = checkpointed(block, x1, x2, within=block)
            else:
                x1, x2 = block(x1, x2)
        return torch.cat((x1, x2), dim=1)


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: tuple[ReversibleBlock, ...], x: Tensor, *parameters: Tensor) -> Tensor:
        draws = any(is_stochastic(block) for block in blocks)
        ctx.blocks = blocks
        ctx.autocast = {
            "device_type": x.device.type,
            "enabled": torch.is_autocast_enabled(x.device.type),
            "dtype": torch.get_autocast_dtype(x.device.type),
            "cache_enabled": False,
        }
        ctx.random_states = []
        x1, x2 = x.chunk(2, dim=1)
        for block in blocks:
            for name in ("f", "g"):
                if draws:
                    ctx.random_states.append(_random_state(x.device))
                # Not in place: the skip connection may hold the tensor that a half is a view of.
                if name == "f":
                    x1 = x1 + block.f(x2)
                else:
                    x2 = x2 + block.g(x1)
        y = torch.cat((x1, x2), dim=1)
        # Saved as an output, so that a later in-place edit raises instead of corrupting the inversion.
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        y1, y2 = y.detach().chunk(2, dim=1)
        d1, d2 = grad.chunk(2, dim=1)
        states = list(ctx.random_states)
        gradients: list[tuple[Tensor | None, ...]] = []
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(**ctx.autocast))
            for block in reversed(ctx.blocks):
                stack.enter_context(without_statistics(block))
                g_state = states.pop() if states else None
                f_state = states.pop() if states else None
                y2, d1, g_gradients = _undo(block.g, y1, y2, d1, d2, g_state)
                y1, d2, f_gradients = _undo(block.f, y2, y1, d2, d1, f_state)
                gradients.append((*f_gradients, *g_gradients))
        dx = torch.cat((d1, d2), dim=1) if ctx.needs_input_grad[1] else None
        return None, dx, *(gradient for block in reversed(gradients) for gradient in block)


def _undo(
    function: nn.Module, given: Tensor, result: Tensor, d_given: Tensor, d_result: Tensor, random_state: Any
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Undo `result = x + function(given)`: x, the gradient of `given`, and those of the parameters (frozen: None)."""
    parameters = list(function.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    given = given.detach().requires_grad_()
    with torch.enable_grad(), _random_state_of(random_state, given.device):
        output = function(given)
    found = torch.autograd.grad(output, [given, *trained], d_result.to(output.dtype), allow_unused=True)
    of_trained = iter(found[1:])
    of_parameters = tuple(next(of_trained) if parameter.requires_grad else None for parameter in parameters)
    d_total = d_given if found[0] is None else d_given + found[0]
    return result - output.detach(), d_total, of_parameters


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _random_state_of(state: tuple[Tensor, Tensor | None] | None, device: torch.device) -> Iterator[None]:
    """Draw the same random numbers as in the forward pass, then restore the generators."""
    if state is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
