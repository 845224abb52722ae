"""A gradient through a matching: implicit maximum likelihood, as LVM-Med takes it (arXiv 2306.11925, algorithm 1).

A matching is a permutation, and no small change of affinities changes it: its derivative is 0 nearly everywhere.
Implicit maximum likelihood (Niepert et al., arXiv 2106.01798) perturbs the affinities with Gumbel noise, solves, moves
them by lambda times the derivative of the loss, solves again, and takes the difference of both matchings divided by
lambda for the gradient of the affinities.

The second solution need not be computed at the paper's lambda of 80. With the Hamming loss the move adds 80 to every
right pair and takes 80 from every wrong one, and all affinities of 16 nodes with 5 edges each sum up to less than what
one wrong pair then costs: the right matching itself comes out. `solves=2` computes it nevertheless, for small lambdas.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from segkit.config import Config
from segkit.losses.global_batch import batch_rand
from segkit.pretraining.affinity import Affinities
from segkit.pretraining.pygm import solve_with
from segkit.pretraining.solver import SolverConfig, solve

Noise = Literal["gumbel", "margin", "none"]
"""What makes a right matching harder while training. gumbel: noise on all affinities; margin: right pairs lose some of
their affinity (Rolinek et al., arXiv 2003.11657); none: nothing, and nothing is learnt once the matching is right."""


class GradientConfig(Config):
    """How a matching is perturbed, and how its gradient is taken."""

    noise: Noise = "gumbel"
    """gumbel: noise on all affinities (the paper); margin: right pairs lose `margin`; none: neither."""
    temperature: float | None = Field(default=None, ge=0)
    """Factor of the Gumbel noise, whose standard deviation is 1.28; None is 1 for second-order matching, where many
    edges vote, and 0.3 for first-order matching."""
    margin: float = Field(default=1.0, ge=0)
    """What right pairs lose where `noise` is margin."""
    strength: float = Field(default=80.0, gt=0)
    """Lambda: how far affinities are moved along the derivative of the loss."""
    solves: Literal[1, 2] = 1
    """1: the right matching stands for the second solution, which it is from a lambda of about 80 on; 2: computed."""

    def temperature_for(self, order: int) -> float:
        """The factor of the noise for matching of this order, 0 without Gumbel noise."""
        if self.noise != "gumbel":
            return 0.0
        if self.temperature is not None:
            return self.temperature
        return 1.0 if order == 2 else 0.3


def matching_loss(affinities: Affinities, gradient: GradientConfig, solver: SolverConfig) -> Tensor:
    """Mean over graphs of the Hamming loss (equation 5): the right pairs missed and the wrong pairs made.

    Node i of the first view belongs to node i of the second. The value is that of the perturbed matching, the gradient
    that of algorithm 1. Noise is drawn from torch's global generator of the CPU.
    """
    vertex, edge = affinities.vertex, affinities.edge
    right = torch.arange(vertex.shape[1], device=vertex.device).expand(len(vertex), -1)
    perturbed = _perturbed(affinities, gradient, solver.order)
    found = matching_of(perturbed, solver)
    moved = _moved(perturbed, right, gradient.strength)
    target = right if gradient.solves == 1 else matching_of(moved, solver)
    surrogate = (vertex * (_pairs(found, vertex) - _pairs(target, vertex))).sum((1, 2))
    if edge is not None:
        surrogate = surrogate + (edge * (affinities.edges_kept(found) - affinities.edges_kept(target))).sum(
            (1, 2, 3, 4)
        )
    surrogate = surrogate.mean() / gradient.strength
    hamming = 2.0 * (found != right).sum(1).to(vertex.dtype).mean()
    return hamming + surrogate - surrogate.detach()


def matching_of(affinities: Affinities, solver: SolverConfig) -> Tensor:
    """The best matching found: the partner (G, N) int64 of each node, on the device of the affinities."""
    vertex = affinities.vertex.detach()
    edge = None
    if affinities.edge is not None and solver.order == 2:
        edge = affinities.dense_edges(affinities.edge.detach()).cpu().numpy()
    if edge is None or solver.method == "segkit":
        found = solve(vertex.cpu().numpy(), edge, solver)
    else:
        found = solve_with(solver.method, vertex.cpu().numpy(), edge)
    return torch.from_numpy(found).to(vertex.device)


def matching_accuracy(affinities: Affinities, solver: SolverConfig, temperature: float = 0.0) -> float:
    """Share of the nodes whose partner is right, with Gumbel noise of that temperature; 1 / N is chance."""
    gradient = GradientConfig(temperature=temperature)
    found = matching_of(_perturbed(affinities, gradient, solver.order), solver)
    return float((found == torch.arange(found.shape[1], device=found.device)).double().mean())


def _perturbed(affinities: Affinities, gradient: GradientConfig, order: int) -> Affinities:
    """The affinities without gradient, with noise on all of them or without the margin of the right pairs."""
    vertex, edge = affinities.vertex.detach(), affinities.edge
    temperature = gradient.temperature_for(order)
    if gradient.noise == "margin":
        vertex = vertex - gradient.margin * torch.eye(vertex.shape[1], device=vertex.device, dtype=vertex.dtype)
    if edge is not None:
        edge = edge.detach()
    if temperature:
        vertex = vertex + temperature * _gumbel(vertex)
        edge = None if edge is None else edge + temperature * _gumbel(edge)
    return Affinities(vertex, edge, affinities.first, affinities.second)


def _moved(affinities: Affinities, right: Tensor, strength: float) -> Affinities:
    """Moved against the derivative of the Hamming loss, 1 for wrong pairs and -1 for right ones; it knows no edges."""
    vertex = affinities.vertex - strength * (1 - 2 * _pairs(right, affinities.vertex))
    return Affinities(vertex, affinities.edge, affinities.first, affinities.second)


def _pairs(matching: Tensor, like: Tensor) -> Tensor:
    """A matching (G, N) as (G, N, N) of 0 and 1."""
    return torch.zeros_like(like).scatter_(2, matching[:, :, None], 1.0)


def _gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise of that shape, drawn on the CPU, so that every device draws the same."""
    uniform = batch_rand(*like.shape, dtype=torch.float64).clamp_(1e-20, 1 - 1e-12)
    return -(-uniform.log()).log().to(like)
