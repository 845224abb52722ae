"""The work on one case in three stages, read, compute and write, and the cases of a folder in this process.

A `Task` (`segkit.batch.segment.Segment`, `segkit.inpainting.inpaint.Inpaint`) plans the files of a case and does the
three stages. A `CaseWorker` times them, turns errors into records, and tries again with smaller windows where memory
ran out. Executors call it: `LocalExecutor` here, `RayExecutor` in `segkit.batch.ray_executor`.
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

from segkit.batch.manifest import STAGES, CaseRecord, TaskName
from segkit.errors import DataError, is_memory_error
from segkit.inference.backends import Backend
from segkit.inference.predictor import Stage
from segkit.reading.case import Case, Cohort
from segkit.reading.files import read_grid
from segkit.reading.volume import Grid
from segkit.runtime import error_sentence, peak_rss_mb

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CasePlan:
    """The files to write for one case, whose images are under the model's modality names."""

    case: Case
    folders: tuple[Path, ...]
    """The output folder; then that of a bank, where there is one."""
    files: Mapping[str, tuple[Path, ...]]
    """Kind -> files, relative to the output folder, those of the kind "bank" to the bank.

    "results" are the masks or images themselves; where one of them exists the case was done before."""
    missing_modalities: tuple[str, ...] = ()
    predicted: Mapping[str, float] = field(default_factory=dict)
    """What the case is expected to take, `peak_rss_mb` and `seconds`."""

    @property
    def label_scheme(self) -> str | None:
        """Name of the label scheme of the masks."""
        return None

    def paths(self, kind: str) -> list[Path]:
        """The files of a kind; none where it is not wanted."""
        return [self.folders[1 if kind == "bank" else 0] / path for path in self.files.get(kind, ())]

    def all_paths(self) -> list[Path]:
        """Every file that exists when the case is done."""
        return list(dict.fromkeys(path for kind in self.files for path in self.paths(kind)))

    def inputs(self) -> list[Path]:
        """The files that are read."""
        return [file.path for file in self.case.images.values()]

    def moved_to(self, folders: Sequence[Path]) -> Self:
        """The same with everything written to other folders, one for each of those of the plan."""
        return replace(self, folders=tuple(folders))


P = TypeVar("P", bound=CasePlan)


class Task(ABC, Generic[P]):
    """What is done with every case of a folder. Survives pickling, to compute on other machines."""

    name: ClassVar[TaskName]
    record_class: ClassVar[type[CaseRecord]] = CaseRecord
    foreign_result: ClassVar[str]
    """Names a result that another model or other options made, for an error."""
    predictor: Any
    """What computes, with its `card` and `backend`."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """What results depend on: model and options."""

    @property
    def window(self) -> tuple[int, ...]:
        """Voxels of the windows, where there is one size."""
        return ()

    @abstractmethod
    def backends(self) -> list[Backend]:
        """Everything that computes."""

    @abstractmethod
    def with_backends(self, change: Callable[[Backend], Backend]) -> Self:
        """The same task computed by `change(backend)` for each backend."""

    def facts(self, model: str) -> dict[str, Any]:
        """What the manifest says of model and options; `model` is the name of the model."""
        card = self.predictor.card
        described = {
            "name": model,
            "family": card.network.family,
            "size": card.network.size,
            "modalities": list(card.modalities),
            "sha256": [card.sha256],
            "backend": self.predictor.backend.name,
        }
        return {"model": described}

    @abstractmethod
    def check(self, cohort: Cohort) -> None:
        """Refuse a cohort that does not fit the model.

        Raises:
            RequestError: it does not.
        """

    def label_scheme_for(self, case: Case, cohort: Cohort) -> str | None:
        """Name of the label scheme of a case's mask."""
        return None

    @abstractmethod
    def plan(self, case: Case, cohort: Cohort, output: Path) -> P:
        """What is written for a case.

        Raises:
            DataError: the case cannot be used.
        """

    def fit_memory(self, plans: list[P], memory_mb: float | None) -> tuple[Self, list[P], bool]:
        """The task with windows that fit, plans with forecasts, and whether there is room for several cases at once."""
        return self, plans, True

    def open_log(self, cohort: Cohort) -> Callable[[CaseRecord], None]:
        """What is called with every record on the machine that writes the manifest.

        Raises:
            RequestError: a folder holds results of another model or of other options.
        """
        return lambda record: None

    def prepared_shape(self, grid: Grid) -> tuple[int, ...]:
        """Voxels per axis of the image that `read` gives for a file of this grid, at most."""
        return grid.shape

    def waiting_bytes(self, plan: P) -> int:
        """Bytes of the image that waits to be computed, as the header of its first file says; 0 if it is damaged."""
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
        """Read the results of a case that was done before.

        Raises:
            DataError: one is damaged.
        """

    @abstractmethod
    def write(self, plan: P, result: Any) -> dict[str, Any]:
        """Write the result; gives further fields of the record."""

    def with_smaller_window(self) -> Self | None:
        """The same task with smaller windows, for less memory; None where there are none."""
        return None


