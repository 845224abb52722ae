"""`segkit pretrain`: from folders of unlabelled images to an encoder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    parse_gigabytes,
    parse_minutes,
    parse_settings,
    preset_for,
    print_json,
    print_table,
    read_case_ids,
    read_modalities,
    set_verbosity,
)
from segkit.cli.progress import progress_bar, resumed_layers
from segkit.cli.train import BudgetOption, ConfigOption, ExcludeOption, ResumeOption, RunOption, StartAgainOption
from segkit.errors import RequestError

if TYPE_CHECKING:
    from segkit.pretraining.run import PretrainSummary

FoldersArgument = Annotated[
    list[Path], typer.Argument(help="Folders with images, in any layout; references are not looked at.")
]
MethodOption = Annotated[
    str | None, typer.Option("--method", help="graph-matching (default), masked or contrastive.", show_default=False)
]
EncoderOption = Annotated[
    str | None,
    typer.Option("--encoder", help="Network: a family (revmbunet, stunet, r2unet, vit) or an smp encoder (resnet50)."),
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
    overwrite: StartAgainOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train an encoder on images without labels; `segkit train --weights RUN` begins with it.

    Networks for images (smp, vit) learn from slices of volumes or from pictures, the others from crops of volumes. One
    patient in five is held out to measure what was learnt.
    """
    started_s = time.monotonic()
    set_verbosity(is_quiet=quiet, is_verbose=verbose)
    from segkit.config.loading import PRETRAINING_PRESETS, build_config, preset_layers, read_yaml
    from segkit.pretraining.config import PretrainConfig
    from segkit.pretraining.run import PretrainRequest, pretrain_run
    from segkit.runtime import pick_device

    chosen_device = pick_device(device)
    if resume and (preset, weights) != (None, None):
        raise RequestError("--resume goes on as the run was begun", remedy="Leave out --preset and --weights")
    if resume:
        layers = resumed_layers(output)
    else:
        layers = preset_layers(preset or preset_for(chosen_device.type), PRETRAINING_PRESETS)
        if encoder is not None:
            layers = [(name, {**layer, "network": _network(encoder)}) for name, layer in layers]
    if config is not None:
        layers.append((str(config), read_yaml(config)))
    options: dict[str, dict[str, Any]] = {
        "data": {"layout": layout, "modalities": read_modalities(modality), "exclude": read_case_ids(exclude)},
        "network": {"weights": None if weights is None else weights.absolute()},
        "training": {"budget_minutes": None if budget is None else parse_minutes(budget)},
    }
    given: dict[str, Any] = {
        section: {key: value for key, value in keys.items() if value is not None} for section, keys in options.items()
    }
    layers += [("--set", parse_settings(settings)), ("options", given | ({"method": method} if method else {}))]
    bar = progress_bar(is_quiet=quiet)
    request = PretrainRequest(
        data=tuple(data),
        run=output,
        config=build_config(PretrainConfig, layers),
        device=chosen_device,
        memory_gb=None if memory is None else parse_gigabytes(memory),
        started_s=started_s,
        is_resumed=resume,
        may_overwrite=overwrite,
        tell=None if bar is None else bar.tell,
    )
    with bar or nullcontext():
        summary = pretrain_run(request)
    _tell(summary, as_json=as_json, quiet=quiet)


def _network(encoder: str) -> Mapping[str, Any]:
    """A family in its usual size, or an encoder of segmentation-models-pytorch under a U-Net."""
    from segkit.models.table import MODELS

    if encoder in MODELS:
        return {"family": encoder}
    return {"family": "smp", "size": "unet", "arguments": {"encoder": encoder}}


def _tell(summary: PretrainSummary, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json(summary.to_json())
    elif not quiet:
        rows = [
            (name, f"{summary.before.get(name, float('nan')):.3f}", f"{v:.3f}") for name, v in summary.after.items()
        ]
        print_table("Held-out images", ("measure", "before", "after"), rows)
        typer.echo(f"Encoder: {summary.run}  ->  segkit train DATA -o RUN --weights {summary.run}")
    if summary.skipped:
        for reason in summary.skipped.values():
            typer.echo(f"left out: {reason}", err=True)
        raise typer.Exit(1)
