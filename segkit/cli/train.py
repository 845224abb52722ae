"""`segkit train`: from a data folder to a run folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

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
    print_json,
    print_table,
    read_case_ids,
    read_modalities,
    set_verbosity,
)
from segkit.errors import RequestError


def train(
    data: DataArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Run folder to write.")],
    config: Annotated[Path | None, typer.Option("--config", help="YAML file laid over the preset.")] = None,
    preset: PresetOption = "default",
    settings: SetOption = None,
    fold: Annotated[str, typer.Option("-f", "--fold", help="Fold that validates, or all for cross-validation.")] = "0",
    budget: Annotated[
        str | None, typer.Option("--budget", help="Wall time of the whole command, e.g. 30m or 2h.")
    ] = None,
    memory: MemoryOption = None,
    exclude: Annotated[
        Path | None, typer.Option("--exclude", help="Text file of case ids to keep out of the run altogether.")
    ] = None,
    layout: LayoutOption = None,
    label_scheme: SchemeOption = None,
    modality: ModalitiesOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run folder stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again in a used run folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan, print the settings, train nothing.")] = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train a network on DATA and write a run folder.

    Patch, batch, spacing and normalisation are planned from the data and the memory at hand; config.yaml in the run
    folder says what was chosen and why. Settings are taken from the preset, then --config, then the options.
    """
    started_s = time.monotonic()
    set_verbosity(is_quiet=quiet, is_verbose=verbose)
    from segkit.config.loading import annotated_yaml, build_config, preset_layers, read_yaml
    from segkit.runtime import pick_device
    from segkit.training.config import TrainConfig
    from segkit.training.planned import RunRequest, plan_run
    from segkit.training.run import cross_validate, train_run

    options: dict[str, object] = {"data": {}, "training": {}}
    of_data = {
        "layout": layout,
        "label_scheme": label_scheme,
        "modalities": read_modalities(modality),
        "exclude": read_case_ids(exclude),
        "fold": None if fold == "all" else _fold_number(fold),
    }
    options["data"] = {key: value for key, value in of_data.items() if value is not None}
    if budget is not None:
        options["training"] = {"budget_minutes": parse_minutes(budget)}
    layers: list[tuple[str, Mapping[str, object]]]
    if resume:  # a run goes on with its own settings; --set and the options still lie over them
        own = next(
            (path for path in (output / "config.yaml", output / "fold_0" / "config.yaml") if path.exists()), None
        )
        layers = [] if own is None else [(str(own), read_yaml(own))]
    else:
        layers = preset_layers(preset)
    if config is not None:
        layers.append((str(config), read_yaml(config)))
    layers += [("--set", parse_settings(settings)), ("options", options)]
    request = RunRequest(
        data=data,
        run=output,
        config=build_config(TrainConfig, layers),
        device=pick_device(device),
        memory_gb=None if memory is None else parse_gigabytes(memory),
        started_s=started_s,
        is_resumed=resume,
        may_overwrite=overwrite,
    )
    if dry_run:
        planned = plan_run(request)
        typer.echo(annotated_yaml(planned.config, planned.reasons, has_help=False), nl=False)
        return
    summary = cross_validate(request) if fold == "all" else train_run(request)
    if as_json:
        print_json(summary.to_json())
        return
    if not quiet:
        print_table("Validation", ("output", "Dice"), [(k, f"{v:.4f}") for k, v in summary.dice.items()])
        typer.echo(f"Model: {output}  ->  segkit infer -m {output} -i SCANS -o MASKS")


def _fold_number(text: str) -> int:
    if not text.isdigit():
        raise RequestError(f"--fold {text!r} cannot be read", expected="a number from 0, or all")
    return int(text)
