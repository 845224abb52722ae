"""The solvers of pygmtools: what they are given, and what comes back."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from segkit.errors import RequestError
from segkit.pretraining.solver import PygmSolver, SolverConfig, objective, solve, solve_with

SOLVERS: tuple[PygmSolver, ...] = ("rrwm", "ipfp", "sm")


@pytest.mark.parametrize("name", SOLVERS)
def test_edges_outvote_vertices(name: PygmSolver) -> None:
    """Three nodes, whose vertices say 0 1 2 and whose one pair of edges, 0 -> 1 upon 1 -> 2, says 1 2 and then 0."""
    pytest.importorskip("pygmtools")
    vertex = 0.1 * np.eye(3)[None]
    edge = np.zeros((1, 9, 9))
    edge[0, 0 * 3 + 1, 1 * 3 + 2] = 2.0
    np.testing.assert_array_equal(solve_with(name, vertex, edge), [[1, 2, 0]])
    np.testing.assert_array_equal(solve(vertex, None, SolverConfig(method=name)), [[0, 1, 2]])


@pytest.mark.parametrize("name", SOLVERS)
def test_one_by_one_and_near_to_our_own(name: PygmSolver) -> None:
    pytest.importorskip("pygmtools")
    generator = np.random.default_rng(0)
    vertex = generator.random((6, 5, 5)).astype(np.float32)
    edge = generator.random((6, 25, 25)).astype(np.float32) ** 4
    found = solve_with(name, vertex, edge)
    np.testing.assert_array_equal(np.sort(found, axis=1), np.tile(np.arange(5), (6, 1)))
    np.testing.assert_array_equal(found[3:4], solve_with(name, vertex[3:4], edge[3:4]))
    value, ours = objective(vertex, edge, found), objective(vertex, edge, solve(vertex, edge))
    assert (value <= ours + 1e-6).all()
    assert value.mean() > 0.8 * ours.mean()


@pytest.mark.parametrize("name", SOLVERS)
def test_affinities_below_zero(name: PygmSolver) -> None:
    """All of them: a matching comes back nevertheless, and IPFP, whose shift is exact, still finds the best."""
    pytest.importorskip("pygmtools")
    generator = np.random.default_rng(0)
    vertex, edge = -5 - generator.random((4, 3, 3)), np.zeros((4, 9, 9))
    found = solve_with(name, vertex, edge)
    np.testing.assert_array_equal(np.sort(found, axis=1), np.tile(np.arange(3), (4, 1)))
    if name == "ipfp":
        np.testing.assert_array_equal(found, solve(vertex, None))


def test_without_pygmtools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pygmtools", None)
    with pytest.raises(RequestError, match=r"pip install 'segkit\[matching\]'"):
        solve_with("rrwm", np.ones((1, 2, 2)), np.ones((1, 4, 4)))


def test_shapes_that_do_not_belong_together() -> None:
    pytest.importorskip("pygmtools")
    with pytest.raises(ValueError, match=r"edge affinities must be \(2, 9, 9\)"):
        solve_with("sm", np.ones((2, 3, 3)), np.ones((2, 3, 3)))
