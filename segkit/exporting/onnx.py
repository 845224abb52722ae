"""Exports of run folders: the graph is written, compared with the network, measured and written in other precisions.

All is written to a hidden folder beside the target, which gets its name when all checks have passed.
"""

import logging
import math
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from segkit.checkpoint.card import ExportCard, GraphCard, ModelCard
from segkit.checkpoint.model import load_model
from segkit.checkpoint.run_folder import CARD_NAME, load_card, model_folders, require_segmentation
from segkit.errors import CheckpointError, RequestError, as_request
from segkit.exporting.cases import MeasuringCases, validation_cases
from segkit.exporting.output import new_folder
from segkit.exporting.precision import write_fp16, write_int8
from segkit.inference.backends import Array, Backend, TorchBackend, installed_backends, open_graph
from segkit.inference.graph import OPSET, graph_files, require_onnx, write_graph
from segkit.inference.parity import check_parity, check_restored, random_windows, seconds_per_window, windows_with_holes
from segkit.inference.predictor import Predictor
from segkit.reading.files import file_sha256

Precision = Literal["fp32", "fp16", "int8"]

GRAPH_NAMES: dict[Precision, str] = {"fp32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}

LARGEST_DICE_LOSS = 0.005
"""Allowed loss of mean Dice of an approved graph against float32."""
SMALLEST_SPEED_UP = 1.5
"""Speed of an approved int8 graph relative to float32, in the fastest backend of each."""

_RANDOM_WINDOWS = 2
_HOLED_WINDOWS = 4
_REAL_WINDOWS = 4
_CALIBRATION_WINDOWS = 16
_VERSIONS = ("onnx", "onnxscript", "onnxruntime", "openvino")

_log = logging.getLogger(__name__)


def export_models(
    model: Path,
    output: Path,
    *,
    precision: Precision = "fp32",
    cases: MeasuringCases | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the export of a run folder; of a cross-validation one in each `fold_K` of `output`.

    Returns the document of `--json`: `{"output", "models": [{"folder", "export", "cases"}]}`.

    `cases` are those to compare, calibrate and measure with, by default the validation cases of the run, if found;
    `precision` is written besides fp32. `output` is a free folder; with `overwrite` an export in it is replaced.

    Raises:
        RequestError: a package is not installed, the model cannot be exported, or `output` is in use.
        CheckpointError: a graph differs from its network; `output` is not changed.
        DataError: the folder cannot be written to.
    """
    require_onnx()
    if not installed_backends():
        raise RequestError(
            "there is no runtime to check a graph with", remedy="pip install 'segkit[onnx]' or 'segkit[openvino]'"
        )
    try:
        folders = model_folders(model)
        cards = [load_card(folder) for folder in folders]
    except CheckpointError as error:
        raise as_request(error) from error
    for card, folder in zip(cards, folders, strict=True):
        _require_exportable(card, folder, precision, cases)
    with new_folder(output, model, overwrite=overwrite) as staging:
        written = []
        for folder, card in zip(folders, cards, strict=True):
            place = Path() if len(folders) == 1 else Path(folder.name)
            _log.info("exporting %s", folder)
            export, source = _export(folder, card, staging / place, precision, cases)
            written.append({"folder": str(output / place), "export": export.model_dump(mode="json"), "cases": source})
    return {"output": str(output), "models": written}


def _require_exportable(card: ModelCard, folder: Path, precision: Precision, cases: MeasuringCases | None) -> None:
    if card.export is not None:
        raise RequestError("is an export already", where=folder, expected="a run folder of `segkit train`")
    if card.nnunet is not None and (precision != "fp32" or cases is not None):
        found = "models of nnU-Net are exported in fp32, compared on random windows"
        raise RequestError(found, where=folder, remedy="Leave out --precision and -i")
    if card.task != "inpainting":
        require_segmentation(card, folder)
    elif precision != "fp32" or cases is not None:
        raise RequestError(
            f"{precision} and cases are judged by masks, which an inpainting model does not make",
            where=folder,
            remedy="Leave out --precision and -i: its graph is compared with the network on windows with holes",
        )


def _export(
    folder: Path, card: ModelCard, target: Path, precision: Precision, cases: MeasuringCases | None
) -> tuple[ExportCard, str]:
    """Export one model into `target`; returns its export card and the source of the real cases."""
    network = load_model(folder)
    reference = TorchBackend(network)
    cases = None if card.task == "inpainting" else cases or validation_cases(folder)
    if cases is None and precision != "fp32":
        raise RequestError(
            f"there are no cases to measure {precision} with: the data of the run were moved",
            where=folder,
            remedy="Name cases with references: -i DATA",
        )
    target.mkdir(parents=True, exist_ok=True)
    path = target / GRAPH_NAMES["fp32"]
    write_graph(network, path, card.input_channels, card.patch_size)
    backends = [open_graph(path, name) for name in installed_backends()]
    real = [] if cases is None else cases.windows(Predictor(reference, card), _CALIBRATION_WINDOWS)
    if card.segmentation is None:
        holed = windows_with_holes(card.network.in_channels, card.context, card.patch_size, _HOLED_WINDOWS)
        windows = [window.stacked for window in holed]
        expected = [reference(window) for window in windows]
        compared = [check_restored(backend, holed, expected) for backend in backends]
    else:
        noise = random_windows(card.input_channels, card.patch_size, _RANDOM_WINDOWS)
        windows = [*real[:_REAL_WINDOWS], *noise]
        expected = [reference(window) for window in windows]
        compared = [
            check_parity(network, backend, windows, expected, card.segmentation.activation) for backend in backends
        ]
    parity = {backend.name: result.to_json() for backend, result in zip(backends, compared, strict=True)}
    seconds = seconds_per_window([reference, *backends], windows[0])
    graphs = [_graph_card(path, "fp32", dict(zip(parity, seconds[1:], strict=True)))]
    if precision != "fp32" and cases is not None:
        graphs.append(_shorter(card, path, precision, backends, cases, real))
    checked = {"torch": {"seconds": round(seconds[0], 5)}, **parity}
    export = ExportCard(opset=OPSET, graphs=tuple(graphs), parity=checked)
    installed = {distribution.metadata["Name"].lower() for distribution in metadata.distributions()}
    versions = {name: metadata.version(name) for name in _VERSIONS if name in installed}
    card = card.model_copy(update={"export": export, "versions": {**card.versions, **versions}})
    (target / CARD_NAME).write_text(card.to_text(), encoding="utf-8")
    return export, "none" if cases is None else cases.source


def _shorter(
    card: ModelCard,
    path: Path,
    precision: Precision,
    backends: Sequence[Backend],
    cases: MeasuringCases,
    real: Sequence[Array],
) -> GraphCard:
    """Write the graph `path` in fp16 or int8 as well; measure it and decide whether it is approved."""
    if not real:
        raise RequestError(f"none of the cases can be used to measure {precision} with", where=cases.source)
    target = path.with_name(GRAPH_NAMES[precision])
    if precision == "fp16":
        write_fp16(path, target)
    else:
        write_int8(path, target, real)
    shorter = [open_graph(target, backend.name) for backend in backends]
    seconds = seconds_per_window([*backends, *shorter], real[0])
    before, after = seconds[: len(backends)], seconds[len(backends) :]
    fastest = backends[before.index(min(before))]
    dice, *others = cases.mean_dice([Predictor(backend, card) for backend in (fastest, *shorter)])
    if math.isnan(dice):
        raise RequestError(
            f"no case has a reference to measure {precision} by", where=cases.source, remedy="Name others: -i DATA"
        )
    change = min(others) - dice  # in the worst backend
    speed_up = min(before) / min(after)
    is_approved = change >= -LARGEST_DICE_LOSS and (precision == "fp16" or speed_up >= SMALLEST_SPEED_UP)
    if not is_approved:
        wanted = f" and {SMALLEST_SPEED_UP} times as fast" if precision == "int8" else ""
        _log.warning(
            "%s changes Dice by %+.4f and is %.2f times as fast as fp32; required are at least -%g%s. It is kept, but "
            "--backend auto will not use it",
            *(precision, change, speed_up, LARGEST_DICE_LOSS, wanted),
        )
    names = [backend.name for backend in backends]
    graph = _graph_card(target, precision, dict(zip(names, after, strict=True)))
    return graph.model_copy(update={"dice_change": round(change, 6), "is_approved": is_approved})


def _graph_card(path: Path, precision: Precision, seconds: dict[str, float]) -> GraphCard:
    return GraphCard(
        file=path.name,
        precision=precision,
        sha256={file.name: file_sha256(file) for file in graph_files(path)},
        seconds={name: round(value, 5) for name, value in seconds.items()},
    )
