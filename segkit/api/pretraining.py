"""`segkit.pretrain`: an encoder, or an inpainting network, from images without labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segkit.api.arguments import AnyPath, CaseIds, nested_settings
from segkit.api.training import TrainingOptions, run_training
from segkit.errors import RequestError

if TYPE_CHECKING:
    from segkit.training.task import Kind, Summary, TrainingRequest


def pretrain(
    data: AnyPath | Sequence[AnyPath],
    run: AnyPath,
    /,
    *,
    method: str | None = None,
    encoder: str | None = None,
    preset: str | None = None,
    config: AnyPath | None = None,
    budget: str | float | None = None,
    memory: str | float | None = None,
    weights: AnyPath | None = None,
    exclude: CaseIds | None = None,
    layout: str | None = None,
    modalities: Mapping[str, str] | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    allow_changes: bool = False,
    on_progress: Callable[[float, str], None] | None = None,
    **settings: Any,
) -> Summary:
    """Train an encoder on folders of images without labels; `segkit.train(..., weights=run)` starts from it.

    `method` is "graph-matching" (default), "masked", "contrastive" or "inpainting"; networks of the last fill holes in
    `segkit.inpaint`. `encoder` is a family ("revmbunet") or an encoder of segmentation-models-pytorch ("resnet50").
    `summary.scores["before"]` and `["after"]` are the measures on held-out images. The other arguments are those of
    `segkit.train`.

    Raises:
        RequestError: data and arguments do not fit; ConfigError names every wrong setting. Nothing was written.
        DataError: no case can be used.
        TrainingError: the training diverged.
        InterruptedTrainingError: SIGTERM or Ctrl-C; train again with `resume=True`.

    Example:
        >>> segkit.pretrain(["scans", "more_scans"], "encoder", budget="1h")  # doctest: +SKIP
        >>> segkit.train("data", "run", weights="encoder")  # doctest: +SKIP
    """
    options = TrainingOptions(
        run=Path(run), preset=preset, config=config, settings=nested_settings(settings), budget=budget, memory=memory,
        weights=weights, exclude=exclude, layout=layout, modalities=modalities, device=device, resume=resume,
        overwrite=overwrite, allow_changes=allow_changes, on_progress=on_progress,
    )  # fmt: skip
    folders = [data] if isinstance(data, (str, os.PathLike)) else data
    return run_training(*pretraining_request(folders, options, method=method, encoder=encoder))


def pretraining_request(
    data: Sequence[AnyPath], options: TrainingOptions, *, method: str | None = None, encoder: str | None = None
) -> tuple[TrainingRequest[Any], Kind[Any, Any]]:
    """The request of `pretrain`, and its kind of training.

    Raises:
        RequestError: a file, an option or a setting cannot be used.
    """
    files = options.file_layers()
    recorded = options.recorded_settings().get("method")
    for _, layer in files:
        method = method or layer.get("method")
    if recorded and method and method != recorded:
        raise RequestError(
            f"the settings differ from those of the run: method {recorded} -> {method}",
            where=options.run,
            remedy="Omit --method, or start a new run",
        )
    method = method or recorded
    kind, folder = _kind_of(method)
    presets = options.preset_layers(folder)
    if encoder is not None:
        presets = [(name, {**layer, "network": {}}) for name, layer in presets]
        files = [("--encoder", {"network": _network(encoder)}), *files]
    return options.request(data, kind, presets, [*files, *options.option_layers(method=method)]), kind


def _kind_of(method: str | None) -> tuple[Kind[Any, Any], str]:
    """The kind of training, and the folder of its presets."""
    from segkit.config import INPAINTING_PRESETS, PRETRAINING_PRESETS

    if method == "inpainting":
        from segkit.inpainting.run import InpaintingKind

        return InpaintingKind(), INPAINTING_PRESETS
    from segkit.pretraining.run import PretrainingKind

    return PretrainingKind(), PRETRAINING_PRESETS


def _network(encoder: str) -> Mapping[str, Any]:
    """A family in its usual size, or an encoder of segmentation-models-pytorch under a U-Net."""
    from segkit.models.table import MODELS

    if encoder in MODELS:
        return {"family": encoder}
    return {"family": "smp", "size": "unet", "arguments": {"encoder": encoder}}
