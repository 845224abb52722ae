"""Pictures at the end of graph matching: which views a held-out group's images were paired with, and its graphs."""

from __future__ import annotations

from pathlib import Path

import torch

from segkit.pretraining.gradient import matching_of
from segkit.pretraining.graph_matching import GraphMatching
from segkit.pretraining.method import to_device
from segkit.pretraining.task import PretrainingTask
from segkit.report.matching import graph_figure, pairs_figure


@torch.no_grad()
def draw_matching(folder: Path, task: PretrainingTask) -> None:
    """Draw pairs.png and graph.png of the first held-out group into `folder`.

    Raises:
        TypeError: the task is not one of graph matching.
    """
    method = task.model
    if not isinstance(method, GraphMatching):
        raise TypeError(f"{type(method).__name__} matches no graphs")
    method.eval()
    nodes = method.config.nodes
    group = {name: tensor[:nodes] for name, tensor in task.held_out_batch().items()}
    affinities, first, second = method.affinities(to_device(group, next(method.parameters()).device))
    partners = matching_of(affinities, method.config.solver)[0].tolist()
    images = group["first"][:, 0].numpy(), group["second"][:, 0].numpy()
    right = sum(node == partner for node, partner in enumerate(partners))
    title = f"{right} of {nodes} held-out images find their other view"
    pairs_figure(folder / "pairs.png", *images, partners, title)
    features = first[0].float().cpu().numpy(), second[0].float().cpu().numpy()
    edges = affinities.first[0].cpu().numpy(), affinities.second[0].cpu().numpy()
    graph_figure(folder / "graph.png", images, features, edges)
