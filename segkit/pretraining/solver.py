"""Second-order assignment: a one-to-one matching of the nodes of two graphs by vertex and edge affinities.

In Lawler's form (1963, "The quadratic assignment problem") a matching v, v_ia = 1 where node i of the first graph is
node a of the second, has the value

    f(v) = sum_ia vertex_ia v_ia + sum_iajb edge_ia,jb v_ia v_jb

and the matching with the largest value is sought. Three steps find good ones, for many small graphs at once:

- Frank and Wolfe's method, as in FAQ (Vogelstein et al. 2015, "Fast approximate quadratic programming for graph
  matching"), on doubly stochastic matrices: linearise f, solve the linear assignment, move there as far as f rises.
  As every step ends at a matching, it needs only sums of n rows of `edge`.
- The best of all matchings met, the linear solution included, is kept.
- A search by swaps of two partners with a memory (Taillard 1991, "Robust taboo search for the quadratic assignment
  problem"): the best swap is made even if f falls, and it is not undone for a number of swaps.

The search is deterministic. `benchmarks/matching_solvers.py` compares quality and time with the solvers of pygmtools:
RRWM (Cho et al. 2010), IPFP (Leordeanu et al. 2009) and SM (Leordeanu and Hebert 2005).
"""

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import linear_sum_assignment

from segkit.config import Config

Array = NDArray[np.floating[Any]]
Matching = NDArray[np.int64]
"""(G, n): the partner in the second graph of each node of the first."""

_AT_ONCE = 32  # graphs that are solved together; the memory of more would not stay in the cache


class SolverConfig(Config):
    """How long is searched."""

    order: Literal[1, 2] = 2
    """2: vertices and edges; 1: vertices alone, which a linear assignment solves exactly."""
    starts: int = Field(default=1, ge=1, le=3)
    """Starts of Frank-Wolfe: 1, the matching that the edges suggest; 2, also the mean of all matchings; 3, also the
    linear solution. The second start helps where nodes resemble each other, as neighbouring slices do."""
    iterations: int = Field(default=30, ge=1)
    """The most steps of Frank-Wolfe; it mostly ends after eight."""
    swaps: int = Field(default=40, ge=0)
    """Swaps of two partners tried on the best matching so far; 0: none."""
    memory: int = Field(default=10, ge=1)
    """For how many swaps two nodes do not both return to partners they left, unless to a new best matching."""


def solve(vertex: Array, edge: Array | None, config: SolverConfig | None = None) -> Matching:
    """The best one-to-one matchings found for G pairs of graphs of n nodes: (G, n), the partner of each node.

    `vertex` (G, n, n) has the affinity of node i of the first graph with node a of the second. `edge` (G, n * n, n * n)
    has in row i * n + a, column j * n + b that of edge (i, j) of the first graph with edge (a, b) of the second, 0
    where either does not exist; it need not be symmetric. The search computes in the type of the affinities.

    Raises:
        ValueError: the shapes do not belong together, or an affinity is not finite.
    """
    config = config or SolverConfig()
    _check(vertex, edge)
    matching = _assign(vertex)
    if edge is None or config.order == 1:
        return matching
    room = np.empty_like(edge[:_AT_ONCE])  # fresh memory for every part would cost more than the sum it takes
    for first in range(0, len(vertex), _AT_ONCE):
        graphs = slice(first, first + _AT_ONCE)
        linear, part = matching[graphs], (vertex[graphs], edge[graphs])
        found = _search(_problem_of(*part, room), linear, config)
        is_better = objective(*part, found) > objective(*part, linear)
        matching[graphs] = np.where(is_better[:, None], found, linear)
    return matching


def objective(vertex: Array, edge: Array | None, matching: Matching) -> NDArray[np.float64]:
    """The value f of a matching (G, n) for each pair of graphs, (G,); affinities as in `solve`, sums in float64."""
    graphs, n = matching.shape
    pairs = np.arange(n) * n + matching
    picked = np.take_along_axis(vertex.reshape(graphs, n * n), pairs, axis=1)
    value: NDArray[np.float64] = picked.sum(axis=1, dtype=np.float64)
    if edge is not None:
        chosen = edge[np.arange(graphs)[:, None, None], pairs[:, :, None], pairs[:, None, :]]
        value += chosen.sum(axis=(1, 2), dtype=np.float64)
    return value


