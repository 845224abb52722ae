"""What the verbs that train have in common: going on with a run folder, and a bar that shows how far it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from segkit.cli.options import console
from segkit.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console


def resumed_layers(run: Path) -> list[tuple[str, Mapping[str, object]]]:
    """A run goes on with its own settings; --set and the options still lie over them."""
    from segkit.config.loading import read_yaml

    path = run / "config.yaml"
    if not path.exists():
        raise RequestError("there is nothing to resume", where=run, remedy="Start it without --resume")
    return [(str(path), read_yaml(path))]


class ProgressBar:
    """A bar with the remaining time, for a terminal."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console)
        self.task = self.bar.add_task("planning", total=1.0)

    def __enter__(self) -> ProgressBar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def tell(self, done: float, message: str) -> None:
        """Show how far the training is."""
        self.bar.update(self.task, completed=done, description=message)


def progress_bar(*, is_quiet: bool) -> ProgressBar | None:
    """A bar where standard error is a terminal, None elsewhere: log lines tell then."""
    found = console()
    return ProgressBar(found) if found.is_terminal and not is_quiet else None
