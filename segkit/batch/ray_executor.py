"""Cases on the nodes of a Ray cluster: `segkit infer` and `segkit inpaint` with `--engine ray`.

The worker is pickled, model and all, and goes to each node once through Ray's object store, so that nodes need segkit
and nothing of this machine's disks but the files of the cases, under the paths that they have here. `distribute` hands
out plans, `segkit.batch.ray_actors.RayCrew` starts and replaces actors, a `CaseActor` does plan after plan on its node.
"""

from __future__ import annotations

import importlib.util
import logging
import pickle
import secrets
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from segkit.batch.manifest import CaseRecord
from segkit.batch.worker import CasePlan, CaseWorker
from segkit.errors import ClusterError, RequestError
from segkit.reading.files import remove_leftovers, written_atomically
from segkit.runtime import error_sentence, prefer_variables

if TYPE_CHECKING:
    from segkit.batch.ray_actors import RayCrew

_T = TypeVar("_T")
_R = TypeVar("_R")

Results = Literal["auto", "files", "store"]
"""Who writes the results: the nodes, or this machine for all; auto asks each node whether it has the output folder."""

TRIES = 3
"""Times that a case is started at most: what loses three workers would lose all of them."""

_DECISIVE = ("segkit", "numpy", "scipy", "torch", "onnxruntime", "openvino")
"""Packages whose version may show in a mask."""
_MB = 1024**2


def require_ray() -> None:
    """Refuse where Ray is not installed.

    Raises:
        RequestError: as said.
    """
    if importlib.util.find_spec("ray") is None:
        raise RequestError("Ray is not installed", remedy='pip install "segkit[ray]", on every node')


