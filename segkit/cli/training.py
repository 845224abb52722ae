"""What `segkit train` and `segkit pretrain` share: options, settings in layers, several processes, and the results."""

from __future__ import annotations

import functools
import logging
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segkit.api.arguments import parse_gigabytes, parse_minutes, read_case_ids
from segkit.cli.options import (
    console,
    parse_settings,
    preset_for,
    print_json,
    print_stderr,
    read_modalities,
    set_verbosity,
)
from segkit.errors import RequestError, on_one_line
from segkit.runtime import process_place

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from segkit.training.task import ConfigT, Kind, Summary, TrainingRequest

_log = logging.getLogger(__name__)

RunOption = Annotated[Path, typer.Option("-o", "--output", help="Run folder to write.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML file with settings over the preset.")]
BudgetOption = Annotated[str | None, typer.Option("--budget", help="Wall time of the whole command, e.g. 30m or 2h.")]
ExcludeOption = Annotated[
    Path | None, typer.Option("--exclude", help="Text file of case ids to keep out of the run altogether.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run; options must match its settings.")]
ChangesOption = Annotated[
    bool, typer.Option("--allow-changes", help="Accept changed settings with --resume; they are recorded.")
]
StartAgainOption = Annotated[bool, typer.Option("--overwrite", help="Start again in a used run folder.")]
GpusOption = Annotated[
    int | None, typer.Option("--gpus", help="GPUs of this machine to train on together; torchrun starts more.", min=1)
]

Layer = tuple[str, Mapping[str, Any]]
"""Where settings come from, and the settings."""


@dataclass(kw_only=True)
class TrainingCommand:
    """The options that the training commands share. To be made first, because it may start further processes."""

    output: Path
    config: Path | None
    preset: str | None
    settings: list[str] | None
    budget: str | None
    memory: str | None
    weights: Path | None
    exclude: Path | None
    layout: str | None
    modality: list[str] | None
    resume: bool
    allow_changes: bool
    overwrite: bool
    device_name: str | None
    gpus: int | None
    as_json: bool
    quiet: bool
    verbose: bool
    started_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        spread_over(self.gpus, self.device_name)
        is_first = process_place().rank == 0
        self.quiet, self.as_json = self.quiet or not is_first, self.as_json and is_first
        set_verbosity(is_quiet=self.quiet, is_verbose=self.verbose)
        from segkit.runtime import pick_device

        self.device: torch.device = pick_device(self.device_name)
        if self.allow_changes and not self.resume:
            raise RequestError("--allow-changes is for resumed runs", remedy="Add --resume, or omit --allow-changes")

    def recorded_settings(self) -> Mapping[str, Any]:
        """The settings of the run that is resumed; empty for a new run.

        Raises:
            RequestError: there is no run to resume.
        """
        from segkit.config import read_yaml

        if not self.resume:
            return {}
        if not (self.output / "config.yaml").exists():
            raise RequestError("there is nothing to resume", where=self.output, remedy="Start it without --resume")
        return read_yaml(self.output / "config.yaml")

    def preset_layers(self, folder: str) -> list[Layer]:
        """The preset of a folder; of a resumed run only one that --preset names."""
        from segkit.config import preset_layers

        name = self.preset or (None if self.resume else preset_for(self.device.type))
        return preset_layers(name, folder)

    def file_layers(self) -> list[Layer]:
        """The settings of --config."""
        from segkit.config import read_yaml

        return [] if self.config is None else [(str(self.config), read_yaml(self.config))]

    def option_layers(self, of_data: Mapping[str, Any] | None = None, method: str | None = None) -> list[Layer]:
        """The settings of --set and of the other options; `of_data` has further ones of the section data."""
        sections = {
            "data": {
                "layout": self.layout,
                "modalities": read_modalities(self.modality),
                "exclude": read_case_ids(self.exclude),
                **(of_data or {}),
            },
            "network": {"weights": None if self.weights is None else self.weights.absolute()},
            "training": {"budget_minutes": None if self.budget is None else parse_minutes(self.budget)},
        }
        given: dict[str, Any] = {
            section: {key: value for key, value in options.items() if value is not None}
            for section, options in sections.items()
        }
        return [("--set", parse_settings(self.settings)), ("options", given | ({"method": method} if method else {}))]

    def request(
        self, data: Sequence[Path], kind: Kind[ConfigT, Any], presets: Sequence[Layer], layers: Sequence[Layer]
    ) -> TrainingRequest[ConfigT]:
        """The request: settings of the resumed run, then those of the presets, then those of the other layers.

        Raises:
            RequestError: a setting is not valid, or a resumed run is given other weights to begin with.
        """
        from segkit.config import build_config
        from segkit.training.task import TrainingRequest

        recorded = self.recorded_settings()
        network = recorded.get("network")
        origin = network.get("weights") if isinstance(network, Mapping) else None
        if self.resume and self.weights is not None and str(self.weights.absolute()) != origin:
            raise RequestError(
                f"--weights {self.weights} differs from the run, which began with {origin or 'random weights'}",
                where=self.output,
                remedy="Omit --weights: a resumed run continues with its own weights",
            )
        layers = [(str(self.output / "config.yaml"), recorded), *suited_presets(presets, layers), *layers]
        return TrainingRequest(
            data=tuple(data),
            run=self.output,
            config=build_config(kind.config_type, layers),
            device=self.device,
            memory_gb=None if self.memory is None else parse_gigabytes(self.memory),
            started_s=self.started_s,
            resume=self.resume,
            overwrite=self.overwrite,
            allow_changes=self.allow_changes,
        )

    def run(
        self,
        work: Callable[[TrainingRequest[ConfigT]], Summary],
        request: TrainingRequest[ConfigT],
        *command: object,
    ) -> Summary:
        """Train with the other processes, and with a progress bar where standard error is a terminal.

        SIGTERM ends the training as Ctrl-C does.

        Raises:
            InterruptedTrainingError: a signal ended it; `command` is named as the one that resumes the run.
        """
        from segkit.training.distributed import joined_ranks
        from segkit.training.interruption import InterruptedTrainingError, terminated_as_interrupted

        screen = console()
        bar = ProgressBar(screen) if screen.is_terminal and not self.quiet else None
        timeout_s = request.config.training.rank_timeout_s
        with joined_ranks(request.device, timeout_s) as ranks, bar or nullcontext(), terminated_as_interrupted():
            try:
                return work(replace(request, ranks=ranks, on_progress=None if bar is None else bar.update))
            except InterruptedTrainingError as error:
                remedy = f"Resume with: {shlex.join(map(str, command))}"
                raise InterruptedTrainingError(error.found, where=error.where, remedy=remedy) from None

    def finish(self, summary: Summary, show: Callable[[Summary], None]) -> None:
        """Print the summary, as JSON or by `show`, and the cases that were left out.

        Raises:
            typer.Exit: with code 1, if any was.
        """
        if self.as_json:
            print_json(summary.to_json())
        elif not self.quiet:
            show(summary)
        if summary.skipped:
            for reason in summary.skipped.values():
                print_stderr(f"left out: {reason}")
            raise typer.Exit(1)


