"""The assignment solver against values by hand, brute force and itself."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from segkit.pretraining.solver import SolverConfig, objective, solve


def _random(graphs: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Affinities in which vertices and edges both have a say, and the edges are not symmetric."""
    generator = np.random.default_rng(seed)
    return 3 * generator.normal(size=(graphs, n, n)), generator.normal(size=(graphs, n * n, n * n))


def _best(vertex: np.ndarray, edge: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best value and its matching, of all there are."""
    graphs, n = vertex.shape[:2]
    every = np.array(list(permutations(range(n))))
    values = np.stack([objective(vertex, edge, np.tile(each, (graphs, 1))) for each in every])
    return values.max(axis=0), every[values.argmax(axis=0)]


def test_an_objective_by_hand() -> None:
    vertex = np.array([[[1.0, 2.0], [4.0, 8.0]]])
    edge = np.zeros((1, 2, 2, 2, 2))
    edge[0, 0, 1, 1, 0] = 16  # edge 0 -> 1 upon edge 1 -> 0
    edge[0, 1, 1, 0, 0] = 32  # edge 1 -> 0 upon edge 1 -> 0
    edge = edge.reshape(1, 4, 4)
    swapped, straight = np.array([[1, 0]]), np.array([[0, 1]])
    assert objective(vertex, None, straight) == [1 + 8]
    assert objective(vertex, edge, straight) == [1 + 8 + 32]
    assert objective(vertex, edge, swapped) == [2 + 4 + 16]
    np.testing.assert_array_equal(solve(vertex, edge), straight)


def test_edges_outvote_vertices() -> None:
    vertex = np.array([[[0.3, 0.0], [0.0, 0.3]]])
    edge = np.zeros((1, 4, 4))
    edge[0, 0 * 2 + 1, 1 * 2 + 0] = 1.0
    np.testing.assert_array_equal(solve(vertex, edge, SolverConfig(order=1)), [[0, 1]])
    np.testing.assert_array_equal(solve(vertex, edge), [[1, 0]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_shuffled_graph_is_recognised_by_its_edges_alone(dtype: type) -> None:
    graphs, n = 10, 12
    generator = np.random.default_rng(0)
    first = generator.random((graphs, n, n)) < 0.3
    first[:, np.arange(n), np.arange(n)] = False
    partner = np.argsort(generator.random((graphs, n)), axis=1)
    second = np.zeros_like(first)
    g, i, j = np.nonzero(first)
    second[g, partner[g, i], partner[g, j]] = True
    edge = (first[:, :, None, :, None] == second[:, None, :, None, :]).reshape(graphs, n * n, n * n)
    vertex = np.zeros((graphs, n, n), dtype)
    found = solve(vertex, edge.astype(dtype))
    np.testing.assert_array_equal(found, partner)
    np.testing.assert_array_equal(objective(vertex, edge.astype(dtype), found), np.full(graphs, n * n))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_small_optima_are_found(n: int) -> None:
    vertex, edge = _random(40, n)
    best, matching = _best(vertex, edge)
    found = solve(vertex, edge)
    np.testing.assert_allclose(objective(vertex, edge, found), best, rtol=1e-12)
    np.testing.assert_array_equal(found, matching)


def test_optima_of_six_nodes_are_nearly_always_found() -> None:
    """The search is a heuristic; what the documentation promises of it is held here on harder, random affinities."""
    vertex, edge = _random(100, 6)
    best, _ = _best(vertex, edge)
    gap = 1 - objective(vertex, edge, solve(vertex, edge)) / best
    assert (gap < 1e-9).sum() >= 97
    assert gap.mean() <= 0.005


@pytest.mark.parametrize("swaps", [0, 1, 40])
def test_never_below_the_linear_solution_and_every_row_a_matching(swaps: int) -> None:
    vertex, edge = _random(60, 8)
    vertex *= 2
    linear = solve(vertex, edge, SolverConfig(order=1))
    for iterations in (1, 30):
        found = solve(vertex, edge, SolverConfig(iterations=iterations, swaps=swaps))
        np.testing.assert_array_equal(np.sort(found, axis=1), np.tile(np.arange(8), (60, 1)))
        assert (objective(vertex, edge, found) >= objective(vertex, edge, linear)).all()


def test_harmful_edges_leave_the_linear_solution() -> None:
    """Each edge pair costs the same, so that all matchings pay alike but for their vertices."""
    vertex = np.random.default_rng(0).normal(size=(3, 5, 5))
    edge = np.full((3, 25, 25), -7.0)
    np.testing.assert_array_equal(solve(vertex, edge), solve(vertex, None))


def test_more_search_finds_more() -> None:
    vertex, edge = _random(20, 12)

    def mean(**settings: int) -> float:
        return float(objective(vertex, edge, solve(vertex, edge, SolverConfig(**settings))).mean())

    assert mean(swaps=0) < mean(swaps=1) < mean(swaps=40)
    assert mean(swaps=0) < mean(swaps=0, starts=2) < mean(swaps=0, starts=3)
    assert mean(swaps=0, iterations=1) < mean(swaps=0)


def test_relabelled_nodes_relabel_the_matching() -> None:
    graphs, n = 20, 5
    vertex, edge = _random(graphs, n)
    generator = np.random.default_rng(1)
    first, second = generator.permutation(n), generator.permutation(n)
    relabelled = edge.reshape(graphs, n, n, n, n)[:, first][:, :, second][:, :, :, first][..., second]
    found = solve(vertex[:, first][:, :, second], relabelled.reshape(edge.shape))
    expected = solve(vertex, edge)
    np.testing.assert_array_equal(second[found], expected[:, first])


def test_a_batch_is_its_graphs_one_by_one_and_stays_as_it_was() -> None:
    vertex, edge = _random(35, 7)
    before = vertex.copy(), edge.copy()
    together = solve(vertex, edge)
    alone = [solve(vertex[g : g + 1], edge[g : g + 1])[0] for g in range(35)]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together, solve(vertex, edge))
    np.testing.assert_array_equal(vertex, before[0])
    np.testing.assert_array_equal(edge, before[1])


def test_what_no_matching_can_choose_is_without_effect() -> None:
    """Couplings of a pair with another of its row or column; those of a pair with itself belong to its vertices."""
    graphs, n = 10, 5
    vertex, edge = _random(graphs, n)
    idle = edge.reshape(graphs, n, n, n, n).copy()
    i, j = np.nonzero(~np.eye(n, dtype=bool))
    idle[:, 0, i, 0, j] += 50
    idle[:, i, 2, j, 2] -= 50
    idle = idle.reshape(edge.shape)
    np.testing.assert_array_equal(solve(vertex, idle), solve(vertex, edge))
    own = edge.copy()
    own[:, np.arange(n * n), np.arange(n * n)] += vertex.reshape(graphs, -1)
    np.testing.assert_array_equal(solve(np.zeros_like(vertex), own), solve(vertex, edge))


def test_the_first_order_is_linear_assignment() -> None:
    vertex, edge = _random(5, 7)
    expected = [linear_sum_assignment(each, maximize=True)[1] for each in vertex]
    np.testing.assert_array_equal(solve(vertex, edge, SolverConfig(order=1)), expected)
    np.testing.assert_array_equal(solve(vertex, None), expected)


def test_a_single_node_and_no_graph() -> None:
    np.testing.assert_array_equal(solve(np.ones((2, 1, 1)), np.ones((2, 1, 1))), [[0], [0]])
    assert solve(np.ones((0, 3, 3)), np.ones((0, 9, 9))).shape == (0, 3)


def test_shapes_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match=r"edge affinities must be \(2, 9, 9\)"):
        solve(np.ones((2, 3, 3)), np.ones((2, 3, 3)))
    with pytest.raises(ValueError, match=r"vertex affinities must be \(graphs, n, n\), but are \(2, 3, 4\)"):
        solve(np.ones((2, 3, 4)), None)


def test_an_affinity_that_is_not_finite() -> None:
    vertex, edge = _random(1, 3)
    edge[0, 0, 4] = np.nan
    with pytest.raises(ValueError, match="invalid numeric entries"):
        solve(vertex, edge)