class StageClock:
    """The seconds of a case by stage (`STAGES`); a stage inside another is not counted twice."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._inner = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a stage, also where it fails."""
        start, inner_before = time.perf_counter(), self._inner
        self._inner = 0.0
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._seconds[stage] += spent - self._inner
            self._inner = inner_before + spent

    def rounded(self) -> dict[str, float]:
        """The seconds as the manifest has them."""
        return {stage: round(value, 4) for stage, value in self._seconds.items()}


class CaseWorker(Generic[P]):
    """Does a task case by case. `task` is replaced by one with smaller windows where memory ran out."""

    def __init__(self, task: Task[P], *, uses_threads: bool = True) -> None:
        self.task = task
        self.uses_threads = uses_threads

    def start(self, plan: P) -> CaseJob[P]:
        """The work on one case, to be done stage by stage."""
        return CaseJob(self, plan, uses_threads=self.uses_threads)

    def __call__(self, plan: P) -> CaseRecord:
        """All of the work on one case; raises only what ends the whole program."""
        return self.start(plan).run()

    def shrink(self, used: Task[P]) -> bool:
        """Use windows smaller than those of `used` from now on; False where there are none."""
        if self.task is used:  # else a case before has done it
            smaller = used.with_smaller_window()
            if smaller is None:
                return False
            self.task = smaller
        return True


class CaseJob(Generic[P]):
    """One case between its stages; `read` and `write` may run in other threads than `compute`."""

    def __init__(self, worker: CaseWorker[P], plan: P, *, uses_threads: bool) -> None:
        self.plan = plan
        self._worker, self._task, self._uses_threads = worker, worker.task, uses_threads
        self._clock = StageClock()
        self._loaded: Any = None
        self._result: Any = None

    @functools.cached_property
    def waiting_bytes(self) -> int:
        """See `Task.waiting_bytes`."""
        return self._task.waiting_bytes(self.plan)

    def read(self) -> None:
        """Get ready for `compute`."""
        self._loaded = self._task.read(self.plan, self._clock, uses_threads=self._uses_threads)

    def compute(self) -> None:
        """Get ready for `write`."""
        self._task = self._worker.task  # its windows may have become smaller since
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
        """The record after a stage failed: of another try with smaller windows where memory ran out, else a failure."""
        self._loaded = self._result = None
        if not is_memory_error(error) or not self._worker.shrink(self._task):
            return self.failed(error)
        size = " x ".join(map(str, self._worker.task.window))
        _log.warning("%s: out of memory; once more, with windows of %s voxels", self.plan.case.id, size)
        return CaseJob(self._worker, self.plan, uses_threads=False).run()

    def failed(self, error: BaseException) -> CaseRecord:
        """The record of a case that failed with `error`; the trace is logged for -v."""
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
            **facts,
        )


class Executor(Protocol):
    """Where cases are done."""

    def map(self, worker: CaseWorker[Any], plans: Iterable[Any]) -> Iterator[CaseRecord]:
        """The record of every plan, as it is ready, in any order."""
        ...


class LocalExecutor:
    """In this process: `workers` threads read ahead and one writes behind; with 0 there are no threads.

    Cases that were read wait for the network as long as they take no more than `waiting_bytes` together.
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
                    yield from _written(writing)  # what is done is not lost
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