class ProgressBar:
    """A bar with the remaining time, for a terminal."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        text = TextColumn("{task.description}", markup=False)
        self.bar = Progress(text, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console)
        self.task = self.bar.add_task("planning", total=1.0)

    def __enter__(self) -> ProgressBar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, done: float, message: str) -> None:
        """Show the completed share, 0 to 1, and a message."""
        self.bar.update(self.task, completed=done, description=on_one_line(message))


def suited_presets(presets: Sequence[Layer], layers: Sequence[Layer]) -> list[Layer]:
    """Presets for the network family that later layers choose.

    A size that the family does not have becomes the nearest one, and arguments that it does not have are left out; both
    are logged.
    """
    from segkit.config import merge

    chosen = (layer["network"] for _, layer in layers if isinstance(layer.get("network"), Mapping))
    network: dict[str, Any] = functools.reduce(merge, chosen, {})
    return [(name, {**layer, "network": _suited_network(layer, network)}) for name, layer in presets]


def _suited_network(preset: Mapping[str, Any], chosen: Mapping[str, Any]) -> Mapping[str, Any]:
    if "family" not in chosen:
        return preset.get("network", {})  # type: ignore[no-any-return]
    from segkit.models.table import MODELS, configure, nearest_size

    network = dict(preset.get("network", {}))
    family, size = chosen.get("family"), network.get("size")
    if not isinstance(family, str) or family not in MODELS or family == network.get("family"):
        return network
    if size is not None and "size" not in chosen:
        network["size"] = nearest_size(family, size)
        if network["size"] != size:
            _log.warning("size %s does not exist for %s; using %s", size, family, network["size"])
    for name, value in network.pop("arguments", {}).items():
        try:
            configure(family, None, {name: value})
        except RequestError:
            _log.warning("network.arguments.%s=%s does not exist for %s; it is not used", name, value, family)
        else:
            network["arguments"] = {**network.get("arguments", {}), name: value}
    return network


def spread_over(gpus: int | None, device: str | None) -> None:
    """Start this command once for each GPU and exit with it, unless it was already started so.

    Raises:
        RequestError: the machine has fewer, or another number was started.
        typer.Exit: all of them have ended.
    """
    from segkit.runtime import may_have_gpu

    if gpus is None:
        return
    size = process_place().size
    if size > 1:
        if size != gpus:
            raise RequestError(f"--gpus {gpus}, but torchrun started {size} processes", remedy="Leave out --gpus")
        return
    if device is not None and device != "cuda":
        raise RequestError(f"--gpus {gpus} and --device {device} contradict each other", remedy="Leave out one of them")
    found = 0
    if may_have_gpu():
        import torch

        found = torch.cuda.device_count()
    if found < gpus:
        raise RequestError(
            f"--gpus {gpus}, but this machine has {found or 'none'}",
            remedy="Ask for fewer, or train on CPUs with torchrun --nproc-per-node=N -m segkit train ... -d cpu",
        )
    if gpus > 1:
        raise typer.Exit(_start_processes(gpus, sys.argv[1:]))


def _start_processes(count: int, arguments: Sequence[str]) -> int:
    """Run `python -m segkit` so many times side by side, as torchrun does: the exit code of the first to fail."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(["--standalone", f"--nproc-per-node={count}", "-m", "segkit", *arguments])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0
