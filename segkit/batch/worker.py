"""Processing of one case in three stages (read, compute, write), and of a folder in this process.

A `Task` (`Segment`, `Inpaint`) plans the files of a case and implements the stages. A `CaseWorker` times them, turns
errors into records, and retries with smaller windows when memory runs out. `LocalExecutor` and
`segkit.batch.ray_executor.RayExecutor` call it.
"""

from __future__ import annotations

import functools
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from segkit.batch.manifest import STAGES, CaseRecord, InputFile, TaskName
from segkit.errors import DataError, free_memory_of, is_memory_error
from segkit.inference.backends import Backend
from segkit.inference.predictor import Stage
from segkit.process_memory import peak_rss_mb
from segkit.reading.case import Case, Cohort
from segkit.reading.files import read_grid
from segkit.reading.volume import Grid
from segkit.runtime import error_sentence

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CasePlan:
    """The files to write for one case, whose images are under the model's modality names."""

    case: Case
    folders: tuple[Path, ...]
    """The output folder, and the folder of the bank if there is one."""
    files: Mapping[str, tuple[Path, ...]]
    """Kind -> files, relative to the output folder (kind "bank": to the bank). "results" are the masks or images."""
    missing_modalities: tuple[str, ...] = ()
    predicted: Mapping[str, float] = field(default_factory=dict)
    """Expected `peak_rss_mb` and `seconds`."""

    @property
    def label_scheme(self) -> str | None:
        """Name of the label scheme of the masks."""
        return None

    def paths(self, kind: str) -> list[Path]:
        """The files of a kind; none if it was not requested."""
        return [self.folders[1 if kind == "bank" else 0] / path for path in self.files.get(kind, ())]

    def all_paths(self) -> list[Path]:
        """Every file that exists when the case is done."""
        return list(dict.fromkeys(path for kind in self.files for path in self.paths(kind)))

    def inputs(self) -> list[Path]:
        """The files that are read."""
        return list(dict.fromkeys(file.path for file in self.case.images.values()))

    def moved_to(self, folders: Sequence[Path]) -> Self:
        """The same plan with other `folders`."""
        return replace(self, folders=tuple(folders))


P = TypeVar("P", bound=CasePlan)


class Task(ABC, Generic[P]):
    """How each case of a folder is processed; can be pickled, to compute on other machines."""

    name: ClassVar[TaskName]
    record_class: ClassVar[type[CaseRecord]] = CaseRecord
    foreign_result: ClassVar[str]
    """Describes a result of another model or other options, for an error."""
    predictor: Any
    """Has `card` and `backend`."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """The model and options that results depend on."""

    @property
    def window(self) -> tuple[int, ...]:
        """Voxels of a window, if all have one size."""
        return ()

    @abstractmethod
    def backends(self) -> list[Backend]:
        """All backends in use."""

    @abstractmethod
    def with_backends(self, change: Callable[[Backend], Backend]) -> Self:
        """The same task computed by `change(backend)` for each backend."""

    def facts(self, model: str) -> dict[str, Any]:
        """Model and options for the manifest; `model` is the name of the model."""
        card = self.predictor.card
        network = {"name": model, "family": card.network.family, "size": card.network.size}
        inputs = {"modalities": list(card.modalities), "sha256": [card.sha256]}
        return {"model": {**network, **inputs, "backend": self.predictor.backend.name}}

    @abstractmethod
    def check(self, cohort: Cohort) -> None:
        """Raise a RequestError if the cohort does not fit the model."""

    def label_scheme_for(self, case: Case, cohort: Cohort) -> str | None:
        """Name of the label scheme of a case's mask."""
        return None

    @abstractmethod
    def plan(self, case: Case, cohort: Cohort, output: Path) -> P:
        """The plan of a case; raises DataError if it cannot be used."""

    def fit_memory(self, plans: list[P], memory_gb: float | None) -> tuple[Self, list[P], bool]:
        """The task with windows that fit, plans with forecasts, and whether several cases fit at once."""
        return self, plans, True

    def open_log(self, cohort: Cohort) -> Callable[[CaseRecord], None]:
        """A function that is called with each record on the machine that writes the manifest.

        Raises:
            RequestError: a folder holds results of another model or of other options.
        """
        return lambda record: None

    def prepared_shape(self, grid: Grid) -> tuple[int, ...]:
        """Most voxels per axis of the image that `read` returns for a file of this grid."""
        return grid.shape

    def waiting_bytes(self, plan: P) -> int:
        """Bytes of the image between `read` and `compute`, from the header of its first file; 0 if that is damaged."""
        try:
            grid = read_grid(next(iter(plan.case.images.values())).path)
        except DataError:
            return 0
        return 4 * len(self.predictor.card.modalities) * prod(self.prepared_shape(grid))

    @abstractmethod
    def read(self, plan: P, stage: Stage, *, uses_threads: bool) -> Any:
        """Read and prepare the files, with `uses_threads` side by side."""

    @abstractmethod
    def compute(self, plan: P, loaded: Any, stage: Stage) -> Any:
        """The result, in memory."""

    @abstractmethod
    def read_results(self, plan: P) -> None:
        """Read the results of an earlier run; raises DataError if one is damaged."""

    @abstractmethod
    def write(self, plan: P, result: Any) -> dict[str, Any]:
        """Write the result; returns further fields of the record. Raises DataError if a file cannot be written."""

    def with_smaller_window(self) -> Self | None:
        """The same task with smaller windows, for less memory; None if there are none."""
        return None


