"""Processing of cases on the nodes of a Ray cluster (`--engine ray`).

The pickled worker, with its model, is sent to each node once through Ray's object store. Nodes need segkit and the
files of the cases under the same paths as here. `distribute` assigns plans, `segkit.batch.ray_actors.RayCrew` starts
and replaces actors, and a `CaseActor` processes plans on its node.
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
"""Results are written by the nodes (files) or sent to this machine (store); auto: by nodes with the output folder."""

TRIES = 3
"""Most starts of one case: a case that loses three workers would lose all of them."""

_DECISIVE = ("segkit", "numpy", "scipy", "torch", "onnxruntime", "openvino")
"""Packages whose version may change a mask."""
_GIB = 1024**3


def require_ray() -> None:
    """Raise a RequestError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise RequestError("Ray is not installed", remedy='pip install "segkit[ray]", on every node')


@dataclass(frozen=True)
class Share:
    """The resources of one actor: CPU cores, GPUs, and GiB of memory if limited."""

    threads: int
    gpus: int = 0
    memory_gb: float | None = None

    def room(self, resources: Mapping[str, float]) -> int:
        """The number of actors that fit on a node with these Ray resources."""
        fits = [resources.get("CPU", 0) // self.threads]
        if self.gpus:
            fits.append(resources.get("GPU", 0) // self.gpus)
        if self.memory_gb is not None:
            fits.append(resources.get("memory", 0) // (self.memory_gb * _GIB))
        return int(min(fits))

    def __str__(self) -> str:
        parts = [f"{self.threads} CPUs", *([f"{self.gpus} GPU"] if self.gpus else [])]
        return " and ".join([*parts, *([] if self.memory_gb is None else [f"{self.memory_gb:.3g} GB"])])


class RayExecutor:
    """On a Ray cluster, by actors with the resources `share`, at most `workers` of them (None: all that fit).

    `folders` are the output folders, in the order of `CasePlan.folders`. `address`: ray://host:10001, host:6379, auto
    or local; None: RAY_ADDRESS, else a cluster that `ray start` started on this machine, else one is started here and
    ended afterwards. Paths of plans must be absolute.
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
        """Records in the order in which cases end; without plans no connection is made.

        Raises:
            RequestError: there is no such cluster, or none of its nodes can be used; each is named.
            ClusterError: all nodes were lost.
        """
        waiting = list(plans)
        if not waiting:
            return

        def give_up(plan: CasePlan, reasons: list[str]) -> CaseRecord:
            found = f"started {len(reasons)} times without an answer ({'; '.join(reasons)})"
            remedy = "Run the same command again, or process this case with --engine local"
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
    """A connection to a Ray cluster, closed afterwards; an existing connection is used and stays open.

    Raises:
        RequestError: there is no answer, or the cluster has other versions of Python or Ray.
    """
    prefer_variables(RAY_NUM_REDIS_GET_RETRIES="1")  # one try of 40 seconds without an answer; Ray makes twenty
    import ray

    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about later versions of Ray
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as error:
        needs_token = "AuthToken" in f"{error} {error.__cause__}"
        start = "Start one with `ray start --head`, or pass --ray-address local"
        raise RequestError(
            f"no connection to a Ray cluster: {' '.join(str(error).split())[:500]}",
            where=address,
            expected="ray://HOST:10001, HOST:6379, auto or local",
            remedy="It requires Ray's token: set RAY_AUTH_MODE=token, with its token here" if needs_token else start,
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def marked(folder: Path) -> Iterator[Path]:
    """A temporary file in an output folder by which nodes recognise the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".shared-{secrets.token_hex(6)}"
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


@dataclass(frozen=True)
class Lost:
    """The outcome if the actor was lost, with the reason."""

    reason: str


@dataclass
class _Attempt(Generic[_T]):
    task: _T
    nodes: set[str] = field(default_factory=set)
    """Nodes that lost it."""
    reasons: list[str] = field(default_factory=list)


def distribute(
    tasks: Iterable[_T], crew: RayCrew, give_up: Callable[[_T, list[str]], _R], *, tries: int = TRIES
) -> Iterator[_R]:
    """The result of each task, in any order; `give_up(task, reasons)` makes that of a task lost `tries` times.

    A task is assigned when an actor is free. A task whose actor was lost comes first, on another node if there is one.
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
    """The first task to retry that may run on this node."""
    nodes = crew.nodes() if again else set()
    for attempt in again:
        if node not in attempt.nodes or nodes <= attempt.nodes:
            again.remove(attempt)
            return attempt
    return None


@dataclass(frozen=True)
class Orders:
    """The start data of an actor: the pickled worker, the output folders, and how results are returned.

    `marks` are temporary files, one in each folder. A node that sees all of them writes there; others send results.
    """

    work: bytes
    folders: tuple[Path, ...]
    marks: tuple[Path, ...] | None
    """None: every node sends its files."""
    must_share: bool = False
    """Nodes without the folders are not used."""
    versions: Mapping[str, str] = field(default_factory=lambda: decisive_versions())
    """Versions on this machine."""


@dataclass(frozen=True)
class Reply:
    """The result of a plan, and the contents of files to write."""

    result: Any
    files: Mapping[Path, bytes] = field(default_factory=dict)
    unseen: Path | None = None
    """A file of the case that is missing on the node; the case was not processed."""

    def write(self) -> None:
        """Write the files; raises DataError if one cannot be written."""
        for path, content in self.files.items():
            with written_atomically(path) as temporary:
                temporary.write_bytes(content)


class CaseActor:
    """Processes plans on a node. Errors are returned: raised, they would lose their class."""

    def open(self, orders: Orders) -> str | None:
        """Load the worker; returns why this node cannot be used, or None."""
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
            return f"does not share the output folder {missing[0]}: mount it there, or pass --results store"
        return None

    def run(self, plan: CasePlan) -> Reply:
        """Process one plan."""
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
    """Versions of the packages that masks depend on, without build tags."""
    versions = {}
    for package in _DECISIVE:
        try:
            versions[package] = metadata.version(package).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return versions
