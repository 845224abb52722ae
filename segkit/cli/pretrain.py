"""`segkit pretrain`: from folders of unlabelled images to an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from segkit.cli.options import (
    DeviceOption,
    JsonOption,
    LayoutOption,
    MemoryOption,
    ModalitiesOption,
    PresetOption,
    QuietOption,
    SetOption,
    VerboseOption,
    print_table,
    tell,
)
from segkit.cli.training import (
    BudgetOption,
    ChangesOption,
    ConfigOption,
    ExcludeOption,
    GpusOption,
    ResumeOption,
    RunOption,
    StartAgainOption,
    TrainingCommand,
)

if TYPE_CHECKING:
    from segkit.training.config import RunConfig
    from segkit.training.task import Kind, Summary, TrainingRequest

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
    output: RunOption,
    method: MethodOption = None,
    encoder: EncoderOption = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    settings: SetOption = None,
    budget: BudgetOption = None,
    memory: MemoryOption = None,
    weights: BeginOption = None,
    exclude: ExcludeOption = None,
    layout: LayoutOption = None,
    modality: ModalitiesOption = None,
    resume: ResumeOption = False,
    allow_changes: ChangesOption = False,
    overwrite: StartAgainOption = False,
    device: DeviceOption = None,
    gpus: GpusOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train an encoder on images without labels; `segkit train --weights RUN` begins with it.

    Networks for images (smp, vit) learn from slices of volumes or from pictures, the others from crops of volumes. One
    patient in five is held out to measure what was learnt. With --method inpainting the network learns to fill holes,
    and `segkit inpaint -m RUN` does so.
    """
    command = TrainingCommand(
        output, config, preset, settings, budget, memory, weights, exclude, layout, modality,
        resume, allow_changes, overwrite, device, gpus, as_json, quiet, verbose,
    )  # fmt: skip
    from segkit.training.run import train

    own = [*command.resumed_layers(), *command.file_layers()]
    for _, layer in own:
        method = method or str(layer.get("method") or "") or None
    choice = _choice_of(method)
    presets = command.preset_layers(choice.presets)
    if encoder is not None:
        presets = [(name, {**layer, "network": _network(encoder)}) for name, layer in presets]
    layers = [*presets, *own, *command.option_layers(method=method)]
    request = command.request(data, choice.config, layers)

    def work(request: TrainingRequest[Any]) -> Summary:
        return train(request, choice.kind)

    summary = command.run(work, request, "segkit", "pretrain", *data, "-o", output, "--resume")
    command.finish(summary, _show)


class _Choice(NamedTuple):
    """A kind of training with its settings and the folder of its presets."""

    presets: str
    config: type[RunConfig]
    kind: Kind[Any, Any]


def _choice_of(method: str | None) -> _Choice:
    from segkit.config import INPAINTING_PRESETS, PRETRAINING_PRESETS

    if method == "inpainting":
        from segkit.inpainting.config import InpaintingConfig
        from segkit.inpainting.run import InpaintingKind

        return _Choice(INPAINTING_PRESETS, InpaintingConfig, InpaintingKind())
    from segkit.pretraining.methods import PretrainConfig
    from segkit.pretraining.run import PretrainingKind

    return _Choice(PRETRAINING_PRESETS, PretrainConfig, PretrainingKind())


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
        tell(f"Network: {summary.run}  ->  segkit inpaint -m {summary.run} -i SCANS -o OUT")
    tell(f"Encoder: {summary.run}  ->  segkit train DATA -o RUN --weights {summary.run}")