class StageClock:
    """Seconds of a case by stage (`STAGES`); a stage inside another is not counted twice."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._inner = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a stage, also if it fails."""
        start, inner_before = time.perf_counter(), self._inner
        self._inner = 0.0
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._seconds[stage] += spent - self._inner
            self._inner = inner_before + spent

    def rounded(self) -> dict[str, float]:
        """The seconds, rounded for the manifest."""
        return {stage: round(value, 4) for stage, value in self._seconds.items()}


class CaseWorker(Generic[P]):
    """Processes cases; `task` is replaced by one with smaller windows when memory runs out."""

    def __init__(self, task: Task[P], *, uses_threads: bool = True) -> None:
        self.task = task
        self.uses_threads = uses_threads

    def start(self, plan: P) -> CaseJob[P]:
        """The job of one case, to be run stage by stage."""
        return CaseJob(self, plan, uses_threads=self.uses_threads)

    def __call__(self, plan: P) -> CaseRecord:
        """Process one case; errors become its record, except those that end the program."""
        return self.start(plan).run()

    def shrink(self, used: Task[P]) -> bool:
        """Use windows smaller than those of `used` from now on; False if there are none."""
        if self.task is used:  # else an earlier case has done it
            smaller = used.with_smaller_window()
            if smaller is None:
                return False
            self.task = smaller
        return True


