"""Graphs of each network under `torch.compile`, and whether the compiled network equals the network as it is.

    python benchmarks/compiling.py [FAMILY ...] [--backend inductor]

The table has graphs and breaks of a training forward pass, and the largest difference of logits and of gradients to
those without compiling, relative to the largest value, on a CPU in float64, where rounding does not hide an error. One
graph is needed for training.compile.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from segkit.models.table import MODELS, build_model
from tests.smallest import SMALLEST

MODES: tuple[dict[str, Any], ...] = ({"mode": "plain"}, {"mode": "checkpoint"}, {"mode": "reversible"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(MODELS), metavar="FAMILY")
    parser.add_argument("--backend", default="inductor", help="aot_eager: without generated code, in a minute")
    parser.add_argument("--float32", action="store_true", help="with the rounding of a training")
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.float32 if arguments.float32 else torch.float64)
    logging.disable(logging.WARNING)  # dynamo logs each break
    print(f"{'network':34} {'graphs':>6} {'breaks':>6} {'logits':>8} {'gradients':>9} {'seconds':>7}")
    for family in arguments.families:
        for others in MODES if family == "revmbunet" else ({},):
            dims = MODELS[family].dims[-1]
            name = " ".join([family, f"{dims}D", *others.values()])
            began = time.monotonic()
            graphs, breaks = explained(family, dims, others)
            differences = ["-", "-"]
            if graphs == 1 and not breaks:
                differences = [f"{one:.1e}" for one in compared(family, dims, others, arguments.backend)]
            seconds = time.monotonic() - began
            print(f"{name:34} {graphs:6} {breaks:6} {differences[0]:>8} {differences[1]:>9} {seconds:7.0f}", flush=True)


def explained(family: str, dims: int, others: dict[str, Any]) -> tuple[int, int]:
    """Graphs of a training forward pass, and breaks between them."""
    torch._dynamo.reset()
    network, image = made(family, dims, others)
    found = torch._dynamo.explain(network)(image)
    return found.graph_count, found.graph_break_count


def compared(family: str, dims: int, others: dict[str, Any], backend: str) -> Iterator[float]:
    """Largest relative difference of logits and of gradients between the compiled network and the network as it is."""
    torch._dynamo.reset()
    found = []
    for is_compiled in (False, True):
        network, image = made(family, dims, others)
        if is_compiled:
            network.compile(fullgraph=True, dynamic=False, backend=backend)
        torch.manual_seed(1)  # of dropout
        logits = network(image)
        logits = logits if isinstance(logits, list) else [logits]
        torch.autograd.backward(sum(level.square().mean() for level in logits))
        gradients = [one.grad.flatten() for one in network.parameters() if one.grad is not None]
        found.append((torch.cat([level.detach().flatten() for level in logits]), torch.cat(gradients)))
    for expected, given in zip(*found, strict=True):
        yield difference(expected, given)


def difference(expected: Tensor, given: Tensor) -> float:
    return float((expected - given).abs().max() / expected.abs().max())


def made(family: str, dims: int, others: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """A small network in training mode, with weights that leave no layer at zero, and an image."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {**SMALLEST[family], **others}
    network = build_model(family, in_channels=2, out_channels=2, dims=dims, **arguments).train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network, torch.randn(2, 2, *(max(16, 2 * side) for side in network.divisor))


if __name__ == "__main__":
    main()
