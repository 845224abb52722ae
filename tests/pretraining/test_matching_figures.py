"""Pictures of matching: what is drawn is what was matched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib import figure as matplotlib_figure
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox
from matplotlib.patches import ConnectionPatch
from PIL import Image

from segkit.pretraining.matching_figures import graph_figure, pairs_figure


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []

    class Remembered(Figure):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]
            figures.append(self)

    monkeypatch.setattr(matplotlib_figure, "Figure", Remembered)
    return figures


def test_right_pairs_are_green_lines_and_wrong_ones_red_dashes(drawn: list[Figure], tmp_path: Path) -> None:
    views = np.random.default_rng(0).random((3, 8, 8))
    pairs_figure(tmp_path / "new" / "pairs.png", views, views, [0, 2, 1], "one of three")
    lines = drawn[0].findobj(ConnectionPatch)
    assert [to_hex(line.get_edgecolor()) for line in lines] == ["#009e73", "#d55e00", "#d55e00"]
    assert [line.get_linestyle() for line in lines] == ["-", "--", "--"]
    with Image.open(tmp_path / "new" / "pairs.png") as picture:
        assert picture.size[0] > 100


def test_a_graph_has_a_picture_for_each_node_and_a_line_for_each_edge(drawn: list[Figure], tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    views = generator.random((4, 6, 8, 8)), generator.random((4, 6, 8, 8))  # volumes: their middle slices
    features = generator.normal(size=(4, 5)), generator.normal(size=(4, 5))
    edges = np.array([[1, 2], [0, 2], [0, 1], [0, 1]])
    graph_figure(tmp_path / "graph.png", views, features, (edges, edges))
    for axes in drawn[0].axes:
        assert len(axes.lines) == 8
        boxes = [artist for artist in axes.artists if isinstance(artist, AnnotationBbox)]
        assert len(boxes) == 4
    first = drawn[0].axes[0].artists[0].offsetbox.get_data()  # type: ignore[attr-defined]
    assert np.allclose(first, np.rot90(views[0][0, 3]), atol=1e-6)
