"""`segkit train`: from a data folder to a run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segkit.cli import options, training
from segkit.cli.options import print_json, print_stdout, print_table
from segkit.errors import RequestError

if TYPE_CHECKING:
    from segkit.training.config import TrainConfig
    from segkit.training.segmentation import SegmentationKind
    from segkit.training.task import Summary, TrainingRequest

FoldOption = Annotated[
    str | None, typer.Option("-f", "--fold", help="Fold that validates, from 0; or all for cross-validation.")
]
WeightsOption = Annotated[
    Path | None,
    typer.Option("--weights", help="Weights to begin with: run folder, nnU-Net results, .safetensors, .pth, .model."),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Plan, print the settings, train nothing.")]


_OF_MEMORY = ("mode", "chunks", "encoder_weights")
"""Arguments of a network that another training need not share."""


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

    Patch, batch, spacing and normalisation are planned from the data and the memory at hand; config.yaml in the run
    folder says what was chosen and why. Settings are taken from the preset, then --config, then the options.
    """
    command = training.TrainingCommand(
        output=output, config=config, preset=preset, settings=settings, budget=budget, memory=memory, weights=weights,
        exclude=exclude, layout=layout, modality=modality, resume=resume, allow_changes=allow_changes,
        overwrite=overwrite, device_name=device, gpus=gpus, as_json=as_json, quiet=quiet, verbose=verbose,
    )  # fmt: skip
    from segkit.config import PRESETS
    from segkit.training import run
    from segkit.training.segmentation import SegmentationKind

    kind = SegmentationKind()
    options_of_data = {"label_scheme": label_scheme, "fold": _fold_number(fold)}
    layers = [*_network_of(weights), *command.file_layers(), *command.option_layers(options_of_data)]
    request = command.request([data], kind, command.preset_layers(PRESETS), layers)
    if dry_run:
        _show_plan(request, kind, as_json=command.as_json)
        return

    def work(request: TrainingRequest[TrainConfig]) -> Summary:
        return run.cross_validate(request) if fold == "all" else run.train(request, kind)

    def show(summary: Summary) -> None:
        rows = [(name, f"{value:.4f}") for name, value in summary.scores["dice"].items()]
        print_table("Validation", ("output", "Dice"), rows)
        print_stdout(f"Model: {output}  ->  segkit infer -m {output} -i SCANS -o MASKS")

    folds = () if fold is None else ("-f", fold)
    summary = command.run(work, request, "segkit", "train", data, "-o", output, *folds, "--resume")
    command.finish(summary, show)


def _show_plan(request: TrainingRequest[TrainConfig], kind: SegmentationKind, *, as_json: bool) -> None:
    """Print the settings with what planning chose and why."""
    from segkit.config import annotated_yaml
    from segkit.training.run import begin, plan_run

    plan = plan_run(request, kind)
    if plan.config.network.weights is not None:
        begin(plan, kind)  # weights that do not fit are reported now
    if as_json:
        document = {"config": plan.config.model_dump(mode="json"), "reasons": plan.reasons, "estimate": plan.estimate}
        print_json(document)
    else:
        print_stdout(annotated_yaml(plan.config, plan.reasons, has_help=False).removesuffix("\n"))


def _network_of(weights: Path | None) -> list[tuple[str, Mapping[str, Any]]]:
    """The network that a run folder was trained as, as a layer over the preset; none for files without a card.

    What suited that training's memory (mode, chunks) is planned anew.
    """
    if weights is None or not weights.is_dir():
        return []
    from segkit.checkpoint.run_folder import load_card, model_folders

    network = load_card(model_folders(weights)[0]).network
    arguments = {name: value for name, value in network.arguments.items() if name not in _OF_MEMORY}
    return [(str(weights), {"network": {"family": network.family, "size": network.size, "arguments": arguments}})]


def _fold_number(text: str | None) -> int | None:
    if text is None or text == "all":
        return None
    if not text.isdigit():
        raise RequestError(f"--fold {text!r} cannot be read", expected="a number from 0, or all")
    return int(text)
