"""The assignment solvers of pygmtools behind the call of our own, for comparison; extra `matching`.

RRWM (Cho et al. 2010, "Reweighted random walks for graph matching"), IPFP (Leordeanu et al. 2009, "An integer projected
fixed point method for graph matching and MAP inference") and SM (Leordeanu and Hebert 2005, "A spectral technique for
correspondence problems using pairwise constraints"), each with the settings that pygmtools gives it.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from segkit.errors import RequestError
from segkit.pretraining.solver import Array, Matching, SolverConfig, solve

PygmSolver = Literal["rrwm", "ipfp", "sm"]


def solve_with(name: PygmSolver, vertex: Array, edge: Array | None) -> Matching:
    """One-to-one matchings, (G, n) int64, of the affinities of `segkit.pretraining.solver.solve`, graph after graph.

    The three are written for symmetric affinities that are not negative. Symmetric: halves of an edge affinity go to
    both orders of its two pairs, which leaves every matching its value. Not negative: IPFP, which takes a first best
    value of -1 for granted, gets all affinities shifted, which changes all values alike; RRWM and SM, whose walks a
    shift would blur, get zero in place of less, and find better matchings that way. Scores become a matching by a
    linear assignment.

    Raises:
        RequestError: pygmtools is not installed.
        ValueError: the shapes do not belong together, or an affinity is not finite.
    """
    pygmtools = _pygmtools()
    matching = solve(vertex, edge, SolverConfig(order=1))
    if edge is None:
        return matching
    n = vertex.shape[-1]
    solver = getattr(pygmtools, name)
    for graph in range(len(vertex)):
        affinities = _affinities(vertex[graph], edge[graph], is_shifted=name == "ipfp")
        with np.errstate(all="ignore"):  # IPFP divides by its step, which is zero once it has arrived
            scores = solver(affinities, n, n, backend="numpy")
        matching[graph] = linear_sum_assignment(scores, maximize=True)[1]
    return matching


def _affinities(vertex: Array, edge: Array, *, is_shifted: bool) -> Array:
    """Symmetric and not negative, (n * n, n * n); pairs (i, a) in the order of pygmtools, a * n + i."""
    n = len(vertex)
    symmetric = (edge + edge.T).astype(np.float64) / 2
    symmetric[np.diag_indices(n * n)] += vertex.reshape(-1)
    if is_shifted:
        symmetric -= symmetric.min()
    pairs = np.arange(n * n).reshape(n, n).T.reshape(-1)
    least = 1e-9 * np.abs(symmetric).max()  # all zero would leave a walk nowhere to go
    affinities: Array = np.maximum(symmetric, least)[np.ix_(pairs, pairs)]
    return affinities


def _pygmtools() -> Any:
    try:
        import pygmtools
    except ModuleNotFoundError as error:
        raise RequestError(
            f"{error.name} is not installed",
            expected="pygmtools, whose solvers were asked for",
            remedy="Install it with `pip install 'segkit[matching]'`, or take the solver of segkit",
        ) from error
    return pygmtools
