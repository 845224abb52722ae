"""What runs on the nodes: a process that opens the model once and then does case after case."""

from __future__ import annotations

import pickle
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from segkit.data.files import remove_leftovers, written_atomically
from segkit.inference.pipeline import Work
from segkit.inference.worker import sentence

_DECISIVE = ("segkit", "numpy", "scipy", "torch", "onnxruntime", "openvino")
"""Packages whose version may show in a mask."""


@dataclass(frozen=True)
class Orders:
    """What an actor needs to begin: the pickled work, and how results come back.

    Versions of packages are those of the machine that gives the orders. Where `mark`, a file that it has just put into
    the output folder, is there on the node as well, files are written to that folder, and else sent back.
    """

    work: bytes
    output: Path
    mark: Path | None
    """None: files are sent back whether or not the node has the output folder."""
    must_share: bool = False
    """A node without the output folder does not take part."""
    versions: Mapping[str, str] = field(default_factory=lambda: decisive_versions())


@dataclass(frozen=True)
class Reply:
    """The result of a task and the files to write with it, by their path below the output folder."""

    result: Any
    files: Mapping[str, bytes] = field(default_factory=dict)
    unseen: Path | None = None
    """An image of the case that the node does not have; nothing was done."""

    def write(self, output: Path) -> None:
        """Put the files into the output folder.

        Raises:
            DataError: one cannot be written.
        """
        for name, content in self.files.items():
            with written_atomically(output / name) as temporary:
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
        self.shares_output = orders.mark is not None and orders.mark.exists()
        if self.shares_output:
            remove_leftovers(orders.output)
        elif orders.must_share:
            return f"does not share the output folder {orders.output}: mount it there, or let results come back"
        return None

    def run(self, task: Any) -> Reply:
        """Do one task."""
        for file in task.case.images.values():
            if not file.path.exists():
                return Reply(None, unseen=file.path)
        if self.shares_output:
            return Reply(self.work(task))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            result = self.work(task.moved_to(folder))
            paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            return Reply(result, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})


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
def marked(output: Path) -> Iterator[Path]:
    """A file in the output folder by which a node recognises it."""
    output.mkdir(parents=True, exist_ok=True)
    mark = output / f".shared-{secrets.token_hex(6)}"
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)