class _Problem(NamedTuple):
    """f(v) = linear . v + v . couplings . v / 2 of M pairs of graphs."""

    linear: Array  # (M, n, n)
    couplings: Array  # (M, n * n, n * n), symmetric; zero where i = j or a = b


def _check(vertex: Array, edge: Array | None) -> None:
    graphs, n = vertex.shape[0], vertex.shape[-1]
    if vertex.shape != (graphs, n, n):
        raise ValueError(f"vertex affinities must be (graphs, n, n), but are {vertex.shape}")
    expected = (graphs, n * n, n * n)
    if edge is not None and edge.shape != expected:
        raise ValueError(f"edge affinities must be {expected} beside {vertex.shape}, but are {edge.shape}")


def _problem_of(vertex: Array, edge: Array, room: Array) -> _Problem:
    """The problem of M pairs of graphs; its couplings are written into `room`, (at least M, n * n, n * n)."""
    n = vertex.shape[-1]
    couplings = np.add(edge, edge.swapaxes(1, 2), out=room[: len(edge)])
    by_node = couplings.reshape(-1, n, n, n, n)
    node = np.arange(n)
    linear = vertex + np.diagonal(couplings, axis1=1, axis2=2).reshape(vertex.shape) / 2
    by_node[:, node, :, node, :] = 0
    by_node[:, :, node, :, node] = 0
    return _Problem(linear, couplings)


def _assign(scores: Array) -> Matching:
    columns = [linear_sum_assignment(each)[1] for each in -scores]
    return np.array(columns, dtype=np.int64).reshape(scores.shape[:2])


def _pull(couplings: Array, graphs: Matching, matching: Matching) -> Array:
    """The product couplings . v of matchings (M, n) of the graphs (M,): (M, n * n)."""
    n = matching.shape[1]
    return np.asarray(couplings[graphs[:, None], np.arange(n) * n + matching].sum(axis=1))


def _chosen(values: Array, pairs: Matching) -> Array:
    """The product values . v, (M,), of values (M, n * n) at the pairs (M, n) of a matching."""
    return np.asarray(np.take_along_axis(values, pairs, axis=1).sum(axis=1))


def _search(problem: _Problem, linear: Matching, config: SolverConfig) -> Matching:
    """The best matching met from any start; `linear` (M, n) is the solution without edges."""
    matching, value = linear, _value(problem, linear)
    for v, pull in _starts(problem, linear, config.starts):
        found, found_value = _frank_wolfe(problem, v, pull, config.iterations)
        is_better = found_value > value
        matching, value = np.where(is_better[:, None], found, matching), np.where(is_better, found_value, value)
    return _swap(problem, matching, config.swaps, config.memory)


def _value(problem: _Problem, matching: Matching) -> Array:
    n = matching.shape[1]
    pairs = np.arange(n) * n + matching
    pull = _pull(problem.couplings, np.arange(len(matching)), matching)
    return _chosen(problem.linear.reshape(-1, n * n), pairs) + _chosen(pull, pairs) / 2


def _starts(problem: _Problem, linear: Matching, count: int) -> list[tuple[Array, Array]]:
    """Pairs of v and couplings . v, both (M, n * n)."""
    graphs, n = linear.shape
    pull = problem.couplings.sum(axis=1) / n
    starts = []
    for matching in (_assign(pull.reshape(graphs, n, n)), linear):
        v = np.zeros_like(pull)
        np.put_along_axis(v, np.arange(n) * n + matching, 1, axis=1)
        starts.append((v, _pull(problem.couplings, np.arange(graphs), matching)))
    starts.insert(1, (np.full_like(pull, 1 / n), pull))
    return starts[:count]


