"""How good and how fast are the solvers of second-order assignment, on graphs as pre-training makes them?

Run with `pip install pygmtools` and `OMP_NUM_THREADS=1 python benchmarks/matching_solvers.py`; three minutes
on one core, nearly all of them for RRWM. Each instance is a set of random features seen twice through noise: nodes are
joined to their nearest neighbours of the same view, vertices are compared by 0.8 times the cosine of their features,
edges by the cosine of the differences along them, and both get Gumbel noise, as in a step of training. `--graphs` makes
it shorter.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import permutations
from time import perf_counter
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from segkit.pretraining.solver import SolverConfig, objective, solve

FEATURES = 32
NODES, NEIGHBOURS = 16, 5


class Level(NamedTuple):
    """How alike the two views of a feature of variance 1 are, and how much noise its affinities get.

    `step` is the standard deviation between a node and the next, as of neighbouring slices; None: nodes of their own.
    """

    view_sigma: float
    temperature: float
    step: float | None = None


LEVELS = {"hard": Level(2.0, 0.1), "middle": Level(1.0, 0.3), "easy": Level(0.1, 1.0), "slices": Level(0.3, 1.0, 0.2)}

Solver = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _ours(**settings: int) -> Solver:
    return lambda vertex, edge: solve(vertex, edge, SolverConfig(**settings))


def solve_with(name: str, vertex: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """Matchings of a solver of pygmtools with its own settings, graph after graph; arguments and result as in `solve`.

    These solvers expect affinities that are symmetric (each order of two pairs gets half, which changes no value) and
    not negative (for IPFP all are shifted, which changes all values alike; for RRWM and SM negative ones become 0,
    which finds better matchings). Their scores become a matching by a linear assignment.
    """
    import pygmtools

    graphs, n = vertex.shape[:2]
    order = np.arange(n * n).reshape(n, n).T.reshape(-1)  # pair (i, a) is a * n + i in pygmtools
    scores = np.empty(vertex.shape)
    for graph in range(graphs):
        affinities = (edge[graph] + edge[graph].T).astype(np.float64) / 2
        affinities[np.diag_indices(n * n)] += vertex[graph].reshape(-1)
        if name == "ipfp":
            affinities -= affinities.min()
        affinities = np.maximum(affinities, 1e-9 * np.abs(affinities).max())  # a walk over zeros would not move
        with np.errstate(all="ignore"):  # IPFP divides by its step, which is zero once it has arrived
            scores[graph] = getattr(pygmtools, name)(affinities[np.ix_(order, order)], n, n, backend="numpy")
    return np.stack([linear_sum_assignment(each, maximize=True)[1] for each in scores])


OURS: dict[str, Solver] = {
    "linear (order=1)": _ours(order=1),
    "segkit": _ours(),
    "segkit, swaps=0": _ours(swaps=0),
    "segkit, starts=2": _ours(starts=2),
    "segkit, starts=3, swaps=200": _ours(starts=3, swaps=200),
}
THEIRS: dict[str, Solver] = {name.upper(): partial(solve_with, name) for name in ("sm", "ipfp", "rrwm")}
SOLVERS = OURS | THEIRS


def random_graphs(graphs: int, n: int, level: Level, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Affinities of vertices (graphs, n, n) and of edges (graphs, n * n, n * n), float32 as in training."""
    generator = np.random.default_rng(seed)
    features = generator.standard_normal((graphs, n, FEATURES))
    if level.step is not None:
        features[:, 1:] = features[:, :1] + level.step * features[:, 1:].cumsum(axis=1)
    first, second = (features + level.view_sigma * generator.standard_normal(features.shape) for _ in range(2))
    k = min(NEIGHBOURS, n - 1)
    vertex = 0.8 * np.einsum("gif,gaf->gia", _unit(first), _unit(second))
    (to_first, along_first), (to_second, along_second) = _edges(first, k), _edges(second, k)
    along = np.einsum("gimf,galf->gimal", along_first, along_second)
    noisy_vertex, noisy_along = (x + level.temperature * generator.gumbel(size=x.shape) for x in (vertex, along))
    edge = np.zeros((graphs, n, n, n, n), np.float32)
    g, i, a = np.arange(graphs)[:, None, None, None, None], np.arange(n)[:, None, None, None], np.arange(n)[:, None]
    edge[g, i, a, to_first[:, :, :, None, None], to_second[:, None, None, :, :]] = noisy_along
    return noisy_vertex.astype(np.float32), edge.reshape(graphs, n * n, n * n)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _edges(nodes: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest neighbours of each node, (graphs, n, k), and the directions away from them, (graphs, n, k, F)."""
    away = nodes[:, :, None] - nodes[:, None]
    distance = np.linalg.norm(away, axis=-1) + np.diag(np.full(nodes.shape[1], np.inf))
    nearest = distance.argsort(axis=-1)[..., :k]
    return nearest, _unit(np.take_along_axis(away, nearest[..., None], axis=2))


def compare(level: Level, graphs: int) -> None:
    """Print a table of all solvers on graphs of 16 nodes; "best known" is the share that no other solver surpasses."""
    vertex, edge = random_graphs(graphs, NODES, level, seed=0)
    values, times_ms = {}, {}
    for name, solver in SOLVERS.items():
        solver(vertex[:2], edge[:2])
        start = perf_counter()
        matching = solver(vertex, edge)
        times_ms[name] = (perf_counter() - start) * 1000 / graphs
        values[name] = objective(vertex, edge, matching)
    best, linear = np.max(list(values.values()), axis=0), values["linear (order=1)"]
    theirs = max(values[name].mean() for name in THEIRS)
    columns = "mean objective | to best of pygmtools | best known | below linear | ms a graph | RRWM takes"
    print(f"| {'solver':27} | {columns} |")
    print("|---|---|---|---|---|---|---|")
    for name, value in values.items():
        is_best, is_worse = value > best - 1e-6, value < linear - 1e-6
        times = times_ms["RRWM"] / times_ms[name]
        print(
            f"| {name:27} | {value.mean():14.2f} | {value.mean() / theirs - 1:+20.1%} | {is_best.mean():10.0%} "
            f"| {is_worse.sum():12} | {times_ms[name]:10.2f} | {times:9.0f}x |"
        )


def against_all_matchings(graphs: int = 100, n: int = 6) -> None:
    """Print how often each solver finds the best of all n! matchings, and what it misses on average."""
    every = np.array(list(permutations(range(n))))
    print(f"| {'solver':27} |" + "".join(f" {name}: optima | mean gap |" for name in LEVELS))
    print("|---|" + "---|---|" * len(LEVELS))
    problems = [random_graphs(graphs, n, level, seed=1) for level in LEVELS.values()]
    optima = [np.max([objective(*p, np.tile(v, (graphs, 1))) for v in every], axis=0) for p in problems]
    for name, solver in SOLVERS.items():
        gaps = [(best - objective(*p, solver(*p))) / np.abs(best) for p, best in zip(problems, optima, strict=True)]
        print(f"| {name:27} |" + "".join(f" {(gap < 1e-6).sum()} of {graphs} | {gap.mean():.2%} |" for gap in gaps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=200, help="instances of 16 nodes at each level of noise")
    graphs = parser.parse_args().graphs
    for name, level in LEVELS.items():
        noise = f"views with sigma {level.view_sigma}, Gumbel noise of temperature {level.temperature}"
        nodes = "" if level.step is None else f", nodes with sigma {level.step} from one to the next"
        print(f"\n{name}: {noise}{nodes}; {graphs} graphs\n")
        compare(level, graphs)
    print("\nagainst all 720 matchings of six nodes\n")
    against_all_matchings()


if __name__ == "__main__":
    main()
