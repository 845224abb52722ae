"""`segkit pretrain`: from folders of unlabelled images to an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from segkit.cli import options, training
from segkit.cli.options import parse_settings, print_stdout, print_table, read_modalities

if TYPE_CHECKING:
    from segkit.training.task import Summary

FoldersArgument = Annotated[
    list[Path], typer.Argument(help="Folders with images, in any layout; references are ignored.")
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
    Path | None, typer.Option("--weights", help="First weights: run folder, .safetensors, .pth, .torch.")
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
    """Train an encoder on images without labels, for `segkit train --weights RUN`.

    Networks for images (smp, vit) are trained on pictures or slices of volumes, the others on crops of volumes. One
    patient in five is held out to measure the encoder. --method inpainting trains a network to fill holes, for
    `segkit inpaint -m RUN`.
    """
    verb = training.TrainingVerb.start(gpus, device, as_json=as_json, quiet=quiet, verbose=verbose)
    from segkit.api.pretraining import pretraining_request, train_encoder
    from segkit.api.training import TrainingOptions

    arguments = TrainingOptions(
        run=output,
        preset=preset,
        config=config,
        settings=parse_settings(settings),
        budget=budget,
        memory=memory,
        weights=weights,
        exclude=exclude,
        layout=layout,
        modalities=read_modalities(modality),
        device_name=device,
        resume=resume,
        overwrite=overwrite,
        allow_changes=allow_changes,
    )
    request, kind = pretraining_request(data, arguments, method=method, encoder=encoder)
    command = ("segkit", "pretrain", *data, "-o", output, "--resume")
    verb.finish(verb.run(lambda request: train_encoder(request, kind), request, *command), _show)


def _show(summary: Summary) -> None:
    before, after = summary.scores["before"], summary.scores["after"]
    rows = [(name, f"{before.get(name, float('nan')):.3f}", f"{value:.3f}") for name, value in after.items()]
    print_table("Held-out images", ("measure", "before", "after"), rows)
    if summary.scores["method"] == "inpainting":
        print_stdout(f"Network: {summary.run}  ->  segkit inpaint -m {summary.run} -i SCANS -o OUT")
    print_stdout(f"Encoder: {summary.run}  ->  segkit train DATA -o RUN --weights {summary.run}")
