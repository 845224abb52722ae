"""`segkit train`: from a data folder to a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from segkit.cli import options, training
from segkit.cli.options import parse_settings, print_json, print_stdout, print_table, read_modalities
from segkit.errors import RequestError

if TYPE_CHECKING:
    from segkit.training.config import TrainConfig
    from segkit.training.task import Summary, TrainingRequest

FoldOption = Annotated[
    str | None, typer.Option("-f", "--fold", help="Fold for validation, from 0; or all for cross-validation.")
]
WeightsOption = Annotated[
    Path | None,
    typer.Option("--weights", help="First weights: run folder, nnU-Net results, .safetensors, .pth, .model."),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Plan, print the settings, train nothing.")]


def train(
    data: options.DataArgument,
    output: training.RunOption,
    config: training.ConfigOption = None,
    preset: options.PresetOption = None,
    settings: options.SetOption = None,
    fold: FoldOption = None,
    budget: training.BudgetOption = None,
    memory: options.MemoryOption = None,
    weights: WeightsOption = None,
    exclude: training.ExcludeOption = None,
    layout: options.LayoutOption = None,
    label_scheme: options.SchemeOption = None,
    modality: options.ModalitiesOption = None,
    resume: training.ResumeOption = False,
    allow_changes: training.ChangesOption = False,
    overwrite: training.StartAgainOption = False,
    dry_run: DryRunOption = False,
    device: options.DeviceOption = None,
    gpus: training.GpusOption = None,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Train a network on DATA and write a run folder.

    Patch, batch, spacing and normalisation are planned from the data and the available memory; config.yaml in the run
    folder has every setting and its reason. --config replaces settings of the preset, and options replace both.
    """
    verb = training.TrainingVerb.start(gpus, device, as_json=as_json, quiet=quiet, verbose=verbose)
    from segkit.api.training import TrainingOptions, segmentation_request, train_segmentation

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
    which = _fold(fold)
    request = segmentation_request(data, arguments, fold=which, label_scheme=label_scheme)
    if dry_run:
        _show_plan(request, as_json=verb.as_json)
        return

    def show(summary: Summary) -> None:
        rows = [(name, f"{value:.4f}") for name, value in summary.scores["dice"].items()]
        print_table("Validation", ("output", "Dice"), rows)
        print_stdout(f"Model: {output}  ->  segkit infer -m {output} -i SCANS -o MASKS")

    folds = () if fold is None else ("-f", fold)
    command = ("segkit", "train", data, "-o", output, *folds, "--resume")
    verb.finish(verb.run(lambda request: train_segmentation(request, which), request, *command), show)


def _show_plan(request: TrainingRequest[TrainConfig], *, as_json: bool) -> None:
    """Print the settings with the reasons of the planned ones."""
    from segkit.config import annotated_yaml
    from segkit.training.run import begin, plan_run
    from segkit.training.segmentation import SegmentationKind

    kind = SegmentationKind()
    plan = plan_run(request, kind)
    if plan.config.network.weights is not None:
        begin(plan, kind)  # weights that do not fit are reported now
    if as_json:
        document = {"config": plan.config.model_dump(mode="json"), "reasons": plan.reasons, "estimate": plan.estimate}
        print_json(document)
    else:
        print_stdout(annotated_yaml(plan.config, plan.reasons, has_help=False).removesuffix("\n"))


def _fold(text: str | None) -> int | Literal["all"] | None:
    if text is None:
        return None
    if text == "all":
        return "all"
    if not text.isdigit():
        raise RequestError(f"--fold {text!r} cannot be read", expected="a number from 0, or all")
    return int(text)
