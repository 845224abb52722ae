"""`segkit pretrain`: from folders of unlabelled images to an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segkit.cli import options, training
from segkit.cli.options import print_stdout, print_table
from segkit.errors import RequestError

if TYPE_CHECKING:
    from segkit.training.task import Kind, Summary

FoldersArgument = Annotated[
    list[Path], typer.Argument(help="Folders with images, in any layout; references are not looked at.")
]
MethodOption = Annotated[
    str | None,
    typer.Option("--method", help="graph-matching (default), masked, contrastive or inpainting.", show_default=False),
]
EncoderOption = Annotated[
    str | None,
    typer.Option(
        "--encoder", help="Network: a family (revmbunet, stunet, inpainter ...) or an smp encoder (resnet50)."
    ),
]
BeginOption = Annotated[
    Path | None, typer.Option("--weights", help="Weights to begin with: run folder, .safetensors, .pth, .torch.")
]


def pretrain(
    data: FoldersArgument,
    output: training.RunOption,
    method: MethodOption = None,
    encoder: EncoderOption = None,
    config: training.ConfigOption = None,
    preset: options.PresetOption = None,
    settings: options.SetOption = None,
    budget: training.BudgetOption = None,
    memory: options.MemoryOption = None,
    weights: BeginOption = None,
    exclude: training.ExcludeOption = None,
    layout: options.LayoutOption = None,
    modality: options.ModalitiesOption = None,
    resume: training.ResumeOption = False,
    allow_changes: training.ChangesOption = False,
    overwrite: training.StartAgainOption = False,
    device: options.DeviceOption = None,
    gpus: training.GpusOption = None,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Train an encoder on images without labels; `segkit train --weights RUN` begins with it.

    Networks for images (smp, vit) learn from slices of volumes or from pictures, the others from crops of volumes. One
    patient in five is held out to measure what was learnt. With --method inpainting the network learns to fill holes,
    and `segkit inpaint -m RUN` does so.
    """
    command = training.TrainingCommand(
        output=output, config=config, preset=preset, settings=settings, budget=budget, memory=memory, weights=weights,
        exclude=exclude, layout=layout, modality=modality, resume=resume, allow_changes=allow_changes,
        overwrite=overwrite, device_name=device, gpus=gpus, as_json=as_json, quiet=quiet, verbose=verbose,
    )  # fmt: skip
    from segkit.training.run import train

    files = command.file_layers()
    recorded = command.recorded_settings().get("method")
    for _, layer in files:
        method = method or layer.get("method")
    if recorded and method and method != recorded:
        raise RequestError(
            f"the settings differ from those of the run: method {recorded} -> {method}",
            where=output,
            remedy="Omit --method, or start a new run",
        )
    method = method or recorded
    kind, folder = _kind_of(method)
    presets = command.preset_layers(folder)
    if encoder is not None:
        presets = [(name, {**layer, "network": {}}) for name, layer in presets]
        files = [("--encoder", {"network": _network(encoder)}), *files]
    request = command.request(data, kind, presets, [*files, *command.option_layers(method=method)])
    summary = command.run(
        lambda request: train(request, kind), request, "segkit", "pretrain", *data, "-o", output, "--resume"
    )
    command.finish(summary, _show)


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


def _show(summary: Summary) -> None:
    before, after = summary.scores["before"], summary.scores["after"]
    rows = [(name, f"{before.get(name, float('nan')):.3f}", f"{value:.3f}") for name, value in after.items()]
    print_table("Held-out images", ("measure", "before", "after"), rows)
    if summary.scores["method"] == "inpainting":
        print_stdout(f"Network: {summary.run}  ->  segkit inpaint -m {summary.run} -i SCANS -o OUT")
    print_stdout(f"Encoder: {summary.run}  ->  segkit train DATA -o RUN --weights {summary.run}")
