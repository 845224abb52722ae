"""`segkit train`: from a data folder to a run folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from segkit.cli.options import (
    DataArgument,
    DeviceOption,
    JsonOption,
    LayoutOption,
    MemoryOption,
    ModalitiesOption,
    PresetOption,
    QuietOption,
    SchemeOption,
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
from segkit.errors import RequestError
from segkit.runtime import process_place

RunOption = Annotated[Path, typer.Option("-o", "--output", help="Run folder to write.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML file laid over the preset.")]
FoldOption = Annotated[
    str | None, typer.Option("-f", "--fold", help="Fold that validates, from 0; or all for cross-validation.")
]
BudgetOption = Annotated[str | None, typer.Option("--budget", help="Wall time of the whole command, e.g. 30m or 2h.")]
WeightsOption = Annotated[
    Path | None,
    typer.Option("--weights", help="Weights to begin with: run folder, nnU-Net results, .safetensors, .pth, .model."),
]
ExcludeOption = Annotated[
    Path | None, typer.Option("--exclude", help="Text file of case ids to keep out of the run altogether.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on where the run folder stopped.")]
ChangesOption = Annotated[
    bool, typer.Option("--allow-changes", help="Let --resume go on with other settings than before; they are recorded.")
]
StartAgainOption = Annotated[bool, typer.Option("--overwrite", help="Start again in a used run folder.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Plan, print the settings, train nothing.")]


_OF_MEMORY = ("mode", "chunks", "encoder_weights")
"""Arguments of a network that another training need not share."""


def train(
    data: DataArgument,
    output: RunOption,
    config: ConfigOption = None,
    preset: PresetOption = None,
    settings: SetOption = None,
    fold: FoldOption = None,
    budget: BudgetOption = None,
    memory: MemoryOption = None,
    weights: WeightsOption = None,
    exclude: ExcludeOption = None,
    layout: LayoutOption = None,
    label_scheme: SchemeOption = None,
    modality: ModalitiesOption = None,
    resume: ResumeOption = False,
    allow_changes: ChangesOption = False,
    overwrite: StartAgainOption = False,
    dry_run: DryRunOption = False,
    device: DeviceOption = None,
    gpus: GpusOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train a network on DATA and write a run folder.

    Patch, batch, spacing and normalisation are planned from the data and the memory at hand; config.yaml in the run
    folder says what was chosen and why. Settings are taken from the preset, then --config, then the options.
    """
    started_s = time.monotonic()
    spread_over(gpus, device)
    quiet, as_json = quiet or process_place().rank > 0, as_json and process_place().rank == 0
    set_verbosity(is_quiet=quiet, is_verbose=verbose)
    from segkit.config import annotated_yaml, build_config, preset_layers, read_yaml
    from segkit.runtime import pick_device
    from segkit.training.config import TrainConfig
    from segkit.training.distributed import joined_ranks
    from segkit.training.folds import cross_validate
    from segkit.training.planned import plan_run
    from segkit.training.request import RunRequest
    from segkit.training.run import begin, train_run

    chosen_device = pick_device(device)
    if allow_changes and not resume:
        raise RequestError("--allow-changes is about a run that is resumed", remedy="Add --resume, or leave it out")
    if resume and preset is not None:
        raise RequestError("--preset cannot be changed by --resume", remedy="Leave it out, or start a new run")
    if resume and weights is not None:
        raise RequestError("--resume goes on with the run's own weights", remedy="Leave out --weights")
    layers = resumed_layers(output) if resume else preset_layers(preset or preset_for(chosen_device.type))
    layers += _network_of(weights)
    if config is not None:
        layers.append((str(config), read_yaml(config)))
    layers += [
        ("--set", parse_settings(settings)),
        ("options", _options(layout, label_scheme, modality, exclude, fold, budget, weights)),
    ]
    bar = progress_bar(is_quiet=quiet)
    request = RunRequest(
        data=data,
        run=output,
        config=build_config(TrainConfig, layers),
        device=chosen_device,
        memory_gb=None if memory is None else parse_gigabytes(memory),
        started_s=started_s,
        resume=resume,
        overwrite=overwrite,
        allow_changes=allow_changes,
        on_progress=None if bar is None else bar.tell,
    )
    if dry_run:
        planned = plan_run(request)
        if planned.config.network.weights is not None:
            begin(planned)  # weights that do not fit are told now
        if as_json:
            plan = {"config": planned.config.model_dump(mode="json"), "reasons": planned.reasons}
            print_json({**plan, "estimate": planned.estimate})
        else:
            tell(annotated_yaml(planned.config, planned.reasons, has_help=False).removesuffix("\n"))
        return
    folds = () if fold is None else ("-f", fold)
    with (
        joined_ranks(request.device, request.config.training.rank_timeout_s) as ranks,
        bar or nullcontext(),
        interruptible("segkit", "train", data, "-o", output, *folds, "--resume"),
    ):
        request = replace(request, ranks=ranks)
        summary = cross_validate(request) if fold == "all" else train_run(request)
    if as_json:
        print_json(summary.to_json())
    elif not quiet:
        print_table("Validation", ("output", "Dice"), [(k, f"{v:.4f}") for k, v in summary.dice.items()])
        tell(f"Model: {output}  ->  segkit infer -m {output} -i SCANS -o MASKS")
    if summary.skipped:
        for reason in summary.skipped.values():
            tell_aside(f"left out: {reason}")
        raise typer.Exit(1)


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


def _options(
    layout: str | None,
    label_scheme: str | None,
    modality: list[str] | None,
    exclude: Path | None,
    fold: str | None,
    budget: str | None,
    weights: Path | None,
) -> dict[str, dict[str, object]]:
    """The options that are settings too, as a layer over the others; what was not given is left out."""
    of_data = {
        "layout": layout,
        "label_scheme": label_scheme,
        "modalities": read_modalities(modality),
        "exclude": read_case_ids(exclude),
        "fold": _fold_number(fold),
    }
    of_network = {"weights": None if weights is None else weights.absolute()}
    of_training = {"budget_minutes": None if budget is None else parse_minutes(budget)}
    return {
        section: {key: value for key, value in given.items() if value is not None}
        for section, given in (("data", of_data), ("network", of_network), ("training", of_training))
    }


def _fold_number(text: str | None) -> int | None:
    if text is None or text == "all":
        return None
    if not text.isdigit():
        raise RequestError(f"--fold {text!r} cannot be read", expected="a number from 0, or all")
    return int(text)
