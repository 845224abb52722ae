"""What `segkit train` and `segkit pretrain` share: options, several processes, progress, and results."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from segkit.cli.options import console, print_json, print_stderr, set_verbosity
from segkit.errors import RequestError, on_one_line
from segkit.runtime import process_place

if TYPE_CHECKING:
    from rich.console import Console

    from segkit.training.task import ConfigT, Summary, TrainingRequest

RunOption = Annotated[Path, typer.Option("-o", "--output", help="Run folder to write.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML file with settings over the preset.")]
BudgetOption = Annotated[str | None, typer.Option("--budget", help="Wall time of the whole command, e.g. 30m or 2h.")]
ExcludeOption = Annotated[Path | None, typer.Option("--exclude", help="Text file with ids of cases to exclude.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run; options must match its settings.")]
ChangesOption = Annotated[
    bool, typer.Option("--allow-changes", help="Accept changed settings with --resume; they are recorded.")
]
StartAgainOption = Annotated[bool, typer.Option("--overwrite", help="Start again in a used run folder.")]
GpusOption = Annotated[
    int | None, typer.Option("--gpus", help="GPUs of this machine to train on together; torchrun starts more.", min=1)
]


@dataclass(frozen=True)
class TrainingVerb:
    """What a verb that trains prints; `start` makes it."""

    as_json: bool
    quiet: bool

    @classmethod
    def start(cls, gpus: int | None, device: str | None, *, as_json: bool, quiet: bool, verbose: bool) -> TrainingVerb:
        """Start this command once for each GPU, and let only the first process print."""
        spread_over(gpus, device)
        is_first = process_place().rank == 0
        verb = cls(as_json and is_first, quiet or not is_first)
        set_verbosity(is_quiet=verb.quiet, is_verbose=verbose)
        return verb

    def run(
        self, work: Callable[[TrainingRequest[ConfigT]], Summary], request: TrainingRequest[ConfigT], *command: object
    ) -> Summary:
        """Train, with a progress bar where standard error is a terminal.

        Raises:
            InterruptedTrainingError: a signal ended it; `command` is named as the one that resumes the run.
        """
        from segkit.training.interruption import InterruptedTrainingError

        screen = console()
        bar = ProgressBar(screen) if screen.is_terminal and not self.quiet else None
        try:
            with bar or nullcontext():
                return work(replace(request, on_progress=None if bar is None else bar.update))
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


def spread_over(gpus: int | None, device: str | None) -> None:
    """Start this command once per GPU and exit, unless this process is already one of several.

    Raises:
        RequestError: the machine has fewer GPUs, or torchrun started another number of processes.
        typer.Exit: all processes have ended.
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
    """Run `python -m segkit` in several processes, as torchrun does; returns the exit code of the first to fail."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(["--standalone", f"--nproc-per-node={count}", "-m", "segkit", *arguments])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0
