"""ONNX graphs and the cards beside them, opened and computed by each runtime."""

from __future__ import annotations

import json
from functools import partial
from math import prod
from pathlib import Path

from fuzzing import seeds
from fuzzing.mutators.documents import mutated_json
from fuzzing.mutators.graphs import mutated_graph
from fuzzing.parser import Files, Parser
from fuzzing.parsers.cards import digest

_LARGEST_PATCH_VOXELS = 32**3
"""More is no defect of what reads a card: whoever asks for large windows gets them."""


def _graph(folder: Path, path: Path, backend: str) -> None:
    """Segment a scan with a graph whose card, if it is not the hostile one, is right about its files."""
    import numpy as np

    from segkit.checkpoint.run_folder import load_card
    from segkit.errors import is_memory_error
    from segkit.inference.predictor import Predictor
    from segkit.reading.volume import Grid, Volume

    card_path = folder / "model.json"
    if path != card_path:
        card_path.write_bytes(seeds.as_json(seeds.GRAPH_CARD))
    card = load_card(folder)
    if card.export is None or prod(card.patch_size) > _LARGEST_PATCH_VOXELS:
        return
    document = json.loads(card_path.read_bytes())
    for graph in document["export"]["graphs"]:
        graph["sha256"] = {file.name: digest(file) for file in folder.glob("model.onnx*")}
    card_path.write_bytes(seeds.as_json(document))
    voxels = np.arange(9 * 8 * 7, dtype=np.float32).reshape(9, 8, 7)
    try:
        predictor = Predictor.load(folder, "cpu", backend, threads=1)
        predictor(Volume(voxels, Grid(voxels.shape, np.eye(4))), with_probabilities=True)
    except Exception as error:
        if not is_memory_error(error):  # which are told as such; what a graph asks its runtime for is not bounded
            raise


def _exports() -> list[Files]:
    graph = seeds.onnx_graph()
    return [
        {"model.onnx": graph},
        *({"model.onnx": seeds.onnx_network(has_function=has_function)} for has_function in (False, True)),
        {"model.onnx": seeds.onnx_graph("model.onnx.data"), "model.onnx.data": b"\x00\x00\x80\x3f" * 2},
        {"model.json": seeds.as_json(seeds.GRAPH_CARD), "model.onnx": graph},
    ]


PARSERS = tuple(
    Parser(
        f"onnx-{backend}",
        _exports,
        {".json": mutated_json, "": mutated_graph},
        partial(_graph, backend=backend),
        first_check="is not an ONNX file|INVALID_PROTOBUF|ParseFromIstream|Invalid JSON",
    )
    for backend in ("onnxruntime", "openvino")
)
