"""What verbs have in common that take long: going on with a run folder, and showing how far they are."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from segkit.cli.options import console, tell_aside
from segkit.errors import RequestError, on_one_line

if TYPE_CHECKING:
    from rich.console import Console

    from segkit.batch.manifest import CaseRecord


def resumed_layers(run: Path) -> list[tuple[str, Mapping[str, object]]]:
    """A run goes on with its own settings; --set and the options still lie over them."""
    from segkit.config import read_yaml

    path = run / "config.yaml"
    if not path.exists():
        raise RequestError("there is nothing to resume", where=run, remedy="Start it without --resume")
    return [(str(path), read_yaml(path))]


@contextmanager
def interruptible(*command: object) -> Iterator[None]:
    """Let a verb that trains end on SIGTERM as on Ctrl-C, and tell with which command it goes on.

    Raises:
        InterruptedTrainingError: with that command.
    """
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

    def tell(self, done: float, message: str) -> None:
        """Show how far the training is."""
        self.bar.update(self.task, completed=done, description=on_one_line(message))


def progress_bar(*, is_quiet: bool) -> ProgressBar | None:
    """A bar where standard error is a terminal, None elsewhere: log lines tell then."""
    found = console()
    return ProgressBar(found) if found.is_terminal and not is_quiet else None


class CaseProgress:
    """How far a run over cases is: a bar on a terminal, one line a case elsewhere; failures are named in both."""

    def __init__(self, doing: str, total: int, *, is_quiet: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.doing = doing
        self.total = total
        self.counts = {"done": 0, "skipped": 0, "failed": 0}
        self.is_quiet = is_quiet
        self.console = console()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=is_quiet or not self.console.is_terminal,
        )

    def __enter__(self) -> CaseProgress:
        self.bar.start()
        self.task = self.bar.add_task(self.doing, total=self.total)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if not self.is_quiet:
            tell_aside(", ".join(f"{count} {status}" for status, count in self.counts.items()), above=self.console)

    def show(self, record: CaseRecord) -> None:
        """Count a case that ended, and tell about it."""
        self.counts[record.status] += 1
        self.bar.advance(self.task)
        name = on_one_line(record.case)
        if record.error is not None:
            tell_aside(f"{name}: failed: {on_one_line(record.error)}", above=self.console)
        elif not self.is_quiet and not self.console.is_terminal:
            done = sum(self.counts.values())
            stages = ", ".join(f"{stage} {value:.1f} s" for stage, value in record.seconds.items() if value)
            line = f"[{done}/{self.total}] {name}: {record.status}" + (f" ({stages})" if stages else "")
            tell_aside(line, above=self.console)
