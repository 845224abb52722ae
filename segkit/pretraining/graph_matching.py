"""Pre-training by matching graphs of images: LVM-Med (Nguyen et al. 2023, arXiv 2306.11925).

Each image of a group is shown in two random views. The images are the nodes of two graphs, one for each view, and a
matching pairs the nodes of both. The encoder learns features by which an image finds its own other view: globally, cell
by cell, and by its relations to other images (`affinity.py`). The authors released no code for this part; own choices
are marked. Choices of ours are also: random first weights (theirs: ImageNet, or SAM for the transformer), groups of one
source of which half are neighbours in one subject, views mirrored along all axes, crops of volumes as images. They
learnt from 1.3 million images in 100 epochs; a run on a CPU sees some ten thousand.

The derivative of a matching, a permutation, is 0 nearly everywhere. Implicit maximum likelihood (algorithm 1; Niepert
et al., arXiv 2106.01798) perturbs the affinities with Gumbel noise, solves, moves them by lambda times the derivative
of the loss, solves again, and takes the difference of both matchings divided by lambda as the affinities' gradient.
At the paper's lambda of 80 the second solution is the right matching: with the Hamming loss every right pair gains 80
and every wrong one loses 80, more than all affinities of 16 nodes with 5 edges each.
"""

import math
from dataclasses import replace
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from segkit.config import Config
from segkit.losses.global_batch import batch_rand
from segkit.models.blocks import SegmentationNetwork
from segkit.models.sample_processes import SampleProcesses
from segkit.pretraining import affinity
from segkit.pretraining.affinity import Affinities, MessagePassing
from segkit.pretraining.encoder import freeze_decoder, retrieval_accuracy
from segkit.pretraining.overlap import view_overlaps
from segkit.pretraining.solver import SolverConfig, solve
from segkit.pretraining.views import cell_positions
from segkit.training.task import Batch


class GradientConfig(Config):
    """How a matching is perturbed, and how its gradient is taken."""

    noise: Literal["gumbel", "margin", "none"] = "gumbel"
    """What makes a right matching harder while training. gumbel: noise on all affinities (the paper); margin: right
    pairs lose `margin` (Rolinek et al., arXiv 2003.11657); none: neither, so training stops once a matching is
    right."""
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


class GraphMatchingConfig(Config):
    """Graphs, affinities, solver and gradient; the defaults are the paper's where it names them."""

    nodes: int = Field(default=16, ge=2)
    """Images of a graph."""
    edges: int = Field(default=5, ge=1)
    """Nearest neighbours that each node is joined with."""
    width: int = Field(default=128, ge=1)
    """Features of a node."""
    layers: int = Field(default=2, ge=0)
    """Graph convolutions; 0 passes no messages."""
    residual: bool = True
    """Whether a node adds the messages to its own features; off is the paper's equation to the letter."""
    global_share: float = Field(default=0.8, ge=0, le=1)
    """Alpha: the part of the global affinity in that of two nodes; the rest is the local one, and 1 switches it off."""
    best_matches: int = Field(default=20, ge=1)
    """Gamma: matched cells of each kind that count locally. The paper gives no number; 20 is that of VICRegL, from
    which its local terms come (Bardes et al., arXiv 2210.01571)."""
    cells: int = Field(default=64, ge=1)
    """Most cells of a feature map that are compared; larger maps are averaged to fewer cells, because the cost grows
    with the square."""
    both_ways: bool = True
    """Whether cells of both views are matched to the other view (equation 3), or those of the first alone."""
    weight_by_overlap: bool = False
    """Whether a wrong pair counts only by the part of its views that does not overlap (our addition)."""
    gradient: GradientConfig = GradientConfig()
    solver: SolverConfig = SolverConfig()


