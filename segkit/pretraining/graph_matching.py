"""Pre-training by matching graphs of images: LVM-Med (Nguyen et al. 2023, arXiv 2306.11925).

A group of images is seen in two random views. The nodes of two graphs, one for each view, are the images; a matching
pairs the nodes of both. The encoder learns features by which each image finds its own other view, from what the images
look like, cell by cell and as a whole, and from how they lie to each other. The authors released no code for this part;
it is written from the paper, and says where it had to choose (`affinity.py`, `gradient.py`, `solver.py`).
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from segkit.config import Config
from segkit.metrics.retrieval import retrieval_accuracy
from segkit.pretraining.affinity import (
    Affinities,
    MessagePassing,
    edge_affinity,
    global_affinity,
    local_affinity,
    nearest_neighbours,
)
from segkit.pretraining.gradient import GradientConfig, matching_accuracy, matching_loss
from segkit.pretraining.method import encode, encoder_width, train_encoder_only
from segkit.pretraining.solver import SolverConfig
from segkit.pretraining.views import cell_positions
from segkit.training.task import Batch


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
    """Whether a node adds what its neighbours tell to its own features; off is the paper's equation to the letter."""
    global_share: float = Field(default=0.8, ge=0, le=1)
    """Alpha: the part of the global affinity in that of two nodes; the rest is the local one, and 1 switches it off."""
    best_matches: int = Field(default=20, ge=1)
    """Gamma: matched cells of each kind that count locally. The paper does not tell; 20 is that of VICRegL, from which
    its local terms come (Bardes et al., arXiv 2210.01571)."""
    cells: int = Field(default=64, ge=1)
    """Most cells of a feature map that are compared; larger maps are averaged to fewer cells, for the cost grows with
    the square."""
    both_ways: bool = True
    """Whether cells of either view look for theirs in the other (equation 3), or those of the first alone."""
    gradient: GradientConfig = GradientConfig()
    solver: SolverConfig = SolverConfig()


class GraphMatching(nn.Module):
    """The network with a projector and message passing on top of its encoder, and the matching loss."""

    views = 2
    score = "matching"

    def __init__(self, network: nn.Module, config: GraphMatchingConfig, in_channels: int, dims: int) -> None:
        super().__init__()
        self.network = network
        self.config = config
        train_encoder_only(network)
        self.projector = nn.Linear(encoder_width(network, in_channels, dims), config.width)
        self.passing = MessagePassing(config.width, config.layers, residual=config.residual)

    def loss(self, batch: Batch) -> Tensor:
        """Hamming loss of the perturbed matching, with the gradient of `matching_loss`."""
        affinities, _, _ = self.affinities(batch)
        return matching_loss(affinities, self.config.gradient, self.config.solver)

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
        vectors = (features.flatten(0, 1).cpu().numpy() for features in (first, second))
        return {
            "matching": matching_accuracy(affinities, solver),
            "noisy": noisy,
            "retrieval": retrieval_accuracy(*vectors),
        }

    def affinities(self, batch: Batch) -> tuple[Affinities, Tensor, Tensor]:
        """The affinities of the graphs of a batch, and the projected features (G, N, F) of both views."""
        count = len(batch["first"])
        maps = encode(self.network, torch.cat([batch["first"], batch["second"]]))[-1]
        with torch.autocast(maps.device.type, enabled=False):  # sums of differences of cosines need all their digits
            maps = maps.float()
            projected = self.projector(maps.flatten(2).mean(2))
            first, second = (self._by_graph(part) for part in projected.split(count))
            return self._affinities(first, second, maps, batch), first, second

    def _affinities(self, first: Tensor, second: Tensor, maps: Tensor, batch: Batch) -> Affinities:
        config = self.config
        edges = nearest_neighbours(first, config.edges), nearest_neighbours(second, config.edges)
        known = self.passing(first, edges[0]), self.passing(second, edges[1])
        vertex = global_affinity(*known)
        if config.global_share < 1:
            vertex = config.global_share * vertex + (1 - config.global_share) * self._local(maps, batch)
        edge = edge_affinity(*known, *edges) if config.solver.order == 2 else None
        return Affinities(vertex, edge, *edges)

    def _local(self, maps: Tensor, batch: Batch) -> Tensor:
        dims = maps.dim() - 2
        maps = _at_most(maps, self.config.cells)
        cells = maps.flatten(2).transpose(1, 2)  # (2B, P, D)
        places = [
            cell_positions(batch[f"{view}_frame"].float(), batch[view].shape[-dims:], maps.shape[-dims:])
            for view in ("first", "second")
        ]
        groups = [self._by_graph(part) for part in (*cells.chunk(2), *places)]
        return local_affinity(
            groups[0], groups[1], groups[2], groups[3], self.config.best_matches, both_ways=self.config.both_ways
        )

    def _by_graph(self, images: Tensor) -> Tensor:
        """(B, ...) to (G, N, ...)."""
        return images.reshape(-1, self.config.nodes, *images.shape[1:])


def _at_most(maps: Tensor, cells: int) -> Tensor:
    """Feature maps (B, D, *map) averaged to `cells` cells at most, with as many along each axis as fit."""
    dims = maps.dim() - 2
    longest = max(1, math.floor(cells ** (1 / dims) + 1e-9))
    size: tuple[int | None, ...] = tuple(min(length, longest) for length in maps.shape[2:])
    if size == tuple(maps.shape[2:]):
        return maps
    pooled: Tensor = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dims](size)(maps)
    return pooled