@dataclass(frozen=True)
class Share:
    """What each actor takes of its node: CPU cores, GPUs, and MB of memory where that is limited."""

    threads: int
    gpus: int = 0
    memory_mb: float | None = None

    def room(self, resources: Mapping[str, float]) -> int:
        """How many actors fit on a node with these resources of Ray."""
        fits = [resources.get("CPU", 0) // self.threads]
        if self.gpus:
            fits.append(resources.get("GPU", 0) // self.gpus)
        if self.memory_mb is not None:
            fits.append(resources.get("memory", 0) // (self.memory_mb * _MB))
        return int(min(fits))

    def __str__(self) -> str:
        parts = [f"{self.threads} CPUs", *([f"{self.gpus} GPU"] if self.gpus else [])]
        return " and ".join([*parts, *([] if self.memory_mb is None else [f"{self.memory_mb:.0f} MB"])])


class RayExecutor:
    """On a Ray cluster, by actors that take `share` of their node each, at most `workers` of them (None: all that fit).

    `folders` are those that results go to, in the order in which `CasePlan.moved_to` takes others. `address` is what
    Ray takes: ray://host:10001, host:6379, auto or local. With None Ray looks itself: RAY_ADDRESS, else a cluster that
    `ray start` started on this machine, else one is started here and ended afterwards. Paths of plans must be absolute.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        share: Share,
        address: str | None = None,
        *,
        workers: int | None = None,
        results: Results = "auto",
    ) -> None:
        require_ray()
        self.folders, self.share = tuple(folder.resolve() for folder in folders), share
        self.address, self.workers, self.results = address, workers, results

    def map(self, worker: CaseWorker[Any], plans: Iterable[Any]) -> Iterator[CaseRecord]:
        """Records in the order in which cases end; without a plan no cluster is looked for.

        Raises:
            RequestError: there is no such cluster, or none of its nodes can do the work; each is named.
            ClusterError: all nodes were lost.
        """
        waiting = list(plans)
        if not waiting:
            return

        def give_up(plan: CasePlan, reasons: list[str]) -> CaseRecord:
            found = f"begun {len(reasons)} times without an answer ({'; '.join(reasons)})"
            remedy = "Run the same command again, or do this case with --engine local"
            return worker.start(plan).failed(ClusterError(found, remedy=remedy))

        with ExitStack() as stack:
            stack.enter_context(redirect_stdout(sys.stderr))  # where Ray reports workers that died
            stack.enter_context(connected(self.address))
            from segkit.batch.ray_actors import RayCrew

            marks = None
            if self.results != "store":
                marks = tuple(stack.enter_context(marked(folder)) for folder in self.folders)
            orders = Orders(pickle.dumps(worker), self.folders, marks, must_share=self.results == "files")
            crew = RayCrew(worker, orders, self.share, min(self.workers or len(waiting), len(waiting)))
            stack.callback(crew.close)
            yield from distribute(waiting, crew, give_up)


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A connection to a Ray cluster, which ends with it where it was started by it; an open connection is used.

    Raises:
        RequestError: nothing answers there, or other versions of Python or Ray do.
    """
    prefer_variables(RAY_NUM_REDIS_GET_RETRIES="1")  # one try of 40 seconds where nothing answers; Ray makes twenty
    import ray

    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on what later versions of Ray will do
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as error:
        needs_token = "AuthToken" in f"{error} {error.__cause__}"
        start = "Start one with `ray start --head`, or pass --ray-address local"
        raise RequestError(
            f"no connection to a Ray cluster: {' '.join(str(error).split())[:500]}",
            where=address,
            expected="ray://HOST:10001, HOST:6379, auto or local",
            remedy="It asks for Ray's token: set RAY_AUTH_MODE=token, with its token here" if needs_token else start,
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


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


@dataclass(frozen=True)
class Lost:
    """Instead of a result: the actor was lost, and why."""

    reason: str


@dataclass
class _Attempt(Generic[_T]):
    task: _T
    nodes: set[str] = field(default_factory=set)
    """Where it was started and lost."""
    reasons: list[str] = field(default_factory=list)


def distribute(
    tasks: Iterable[_T], crew: RayCrew, give_up: Callable[[_T, list[str]], _R], *, tries: int = TRIES
) -> Iterator[_R]:
    """The result of every task, as they come; `give_up` makes that of a task lost `tries` times, of the reasons.

    A task is handed out only when an actor is free for it. One whose actor was lost goes before the others, and to
    another node as long as there is one.
    """
    fresh = (_Attempt(task) for task in tasks)
    again: deque[_Attempt[_T]] = deque()
    ahead = next(fresh, None)
    running: dict[Any, _Attempt[_T]] = {}
    while ahead is not None or again or running:
        for actor in crew.idle():
            attempt = _take(again, actor.node, crew)
            if attempt is None and ahead is not None:
                attempt, ahead = ahead, next(fresh, None)
            if attempt is not None:
                running[actor] = attempt
                crew.give(actor, attempt.task)
        for actor, outcome in crew.wait():
            attempt = running.pop(actor)
            if not isinstance(outcome, Lost):
                yield outcome
                continue
            attempt.nodes.add(actor.node)
            attempt.reasons.append(outcome.reason)
            if len(attempt.reasons) < tries:
                again.append(attempt)
            else:
                yield give_up(attempt.task, attempt.reasons)


def _take(again: deque[_Attempt[_T]], node: str, crew: RayCrew) -> _Attempt[_T] | None:
    """The first of the tasks to be tried again that an actor of this node may have."""
    nodes = crew.nodes() if again else set()
    for attempt in again:
        if node not in attempt.nodes or nodes <= attempt.nodes:
            again.remove(attempt)
            return attempt
    return None


@dataclass(frozen=True)
class Orders:
    """What an actor needs to start: the pickled worker, the folders of the results, and how they come back.

    `marks` are files just put into the folders, one into each. A node that has them all writes there; any other sends
    results back.
    """

    work: bytes
    folders: tuple[Path, ...]
    marks: tuple[Path, ...] | None
    """None: files are sent back whether or not the node has the folders."""
    must_share: bool = False
    """A node without the folders does not take part."""
    versions: Mapping[str, str] = field(default_factory=lambda: decisive_versions())
    """Of the machine that gives the orders."""


@dataclass(frozen=True)
class Reply:
    """The result of a plan, and the contents of files that are still to be written."""

    result: Any
    files: Mapping[Path, bytes] = field(default_factory=dict)
    unseen: Path | None = None
    """A file of the case that the node does not have; nothing was done."""

    def write(self) -> None:
        """Write the files.

        Raises:
            DataError: one cannot be written.
        """
        for path, content in self.files.items():
            with written_atomically(path) as temporary:
                temporary.write_bytes(content)


class CaseActor:
    """Does plans on a node; every answer is a value, for an error raised would lose its class."""

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
            self.work: Callable[[Any], Any] = pickle.loads(orders.work)
        except Exception as error:
            return f"cannot open the model: {error_sentence(error)}"
        self.folders = orders.folders
        missing = [mark.parent for mark in orders.marks or () if not mark.exists()]
        self.shares_output = orders.marks is not None and not missing
        if self.shares_output:
            for folder in self.folders:
                remove_leftovers(folder)
        elif orders.must_share:
            return f"does not share the output folder {missing[0]}: mount it there, or let results come back"
        return None

    def run(self, plan: CasePlan) -> Reply:
        """Do one plan."""
        for path in plan.inputs():
            if not path.exists():
                return Reply(None, unseen=path)
        if self.shares_output:
            return Reply(self.work(plan))
        with tempfile.TemporaryDirectory() as name:
            places = {Path(name, str(number)): folder for number, folder in enumerate(self.folders)}
            result = self.work(plan.moved_to(list(places)))
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