class GraphMatching(nn.Module):
    """The network with a projector and message passing on top of its encoder, and the matching loss."""

    views = 2
    score = "matching"
    keeps_decoder = False

    def __init__(self, network: SegmentationNetwork, config: GraphMatchingConfig, in_channels: int, dims: int) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self._processes = SampleProcesses()
        self.projector = nn.Linear(freeze_decoder(network, in_channels, dims), config.width)
        self.passing = MessagePassing(config.width, config.layers, residual=config.residual)

    def loss(self, batch: Batch) -> Tensor:
        """Hamming loss of the perturbed matching, with the gradient of `matching_loss`."""
        affinities, _, _ = self.affinities(batch)
        overlaps = view_overlaps(batch, self.config.nodes) if self.config.weight_by_overlap else None
        return matching_loss(affinities, self.config.gradient, self.config.solver, overlaps)

    @torch.no_grad()
    def measures(self, batch: Batch) -> dict[str, float]:
        """`matching`: share of nodes matched rightly without noise, `noisy` with that of the training.

        `retrieval`: share of images whose nearest view, among all of the batch, is their own.
        """
        affinities, first, second = self.affinities(batch)
        solver = self.config.solver
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            noisy = matching_accuracy(affinities, solver, self.config.gradient.temperature_for(solver.order))
        retrieval = retrieval_accuracy(*(features.flatten(0, 1).cpu().numpy() for features in (first, second)))
        return {"matching": matching_accuracy(affinities, solver), "noisy": noisy, "retrieval": retrieval}

    def affinities(self, batch: Batch) -> tuple[Affinities, Tensor, Tensor]:
        """The affinities of the graphs of a batch, and the projected features (G, N, F) of both views."""
        count = len(batch["first"])
        maps = self._processes(self.network, torch.cat([batch["first"], batch["second"]]), "encode")[-1]
        with torch.autocast(maps.device.type, enabled=False):  # sums of differences of cosines need all their digits
            maps = maps.float()
            projected = self.projector(maps.flatten(2).mean(2))
            first, second = (self._by_graph(part) for part in projected.split(count))
            return self._affinities(first, second, maps, batch), first, second

    def _affinities(self, first: Tensor, second: Tensor, maps: Tensor, batch: Batch) -> Affinities:
        config = self.config
        edges = tuple(affinity.nearest_neighbours(view, config.edges) for view in (first, second))
        known = self.passing(first, edges[0]), self.passing(second, edges[1])
        vertex = affinity.global_affinity(*known)
        if config.global_share < 1:
            vertex = config.global_share * vertex + (1 - config.global_share) * self._local(maps, batch)
        edge = affinity.edge_affinity(*known, *edges) if config.solver.order == 2 else None
        return Affinities(vertex, edge, *edges)

    def _local(self, maps: Tensor, batch: Batch) -> Tensor:
        dims = maps.dim() - 2
        maps = _at_most(maps, self.config.cells)
        cells = maps.flatten(2).transpose(1, 2)  # (2B, P, D)
        shapes = batch["first"].shape[-dims:], maps.shape[-dims:]
        places = [cell_positions(batch[f"{view}_frame"].float(), *shapes) for view in ("first", "second")]
        first, second, first_places, second_places = (self._by_graph(part) for part in (*cells.chunk(2), *places))
        best, both_ways = self.config.best_matches, self.config.both_ways
        return affinity.local_affinity(first, second, first_places, second_places, best, both_ways=both_ways)

    def _by_graph(self, images: Tensor) -> Tensor:
        return images.reshape(-1, self.config.nodes, *images.shape[1:])


def _at_most(maps: Tensor, cells: int) -> Tensor:
    """Feature maps (B, D, *map) averaged to `cells` cells at most, with as many along each axis as fit."""
    dims = maps.dim() - 2
    longest = max(1, math.floor(cells ** (1 / dims) + 1e-9))
    size: tuple[int | None, ...] = tuple(min(length, longest) for length in maps.shape[2:])
    if size == tuple(maps.shape[2:]):
        return maps
    return cast(Tensor, {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dims](size)(maps))


