"""Graphs of images and their affinities: LVM-Med (arXiv 2306.11925), sections 3.2.1 to 3.2.3 and appendix A.

N images of a group, each in two views, make two graphs of N nodes. A node has a feature vector and edges to its nearest
neighbours in the same view; message passing adds information about the neighbours. Affinities are cosines, in [-1, 1]:
between nodes globally (of their features) and locally (of matched cells of their feature maps), between edges of their
node differences. G is the number of graphs, N of nodes, K of neighbours, F of features, D of channels, P of cells of a
feature map; what the paper leaves open is marked as our choice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Affinities:
    """Affinities and edges of G pairs of graphs."""

    vertex: Tensor  # (G, N, N): node i of the first view with node a of the second
    edge: Tensor | None  # (G, N, K, N, K): the m-th edge of i with the l-th edge of a; None if edges are not used
    first: Tensor  # (G, N, K) int64: the heads of the edges of the first view
    second: Tensor

    def dense_edges(self, edge: Tensor) -> Tensor:
        """Edge affinities (G, N, K, N, K) in the solver's form, (G, N * N, N * N), 0 where there are no edges.

        Row i * N + a, column j * N + b: edge (i, j) of the first graph with edge (a, b) of the second.
        """
        graphs, nodes, count = self.first.shape
        dense = edge.new_zeros(graphs, nodes, nodes, nodes, nodes)  # [g, i, a, j, b]
        graph = torch.arange(graphs, device=edge.device)[:, None, None, None, None]
        node = torch.arange(nodes, device=edge.device)
        tail, partner = node[:, None, None, None], node[None, None, :, None]
        head = self.first[:, :, :, None, None].expand(-1, -1, -1, nodes, count)
        other = self.second[:, None, None, :, :].expand(-1, nodes, count, -1, -1)
        dense[graph, tail, partner, head, other] = edge
        return dense.view(graphs, nodes * nodes, nodes * nodes)

    def edges_kept(self, matching: Tensor) -> Tensor:
        """Whether a matching (G, N), the partner of each node, maps an edge onto an edge: (G, N, K, N, K) float."""
        nodes = self.vertex.shape[1]
        node = torch.arange(nodes, device=matching.device)
        are_partners = matching[:, :, None] == node  # (G, N, N): tails
        heads = torch.take_along_dim(matching[:, None, :].expand(-1, nodes, -1), self.first, 2)  # (G, N, K)
        lead_there = heads[:, :, :, None, None] == self.second[:, None, None, :, :]
        return (are_partners[:, :, None, :, None] & lead_there).to(self.vertex.dtype)


def nearest_neighbours(features: Tensor, count: int) -> Tensor:
    """Indices (G, N, K) of the nodes nearest to each node of (G, N, F) by cosine (our choice), without itself."""
    unit = functional.normalize(features.detach(), dim=-1)
    similarity = unit @ unit.transpose(1, 2)
    similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return similarity.topk(min(count, features.shape[1] - 1), dim=-1).indices


class MessagePassing(nn.Module):
    """Graph convolutions (Kipf & Welling, arXiv 1609.02907, equation 2; LVM-Med, equation 1), of one width.

    Edges count in both directions and the degree includes the self-loop; ReLU between layers, none after the last (our
    choice). With `residual` (our choice) a node adds the messages to its own features: the convolution alone averages
    over most of so small a graph, and nothing is learnt (`docs/benchmarks.md`).
    """

    def __init__(self, width: int, layers: int, *, residual: bool = True) -> None:
        super().__init__()
        self.residual = residual
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(layers)])

    def forward(self, features: Tensor, neighbours: Tensor) -> Tensor:
        """Features (G, N, F) and neighbours (G, N, K) to features (G, N, F)."""
        if not self.layers:
            return features
        graphs, nodes, _ = features.shape
        adjacency = torch.eye(nodes, device=features.device, dtype=features.dtype).repeat(graphs, 1, 1)
        adjacency.scatter_(2, neighbours, 1.0)
        adjacency = torch.maximum(adjacency, adjacency.transpose(1, 2))
        scale = adjacency.sum(2).rsqrt()
        adjacency = scale[:, :, None] * adjacency * scale[:, None, :]
        messages = features
        for number, layer in enumerate(self.layers):
            messages = adjacency @ layer(functional.relu(messages) if number else messages)
        return features + messages if self.residual else messages


def global_affinity(first: Tensor, second: Tensor) -> Tensor:
    """Cosines (G, N, N) of nodes (G, N, F) of both views."""
    return functional.normalize(first, dim=-1) @ functional.normalize(second, dim=-1).transpose(1, 2)


def edge_affinity(first: Tensor, second: Tensor, first_edges: Tensor, second_edges: Tensor) -> Tensor:
    """Cosines (G, N, K, N, K) of node differences along edges, of nodes (G, N, F) and neighbours (G, N, K)."""
    ahead, behind = _differences(first, first_edges), _differences(second, second_edges)
    graphs, nodes, count, width = ahead.shape
    cosines = ahead.view(graphs, nodes * count, width) @ behind.view(graphs, nodes * count, width).transpose(1, 2)
    return cosines.view(graphs, nodes, count, nodes, count)


def _differences(features: Tensor, neighbours: Tensor) -> Tensor:
    graphs, nodes, count = neighbours.shape
    index = neighbours.reshape(graphs, nodes * count, 1).expand(-1, -1, features.shape[-1])
    heads = features.gather(1, index).view(graphs, nodes, count, -1)
    return functional.normalize(features[:, :, None] - heads, dim=-1).contiguous()


def local_affinity(
    first: Tensor, second: Tensor, first_places: Tensor, second_places: Tensor, best: int, *, both_ways: bool = True
) -> Tensor:
    """Mean cosines of matched cells of two feature maps, for all pairs of images: (G, N, N).

    Each cell of one map is matched to the cell of the other that is nearest in the original image, and again to the
    cell with the nearest feature vector; of each kind at most the `best` matches with the smallest distance count, and
    their mean cosines are averaged (the pseudo-code of appendix A; equation 2 has the sum over all cells). `both_ways`
    is the average of both directions, as in equation 3; else only cells of the first view are matched. Feature maps are
    (G, N, P, D), places (G, N, P, dims) the positions of their cells in the image, in mm.
    """
    graphs, nodes, cells, width = first.shape
    one, other = first.reshape(graphs, nodes * cells, width), second.reshape(graphs, nodes * cells, width)
    cosines = functional.normalize(one, dim=-1) @ functional.normalize(other, dim=-1).transpose(1, 2)
    pairs = cosines.view(graphs, nodes, cells, nodes, cells).transpose(2, 3)  # [g, i, a, p, q]
    with torch.no_grad():
        by_feature = torch.cdist(one, other).view(graphs, nodes, cells, nodes, cells).transpose(2, 3)
        ones, others = (places.reshape(graphs, nodes * cells, -1) for places in (first_places, second_places))
        by_place = torch.cdist(ones, others).view(graphs, nodes, cells, nodes, cells).transpose(2, 3)
    forth = 0.5 * (_matched(pairs, by_place, best) + _matched(pairs, by_feature, best))
    if not both_ways:
        return forth
    pairs, by_place, by_feature = (matrix.transpose(3, 4) for matrix in (pairs, by_place, by_feature))
    return 0.5 * (forth + 0.5 * (_matched(pairs, by_place, best) + _matched(pairs, by_feature, best)))


def _matched(cosines: Tensor, distances: Tensor, best: int) -> Tensor:
    """Mean cosine (G, N, N) of each cell p with its nearest q, over the `best` nearest, of [g, i, a, p, q]."""
    nearest = distances.min(dim=-1)
    kept = nearest.values.topk(min(best, cosines.shape[-2]), dim=-1, largest=False).indices
    return cosines.gather(-1, nearest.indices[..., None])[..., 0].gather(-1, kept).mean(-1)
