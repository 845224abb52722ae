"""What runs on the nodes: a process that opens the model once and then does case after case."""

from __future__ import annotations

import pickle
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from segkit.batch.executor import Work
from segkit.batch.worker import sentence
from segkit.reading.files import remove_leftovers, written_atomically

_DECISIVE = ("segkit", "numpy", "scipy", "torch", "onnxruntime", "openvino")
"""Packages whose version may show in a mask."""


class Task(Protocol):
    """What actors are given: the work on one case, which knows its files."""

    def inputs(self) -> list[Path]:
        """The files that are read."""
        ...

    def moved_to(self, folders: Sequence[Path]) -> Task:
        """The same with everything that is written in other folders, one for each of those of the orders."""
        ...


@dataclass(frozen=True)
class Orders:
    """What an actor needs to begin: the pickled work, the folders that results go to, and how they come back.

    Versions of packages are those of the machine that gives the orders. Where `marks`, files that it has just put into
    the folders, one into each, are there on the node as well, files are written to them, and else sent back.
    """

    work: bytes
    folders: tuple[Path, ...]
    marks: tuple[Path, ...] | None
    """None: files are sent back whether or not the node has the folders."""
    must_share: bool = False
    """A node without the folders does not take part."""
    versions: Mapping[str, str] = field(default_factory=lambda: decisive_versions())


@dataclass(frozen=True)
class Reply:
    """The result of a task, and the files to write with it by where they go."""

    result: Any
    files: Mapping[Path, bytes] = field(default_factory=dict)
    unseen: Path | None = None
    """A file of the case that the node does not have; nothing was done."""

    def write(self) -> None:
        """Put the files where they go.

        Raises:
            DataError: one cannot be written.
        """
        for path, content in self.files.items():
            with written_atomically(path) as temporary:
                temporary.write_bytes(content)


class CaseActor:
    """Does tasks with the work it was given; every answer is a value, for an error raised would lose its class."""

    def open(self, orders: Orders) -> str | None:
        """Get ready; gives back what keeps this node from taking part, or None."""
        here = decisive_versions()
        differing = [
            f"{package} {here[package]} instead of {version}"
            for package, version in orders.versions.items()
            if here.get(package, version) != version
        ]
        if differing:
            return f"has {', '.join(differing)}: install the same versions on every node"
        try:
            self.work: Work[Any, Any] = pickle.loads(orders.work)
        except Exception as error:
            return f"cannot open the model: {sentence(error)}"
        self.folders = orders.folders
        missing = [mark.parent for mark in orders.marks or () if not mark.exists()]
        self.shares_output = orders.marks is not None and not missing
        if self.shares_output:
            for folder in self.folders:
                remove_leftovers(folder)
        elif orders.must_share:
            return f"does not share the output folder {missing[0]}: mount it there, or let results come back"
        return None

    def run(self, task: Task) -> Reply:
        """Do one task."""
        for path in task.inputs():
            if not path.exists():
                return Reply(None, unseen=path)
        if self.shares_output:
            return Reply(self.work(task))
        with tempfile.TemporaryDirectory() as name:
            places = {Path(name, str(number)): folder for number, folder in enumerate(self.folders)}
            result = self.work(task.moved_to(list(places)))
            files = {
                folder / path.relative_to(place): path.read_bytes()
                for place, folder in places.items()
                for path in sorted(place.rglob("*"))
                if path.is_file()
            }
            return Reply(result, files)


def decisive_versions() -> dict[str, str]:
    """Versions of the packages that masks depend on, without what tells how they were built."""
    versions = {}
    for package in _DECISIVE:
        try:
            versions[package] = metadata.version(package).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return versions


@contextmanager
def marked(folder: Path) -> Iterator[Path]:
    """A file in an output folder by which a node recognises it."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".shared-{secrets.token_hex(6)}"
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


_MB = 1024**2


@dataclass(frozen=True)
class Share:
    """What each worker takes of its node: CPU cores, GPUs, and MB of memory where that is limited."""

    threads: int
    gpus: int = 0
    memory_mb: float | None = None

    def room(self, resources: Mapping[str, float]) -> int:
        """How many workers fit on a node with these resources of Ray."""
        fits = [resources.get("CPU", 0) // self.threads]
        if self.gpus:
            fits.append(resources.get("GPU", 0) // self.gpus)
        if self.memory_mb is not None:
            fits.append(resources.get("memory", 0) // (self.memory_mb * _MB))
        return int(min(fits))

    def __str__(self) -> str:
        parts = [f"{self.threads} CPUs", f"{self.gpus} GPU" if self.gpus else ""]
        return " and ".join([*filter(None, parts), *([] if self.memory_mb is None else [f"{self.memory_mb:.0f} MB"])])