def matching_loss(
    affinities: Affinities, gradient: GradientConfig, solver: SolverConfig, overlaps: Tensor | None = None
) -> Tensor:
    """Mean over graphs of the Hamming loss (equation 5): the right pairs missed and the wrong pairs made.

    Node i belongs to node i. The value is that of the perturbed matching, the gradient that of algorithm 1. Noise is
    drawn from torch's global generator of the CPU. With `overlaps` (G, N, N), from 0 to 1, a node with a wrong partner
    counts by 1 minus its overlap with that partner.
    """
    vertex, edge = affinities.vertex, affinities.edge
    right = torch.arange(vertex.shape[1], device=vertex.device).expand(len(vertex), -1)
    perturbed = _perturbed(affinities, gradient, solver.order)
    found, target = matching_of(perturbed, solver), right
    if gradient.solves == 2:
        # Moved against the derivative of the Hamming loss by the vertices: 1 for wrong pairs and -1 for right ones.
        moved = perturbed.vertex - gradient.strength * (1 - 2 * _pairs(right, vertex))
        target = matching_of(replace(perturbed, vertex=moved), solver)
    counts = torch.ones_like(right, dtype=vertex.dtype)
    if overlaps is not None:
        counts = 1 - overlaps.to(vertex.dtype).gather(2, found[:, :, None])[:, :, 0] * (found != right)
    surrogate = (vertex * (_pairs(found, vertex) - _pairs(target, vertex)) * counts[:, :, None]).sum((1, 2))
    if edge is not None:
        kept = affinities.edges_kept(found) - affinities.edges_kept(target)
        surrogate = surrogate + (edge * kept * counts[:, :, None, None, None]).sum((1, 2, 3, 4))
    surrogate = surrogate.mean() / gradient.strength
    hamming = 2.0 * ((found != right) * counts).sum(1).mean()
    return hamming + surrogate - surrogate.detach()


def matching_of(affinities: Affinities, solver: SolverConfig) -> Tensor:
    """The best matching found: the partner (G, N) int64 of each node."""
    vertex, edge = affinities.vertex.detach(), None
    if affinities.edge is not None and solver.order == 2:
        edge = affinities.dense_edges(affinities.edge.detach()).cpu().numpy()
    return torch.from_numpy(solve(vertex.cpu().numpy(), edge, solver)).to(vertex.device)


def matching_accuracy(affinities: Affinities, solver: SolverConfig, temperature: float = 0.0) -> float:
    """Share of the nodes whose partner is right, with Gumbel noise of that temperature; 1 / N is chance."""
    gradient = GradientConfig(temperature=temperature)
    found = matching_of(_perturbed(affinities, gradient, solver.order), solver)
    is_right = found == torch.arange(found.shape[1], device=found.device)
    return int(is_right.sum()) / is_right.numel()


def _perturbed(affinities: Affinities, gradient: GradientConfig, order: int) -> Affinities:
    """The affinities without gradient, with noise on all of them or less the margin of the right pairs."""
    vertex = affinities.vertex.detach()
    edge = None if affinities.edge is None else affinities.edge.detach()
    if gradient.noise == "margin":
        vertex = vertex - gradient.margin * torch.eye(vertex.shape[1], device=vertex.device, dtype=vertex.dtype)
    if temperature := gradient.temperature_for(order):
        vertex = vertex + temperature * _gumbel(vertex)
        edge = None if edge is None else edge + temperature * _gumbel(edge)
    return replace(affinities, vertex=vertex, edge=edge)


def _pairs(matching: Tensor, like: Tensor) -> Tensor:
    """A matching (G, N) as (G, N, N) of 0 and 1."""
    return torch.zeros_like(like).scatter_(2, matching[:, :, None], 1.0)


def _gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise of that shape, drawn on the CPU, so that every device draws the same."""
    uniform = batch_rand(*like.shape, dtype=torch.float64).clamp_(1e-20, 1 - 1e-12)
    return -(-uniform.log()).log().to(like)
