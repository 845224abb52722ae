"""Figures of a held-out group after graph matching: the pairs of views, and the graphs of both views."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from segkit.pretraining.graph_matching import GraphMatching, matching_of
from segkit.shapes import AnyArray
from segkit.training.batches import to_device
from segkit.training.task import Batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RIGHT, _WRONG, _EDGE = "#009E73", "#D55E00", "#56B4E9"
"""Of Okabe & Ito's palette; right and wrong pairs also differ in their lines."""
_THUMBNAIL = 36.0  # side of an image in the plane of a graph, in points

Points = NDArray[np.floating[Any]]


@torch.no_grad()
def draw_matching(folder: Path, method: GraphMatching, held_out: Batch) -> None:
    """Draw pairs.png and graph.png of the first held-out group into `folder`."""
    method.eval()
    nodes = method.config.nodes
    group = {name: tensor[:nodes] for name, tensor in held_out.items()}
    affinities, first, second = method.affinities(to_device(group, next(method.parameters()).device))
    partners = matching_of(affinities, method.config.solver)[0].tolist()
    images = group["first"][:, 0].numpy(), group["second"][:, 0].numpy()
    right = sum(node == partner for node, partner in enumerate(partners))
    pairs_figure(folder / "pairs.png", *images, partners, f"{right} of {nodes} held-out images find their other view")
    features = first[0].float().cpu().numpy(), second[0].float().cpu().numpy()
    edges = affinities.first[0].cpu().numpy(), affinities.second[0].cpu().numpy()
    graph_figure(folder / "graph.png", images, features, edges)


def pairs_figure(path: Path, first: AnyArray, second: AnyArray, partners: Sequence[int], title: str) -> None:
    """Draw two rows of views with a line from each image of the first row to its partner in the second.

    `first` and `second` are two views of the same N images, (N, H, W), or (N, D, H, W), of which the middle slices are
    drawn; `partners` is the image of the second row for each one of the first, its own if right.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import ConnectionPatch

    count = len(first)
    figure = Figure(figsize=(max(4.0, 0.9 * count), 4.2))
    rows = figure.subplots(2, count, squeeze=False, gridspec_kw={"hspace": 1.6, "wspace": 0.05})
    for axes, image in zip(rows.flat, [*_planes(first), *_planes(second)], strict=True):
        axes.imshow(image, cmap="gray")
        axes.set_axis_off()
    for node, partner in enumerate(partners):
        color, style = (_RIGHT, "-") if node == partner else (_WRONG, "--")
        ends = {"coordsA": rows[0, node].transAxes, "coordsB": rows[1, partner].transAxes}
        figure.add_artist(ConnectionPatch((0.5, 0.0), (0.5, 1.0), **ends, color=color, linestyle=style, linewidth=1.6))
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def graph_figure(
    path: Path, images: tuple[AnyArray, AnyArray], features: tuple[Points, Points], edges: tuple[AnyArray, AnyArray]
) -> None:
    """Draw the graphs of both views side by side: images where their features lie, joined with their neighbours.

    Positions are the first two principal components of both views' features, scaled to unit length. For each view there
    are images (N, H, W) or (N, D, H, W), features of the nodes (N, F), and neighbours of each node (N, K).
    """
    from matplotlib.figure import Figure

    count = len(features[0])
    together = np.concatenate(features)
    places = _principal_plane(together / np.maximum(np.linalg.norm(together, axis=1, keepdims=True), 1e-12))
    figure = Figure(figsize=(11.0, 5.5), layout="constrained")
    panels = figure.subplots(1, 2, squeeze=False, sharex=True, sharey=True)[0]
    for axes, view, nodes, heads in zip(panels, images, (places[:count], places[count:]), edges, strict=True):
        _draw_graph(axes, _planes(view), nodes, heads)
        axes.set_title(f"{'first' if axes is panels[0] else 'second'} view", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_graph(axes: Axes, pictures: Sequence[AnyArray], nodes: Points, heads: AnyArray) -> None:
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    for tail, neighbours in enumerate(heads):
        for head in neighbours:
            axes.plot(*nodes[[tail, head]].T, color=_EDGE, linewidth=0.7, alpha=0.7, zorder=1)
    for place, picture in zip(nodes, pictures, strict=True):
        thumbnail = OffsetImage(picture, zoom=_THUMBNAIL / max(picture.shape), cmap="gray")
        axes.add_artist(AnnotationBbox(thumbnail, place, frameon=False, zorder=2))
    axes.margins(0.1)
    axes.set_xticks([])
    axes.set_yticks([])


def _planes(images: AnyArray) -> list[AnyArray]:
    """Slices (H, W) of images (N, H, W) or (N, D, H, W), rotated so that a second axis to the front points up."""
    planes = images if images.ndim == 3 else images[:, images.shape[1] // 2]
    return [np.rot90(np.asarray(plane, np.float32)) for plane in planes]


def _principal_plane(features: Points) -> Points:
    """(M, 2): the coordinates of (M, F) along their two widest directions."""
    centred = features - features.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    plane: Points = centred @ directions[:2].T
    return plane
