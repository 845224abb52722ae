"""`segkit pretrain`: from folders of unlabelled images to an encoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
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
    parse_gigabytes,
    parse_minutes,
    parse_settings,
    preset_for,
    print_json,
    print_table,
    read_case_ids,
    read_modalities,
    set_verbosity,
    tell,
    tell_aside,
)
from segkit.cli.processes import GpusOption, spread_over
from segkit.cli.progress import interruptible, progress_bar, resumed_layers
from segkit.cli.train import (
    BudgetOption,
    ChangesOption,
    ConfigOption,
    ExcludeOption,
    ResumeOption,
    RunOption,
    StartAgainOption,
)
from segkit.errors import RequestError
from segkit.runtime import process_place

if TYPE_CHECKING:
    from segkit.config import Config
    from segkit.training.request import UnlabelledRequest
    from segkit.training.unlabelled import UnlabelledSummary

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
    started_s = time.monotonic()
    spread_over(gpus, device)
    quiet, as_json = quiet or process_place().rank > 0, as_json and process_place().rank == 0
    set_verbosity(is_quiet=quiet, is_verbose=verbose)
    from segkit.config import build_config, preset_layers, read_yaml
    from segkit.runtime import pick_device
    from segkit.training.distributed import joined_ranks

    chosen_device = pick_device(device)
    if allow_changes and not resume:
        raise RequestError("--allow-changes is about a run that is resumed", remedy="Add --resume, or leave it out")
    if resume and (preset, weights) != (None, None):
        raise RequestError("--resume goes on as the run was begun", remedy="Leave out --preset and --weights")
    layers = resumed_layers(output) if resume else []
    if config is not None:
        layers.append((str(config), read_yaml(config)))
    for _, layer in layers:
        method = method or str(layer.get("method") or "") or None
    kind = _kind_of(method)
    if not resume:
        begun = preset_layers(preset or preset_for(chosen_device.type), kind.presets)
        if encoder is not None:
            begun = [(name, {**layer, "network": _network(encoder)}) for name, layer in begun]
        layers = [*begun, *layers]
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
    request: UnlabelledRequest[Any] = kind.request(
        data=tuple(data),
        run=output,
        config=build_config(kind.config, layers),
        device=chosen_device,
        memory_gb=None if memory is None else parse_gigabytes(memory),
        started_s=started_s,
        resume=resume,
        overwrite=overwrite,
        allow_changes=allow_changes,
        on_progress=None if bar is None else bar.tell,
    )
    with (
        joined_ranks(request.device, request.config.training.rank_timeout_s) as ranks,
        bar or nullcontext(),
        interruptible("segkit", "pretrain", *data, "-o", output, "--resume"),
    ):
        summary = kind.run(replace(request, ranks=ranks))
    _tell(summary, as_json=as_json, quiet=quiet)


class _Kind(NamedTuple):
    """What a group of methods has of its own."""

    presets: str
    config: type[Config]
    request: Callable[..., UnlabelledRequest[Any]]
    run: Callable[[Any], UnlabelledSummary]


def _kind_of(method: str | None) -> _Kind:
    from segkit.config import INPAINTING_PRESETS, PRETRAINING_PRESETS

    if method == "inpainting":
        from segkit.inpainting.config import InpaintingConfig
        from segkit.inpainting.run import InpaintingRequest, inpainting_run

        return _Kind(INPAINTING_PRESETS, InpaintingConfig, InpaintingRequest, inpainting_run)
    from segkit.pretraining.methods import PretrainConfig
    from segkit.pretraining.run import PretrainRequest, pretrain_run

    return _Kind(PRETRAINING_PRESETS, PretrainConfig, PretrainRequest, pretrain_run)


def _network(encoder: str) -> Mapping[str, Any]:
    """A family in its usual size, or an encoder of segmentation-models-pytorch under a U-Net."""
    from segkit.models.table import MODELS

    if encoder in MODELS:
        return {"family": encoder}
    return {"family": "smp", "size": "unet", "arguments": {"encoder": encoder}}


def _tell(summary: UnlabelledSummary, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json(summary.to_json())
    elif not quiet:
        rows = [
            (name, f"{summary.before.get(name, float('nan')):.3f}", f"{v:.3f}") for name, v in summary.after.items()
        ]
        print_table("Held-out images", ("measure", "before", "after"), rows)
        if summary.method == "inpainting":
            tell(f"Network: {summary.run}  ->  segkit inpaint -m {summary.run} -i SCANS -o OUT")
        tell(f"Encoder: {summary.run}  ->  segkit train DATA -o RUN --weights {summary.run}")
    if summary.skipped:
        for reason in summary.skipped.values():
            tell_aside(f"left out: {reason}")
        raise typer.Exit(1)
