"""`segkit train`, and what it shares with `segkit pretrain`: options, several processes, progress, and results."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import segkit.api.training as api
from segkit.cli import options
from segkit.cli.options import (
    console,
    print_json,
    print_left_out,
    print_stderr,
    print_stdout,
    print_table,
    set_verbosity,
    verb,
)
from segkit.errors import RequestError, on_one_line
from segkit.runtime import process_place

if TYPE_CHECKING:
    from rich.console import Console

    from segkit.training.config import TrainConfig
    from segkit.training.task import Kind, Summary, TrainingRequest

GpusOption = Annotated[
    int | None, typer.Option(help="GPUs of this machine to train on together; torchrun starts more.", min=1)
]
SHARED = {
    "run": Annotated[Path, typer.Option("-o", "--output", help="Run folder to write.")],
    "config": Annotated[Path | None, typer.Option(help="YAML file with settings over the preset.")],
    "budget": Annotated[str | None, typer.Option(help="Wall time of the whole command, e.g. 30m or 2h.")],
    "weights": Annotated[
        Path | None,
        typer.Option(help="First weights: run folder, nnU-Net results, .safetensors, .pth, .torch or .model."),
    ],
    "exclude": Annotated[Path | None, typer.Option(help="Text file with ids of cases to exclude.")],
    "resume": Annotated[bool, typer.Option("--resume", help="Continue the run; options must match its settings.")],
    "overwrite": Annotated[bool, typer.Option("--overwrite", help="Start again in a used run folder.")],
    "allow_changes": Annotated[
        bool, typer.Option("--allow-changes", help="Accept changed settings with --resume; they are recorded.")
    ],
}
SplitOption = Annotated[Path | None, typer.Option("--split", help="Folds in a file, as nnU-Net's splits_final.json.")]
FoldOption = Annotated[
    str | None, typer.Option("-f", "--fold", help="Fold for validation, from 0; or all for cross-validation.")
]


@verb(api.train, fold=FoldOption, split=SplitOption, **SHARED)
def train(
    data: Path,
    run: Path,
    fold: str | None,
    label_scheme: str | None,
    patients: Path | None,
    split: Path | None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan, print the settings, train nothing.")] = False,
    gpus: GpusOption = None,
    json: options.JsonOption = False,
    quiet: bool = False,
    **shared: Any,
) -> None:
    """Train a network on DATA and write a run folder.

    Patch, batch, spacing and normalisation are planned from the data and the available memory; config.yaml in the run
    folder has every setting and its reason. --config replaces settings of the preset, and options replace both.
    """
    screen = TrainingScreen.open(gpus, shared["device"], as_json=json, quiet=quiet)
    which = _fold(fold)
    request, kind = api.segmentation_request(
        data,
        api.TrainingOptions(run=run, **shared),
        fold=which,
        label_scheme=label_scheme,
        patients=patients,
        split=split,
    )
    if dry_run:
        _show_plan(request, as_json=screen.as_json)
        return

    def show(summary: Summary) -> None:
        rows = [(name, f"{value:.4f}") for name, value in summary.scores["dice"].items()]
        print_table("Validation", ("output", "Dice"), rows)
        print_stdout(f"Model: {run}  ->  segkit infer -m {run} -i SCANS -o MASKS")

    folds = () if fold is None else ("-f", fold)
    screen.run(request, kind, show, "segkit", "train", data, "-o", run, *folds, "--resume", fold=which)


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
    if text is None or text == "all":
        return text  # type: ignore[return-value]
    if not text.isdigit():
        raise RequestError(f"--fold {text!r} cannot be read", expected="a number from 0, or all")
    return int(text)


@dataclass(frozen=True)
class TrainingScreen:
    """What a command that trains prints; `open` makes it."""

    as_json: bool
    quiet: bool

    @classmethod
    def open(cls, gpus: int | None, device: str, *, as_json: bool, quiet: bool) -> TrainingScreen:
        """Start this command once for each GPU, and let only the first process print."""
        spread_over(gpus, device)
        is_first = process_place().rank == 0
        if not is_first:
            set_verbosity(is_quiet=True)
        return cls(as_json and is_first, quiet or not is_first)

    def run(
        self,
        request: TrainingRequest[Any],
        kind: Kind[Any, Any],
        show: Callable[[Summary], None],
        *command: object,
        fold: int | Literal["all"] | None = None,
    ) -> None:
        """Train, with a progress bar on a terminal; print the summary by `show` or as JSON, and the cases left out.

        Raises:
            InterruptedTrainingError: a signal ended it; `command` is named as the one that resumes the run.
            typer.Exit: with code 1, if a case was left out.
        """
        from segkit.training.interruption import InterruptedTrainingError

        screen = console()
        bar = ProgressBar(screen) if screen.is_terminal and not self.quiet else None
        try:
            with bar or nullcontext():
                request = replace(request, on_progress=None if bar is None else bar.update)
                summary = api.run_training(request, kind, fold)
        except InterruptedTrainingError as error:
            remedy = f"Resume with: {shlex.join(map(str, command))}"
            raise InterruptedTrainingError(error.found, where=error.where, remedy=remedy) from None
        if self.as_json:
            print_json(summary.to_json())
        elif not self.quiet:
            show(summary)
        for reason in summary.skipped.values():
            print_stderr(f"left out: {reason}")
        print_left_out(summary.left_out)
        if summary.skipped or summary.left_out:
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


def spread_over(gpus: int | None, device: str) -> None:
    """Start this command once per GPU and exit, unless this process is already one of several.

    Raises:
        RequestError: the machine has fewer GPUs, or torchrun started another number of processes.
        typer.Exit: all processes have ended.
    """
    from segkit.runtime import devices

    if gpus is None:
        return
    size = process_place().size
    if size > 1:
        if size != gpus:
            raise RequestError(f"--gpus {gpus}, but torchrun started {size} processes", remedy="Leave out --gpus")
        return
    if device not in ("auto", "cuda"):
        raise RequestError(f"--gpus {gpus} and --device {device} contradict each other", remedy="Leave out one of them")
    found = sum(name.startswith("cuda") for name in devices())
    if found < gpus:
        raise RequestError(
            f"--gpus {gpus}, but this machine has {found or 'none'}",
            remedy="Ask for fewer, or train on CPUs with torchrun --nproc-per-node=N -m segkit train ... -d cpu",
        )
    if gpus > 1:
        raise typer.Exit(_start_processes(gpus, sys.argv[1:]))


def _start_processes(count: int, arguments: Sequence[str]) -> int:
    """Run `python -m segkit` in several processes, as torchrun does; returns the exit code of the first to fail."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(["--standalone", f"--nproc-per-node={count}", "-m", "segkit", *arguments])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0
