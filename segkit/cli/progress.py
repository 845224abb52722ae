"""What verbs that train share: resuming a run folder, interruption, and a progress bar."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from segkit.cli.options import console
from segkit.errors import RequestError, on_one_line

if TYPE_CHECKING:
    from rich.console import Console


def resumed_layers(run: Path) -> list[tuple[str, Mapping[str, object]]]:
    """The recorded settings of a run, as the layer below --set and the other options."""
    from segkit.config import read_yaml

    path = run / "config.yaml"
    if not path.exists():
        raise RequestError("there is nothing to resume", where=run, remedy="Start it without --resume")
    return [(str(path), read_yaml(path))]


@contextmanager
def interruptible(*command: object) -> Iterator[None]:
    """End a training on SIGTERM as on Ctrl-C, with an InterruptedTrainingError that names the command to resume it."""
    from segkit.training.interruption import InterruptedTrainingError, terminated_as_interrupted

    try:
        with terminated_as_interrupted():
            yield
    except InterruptedTrainingError as error:
        shown = shlex.join(map(str, command))
        raise InterruptedTrainingError(error.found, where=error.where, remedy=f"Go on with: {shown}") from None


class ProgressBar:
    """A bar with the remaining time, for a terminal."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        told = TextColumn("{task.description}", markup=False)
        self.bar = Progress(told, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console)
        self.task = self.bar.add_task("planning", total=1.0)

    def __enter__(self) -> ProgressBar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, done: float, message: str) -> None:
        """Show how far the training is."""
        self.bar.update(self.task, completed=done, description=on_one_line(message))


def progress_bar(*, is_quiet: bool) -> ProgressBar | None:
    """A bar where standard error is a terminal; None elsewhere, where log lines show the progress."""
    found = console()
    return ProgressBar(found) if found.is_terminal and not is_quiet else None