def _frank_wolfe(problem: _Problem, v: Array, pull: Array, iterations: int) -> tuple[Matching, Array]:
    """The best of the matchings at the ends of the steps, (M, n), and its f, (M,)."""
    graphs, n = len(v), problem.linear.shape[-1]
    linear = problem.linear.reshape(graphs, n * n)
    best, best_value = np.zeros((graphs, n), np.int64), np.full(graphs, -np.inf)
    moving = np.arange(graphs)
    for _ in range(iterations):
        slope = linear[moving] + pull
        target = _assign(slope.reshape(-1, n, n))
        pairs = np.arange(n) * n + target
        target_pull = _pull(problem.couplings, moving, target)
        own = _chosen(target_pull, pairs)
        value = _chosen(linear[moving], pairs) + own / 2
        is_better = value > best_value[moving]
        best[moving[is_better]], best_value[moving[is_better]] = target[is_better], value[is_better]
        rise = _chosen(slope, pairs) - (slope * v).sum(axis=1)
        is_rising = rise > 1e-6 * np.maximum(1, np.abs(value))
        if not is_rising.any():
            break
        # f(v + t (target - v)) = f(v) + t rise + t^2 bend: a summit before t = 1 where 2 bend < -rise
        bend = own / 2 - _chosen(pull, pairs) + (pull * v).sum(axis=1) / 2
        t = np.divide(rise, -2 * bend, out=np.ones_like(rise), where=is_rising & (2 * bend < -rise))[:, None]
        v, pull = v * (1 - t), pull + t * (target_pull - pull)
        np.put_along_axis(v, pairs, np.take_along_axis(v, pairs, axis=1) + t, axis=1)
        moving, v, pull = moving[is_rising], v[is_rising], pull[is_rising]
    return best, best_value


def _swap(problem: _Problem, matching: Matching, swaps: int, memory: int) -> Matching:
    """The best matching, (M, n), met on a walk of that many swaps from `matching`; swaps that lower f are made too.

    Swapping the partners of p and q changes f by slope . d + couplings of the two new pairs + those of the two old
    ones, where d is the change of v, because no pair is coupled to one that shares its row or column.
    """
    graphs, n = matching.shape
    if n < 2:
        return matching
    size, rows = n * n, np.arange(graphs)
    couplings = problem.couplings.reshape(-1)
    slope = problem.linear.reshape(graphs, size) + _pull(problem.couplings, rows, matching)
    p, q = np.triu_indices(n, 1)
    at_p, at_q = rows[:, None] * size + p * n, rows[:, None] * size + q * n
    offset = (rows * size)[:, None]
    walker, best = matching.copy(), matching.copy()
    height, summit = np.zeros(graphs, slope.dtype), np.zeros(graphs, slope.dtype)
    left = np.full(graphs * size, -memory - 1)
    for step in range(swaps):
        of_p, of_q = walker[:, p], walker[:, q]
        pp, qq, pq, qp = at_p + of_p, at_q + of_q, at_p + of_q, at_q + of_p
        flat = slope.reshape(-1)
        change = flat.take(pq) + flat.take(qp) - flat.take(pp) - flat.take(qq)
        change += couplings.take(pq * size + qp - offset) + couplings.take(pp * size + qq - offset)
        is_return = (left.take(pq) >= step - memory) & (left.take(qp) >= step - memory)
        is_return &= height[:, None] + change <= summit[:, None]
        change[is_return] = -np.inf
        chosen = change.argmax(axis=1)
        gain = change[rows, chosen]
        moves = np.flatnonzero(np.isfinite(gain))
        chosen = chosen[moves]
        old = np.stack([pp[moves, chosen], qq[moves, chosen]])
        new = np.stack([pq[moves, chosen], qp[moves, chosen]])
        left[old] = step
        by_row = problem.couplings.reshape(-1, size)
        slope[moves] += by_row[new].sum(axis=0) - by_row[old].sum(axis=0)
        walker[moves, p[chosen]], walker[moves, q[chosen]] = new % n
        height[moves] += gain[moves]
        is_best = height > summit
        best[is_best], summit[is_best] = walker[is_best], height[is_best]
    return best