class CaseJob(Generic[P]):
    """The processing of one case; `read` and `write` may run in other threads than `compute`."""

    def __init__(self, worker: CaseWorker[P], plan: P, *, uses_threads: bool) -> None:
        self.plan = plan
        self._worker, self._task, self._uses_threads = worker, worker.task, uses_threads
        self._clock = StageClock()
        self._inputs: tuple[InputFile, ...] = ()
        self._loaded: Any = None
        self._result: Any = None

    @functools.cached_property
    def waiting_bytes(self) -> int:
        """See `Task.waiting_bytes`."""
        return self._task.waiting_bytes(self.plan)

    def read(self) -> None:
        """Read the inputs, for `compute`, and take down what they are."""
        with self._clock("read"):
            self._inputs = tuple(InputFile.of(path) for path in self.plan.inputs())
        self._loaded = self._task.read(self.plan, self._clock, uses_threads=self._uses_threads)

    def compute(self) -> None:
        """Compute the result, for `write`."""
        self._task = self._worker.task  # its windows may be smaller now
        loaded, self._loaded = self._loaded, None
        self._result = self._task.compute(self.plan, loaded, self._clock)

    def write(self) -> CaseRecord:
        """Write the result."""
        result, self._result = self._result, None
        with self._clock("write"):
            facts = self._task.write(self.plan, result)
        return self._record(None, **facts)

    def run(self) -> CaseRecord:
        """All stages in this thread."""
        try:
            self.read()
            self.compute()
            return self.write()
        except Exception as error:
            return self.recover(error)

    def recover(self, error: BaseException) -> CaseRecord:
        """The record after a stage failed: of a retry with smaller windows if memory ran out, else of the failure."""
        self._loaded = self._result = None
        if not is_memory_error(error):
            return self.failed(error)
        free_memory_of(error)  # before another network is opened
        if not self._worker.shrink(self._task):
            return self.failed(error)
        size = " x ".join(map(str, self._worker.task.window))
        windows = f"windows of {size} voxels" if size else "smaller windows"
        _log.warning("%s: out of memory; trying again with %s", self.plan.case.id, windows)
        return CaseJob(self._worker, self.plan, uses_threads=False).run()

    def failed(self, error: BaseException) -> CaseRecord:
        """The record of a case that failed with `error`; the traceback is logged for -v."""
        _log.debug("%s failed", self.plan.case.id, exc_info=error)
        return self._record(error_sentence(error))

    def _record(self, error: str | None, **facts: Any) -> CaseRecord:
        return self._task.record_class(
            self.plan.case.id,
            "done" if error is None else "failed",
            error,
            self._clock.rounded(),
            round(peak_rss_mb(), 1),
            self._task.predictor.backend.name,
            label_scheme=self.plan.label_scheme,
            missing_modalities=self.plan.missing_modalities,
            model=self._task.identity,
            window=self._task.window,
            predicted=self.plan.predicted,
            inputs=self._inputs,
            **facts,
        )


class Executor(Protocol):
    """Runs the worker on plans."""

    def map(self, worker: CaseWorker[Any], plans: Iterable[Any]) -> Iterator[CaseRecord]:
        """The record of each plan, in any order."""
        ...


class LocalExecutor:
    """In this process: `workers` threads read ahead and one writes; with 0 there are no threads.

    At most `waiting_bytes` of images are read ahead of the network.
    """

    def __init__(self, workers: int = 0, waiting_bytes: int = 2**31) -> None:
        self.workers = workers
        self.waiting_bytes = waiting_bytes

    def map(self, worker: CaseWorker[Any], plans: Iterable[Any]) -> Iterator[CaseRecord]:
        """The records in the order of the plans."""
        if self.workers == 0:
            return (worker(plan) for plan in plans)
        return self._overlapped(worker.start(plan) for plan in plans)

    def _overlapped(self, jobs: Iterator[CaseJob[Any]]) -> Iterator[CaseRecord]:
        waiting: deque[tuple[CaseJob[Any], Future[None]]] = deque()
        writing: deque[tuple[CaseJob[Any], Future[CaseRecord]]] = deque()
        following = next(jobs, None)
        with ThreadPoolExecutor(self.workers) as readers, ThreadPoolExecutor(1) as writer:
            while following is not None or waiting:
                while following is not None and self._has_room(following, waiting):
                    waiting.append((following, readers.submit(following.read)))
                    following = next(jobs, None)
                job, reading = waiting.popleft()
                try:
                    reading.result()
                    job.compute()
                except BaseException as error:
                    yield from _written(writing)  # keep finished cases
                    if not isinstance(error, Exception):
                        raise
                    yield job.recover(error)
                    continue
                # One case may be written while the next is computed, not more: each holds a result in memory.
                yield from _written(writing)
                writing.append((job, writer.submit(job.write)))
            yield from _written(writing)

    def _has_room(self, job: CaseJob[Any], waiting: deque[tuple[CaseJob[Any], Future[None]]]) -> bool:
        if not waiting:
            return True
        held = sum(one.waiting_bytes for one, _ in waiting)
        return len(waiting) <= self.workers and held + job.waiting_bytes <= self.waiting_bytes


def _written(writing: deque[tuple[CaseJob[Any], Future[CaseRecord]]]) -> Iterator[CaseRecord]:
    while writing:
        job, future = writing.popleft()
        error = future.exception()
        yield future.result() if error is None else job.recover(error)
