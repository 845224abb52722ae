"""An executor whose workers are actors of a Ray cluster: `segkit infer` and `segkit inpaint` with `--engine ray`.

The work is pickled, model and all, and goes to each node once through Ray's object store, so that nodes need segkit and
nothing of this machine's disks but the files of the cases, under the paths that they have here.
"""

from __future__ import annotations

import importlib.util
import logging
import pickle
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal, TypeVar

from segkit.batch.executor import Work
from segkit.batch.ray_retries import distribute
from segkit.batch.ray_worker import Orders, Share, marked
from segkit.errors import ClusterError, RequestError
from segkit.runtime import prefer_variables

_R = TypeVar("_R")

Results = Literal["auto", "files", "store"]
"""Who writes the results: the nodes, or this machine for all; auto asks each node whether it has the output folder."""


def require_ray() -> None:
    """Refuse where Ray is not installed.

    Raises:
        RequestError: as said.
    """
    if importlib.util.find_spec("ray") is None:
        raise RequestError("Ray is not installed", remedy='pip install "segkit[ray]", on every node')


class RayExecutor:
    """On a Ray cluster, by actors that take `share` of their node each, at most `workers` of them (None: all that fit).

    `folders` are those that tasks write to, in the order in which `Task.moved_to` takes others. `address` is what Ray
    takes: ray://host:10001, host:6379, auto or local. With None Ray looks itself: RAY_ADDRESS, else a cluster that
    `ray start` started on this machine, else one is started here and ended afterwards. Paths of tasks must be absolute.
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

    def map(self, work: Work[Any, _R], tasks: Iterable[Any]) -> Iterator[_R]:
        """Results in the order in which they are there; without a task no cluster is looked for.

        Raises:
            RequestError: there is no such cluster, or none of its nodes can do the work; each is named.
            ClusterError: all nodes were lost.
        """
        waiting = list(tasks)
        if not waiting:
            return

        def give_up(task: Any, reasons: list[str]) -> _R:
            found = f"begun {len(reasons)} times without an answer ({'; '.join(reasons)})"
            remedy = "Run the same command again, or do this case with --engine local"
            return work.begin(task).failed(ClusterError(found, remedy=remedy))

        with ExitStack() as stack:
            stack.enter_context(redirect_stdout(sys.stderr))  # where Ray tells of workers that died
            stack.enter_context(connected(self.address))
            from segkit.batch.ray_actors import RayCrew

            marks = None
            if self.results != "store":
                marks = tuple(stack.enter_context(marked(folder)) for folder in self.folders)
            orders = Orders(pickle.dumps(work), self.folders, marks, must_share=self.results == "files")
            crew = RayCrew(work, orders, self.share, min(self.workers or len(waiting), len(waiting)))
            stack.callback(crew.close)
            yield from distribute(waiting, crew, give_up)


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A connection to a Ray cluster, which ends with it where it was started by it; one that is there is used.

    Raises:
        RequestError: nothing answers there, or other versions of Python or Ray do.
    """
    prefer_variables(RAY_NUM_REDIS_GET_RETRIES="1")  # one try of 40 seconds where nobody answers; Ray makes twenty
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
