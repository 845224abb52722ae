"""What `infer` and `inpaint` share: options, the engine that does the cases, and a folder that is ready to be done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from segkit.api.arguments import AnyPath, CaseIds, parse_gigabytes, read_case_ids
from segkit.errors import CheckpointError, DataError, RequestError, as_request, is_memory_error

if TYPE_CHECKING:
    from segkit.batch.manifest import CaseRecord
    from segkit.batch.worker import Executor, Task
    from segkit.inference.backends import Backend
    from segkit.reading.case import Cohort

BackendName: TypeAlias = Literal["auto", "torch", "onnxruntime", "openvino"]
EngineName: TypeAlias = Literal["local", "ray"]
Results: TypeAlias = Literal["auto", "files", "store"]

_LEAST_ROOM_MB = 64
"""Memory of the smallest case, with the libraries that are loaded for it."""


@dataclass(frozen=True)
class FolderOptions:
    """The arguments that `infer` and `inpaint` share; see `infer`."""

    scans: AnyPath
    out: AnyPath
    cases: CaseIds | None = None
    backend: BackendName = "auto"
    device: str | None = None
    layout: str | None = None
    modalities: Mapping[str, str] | None = None
    workers: int | None = None
    threads: int | None = None
    memory: str | float | None = None
    engine: EngineName = "local"
    ray_address: str | None = None
    results: Results = "auto"
    overwrite: bool = False

    def find_input(self, source: Path) -> Cohort:
        """The requested cases of the input, or of the folder to which the input was unpacked."""
        from segkit.batch.cases import find_input

        return find_input(
            source,
            layout=self.layout,
            modalities=self.modalities,
            case_ids=read_case_ids(self.cases),
            exclude=Path(self.out).resolve(),
        )


class Loading(NamedTuple):
    """How models are opened."""

    device: str
    backend: str
    threads: int | None


class Engine(NamedTuple):
    """Where cases are done and what they may take there; None: as much as helps, or as is free."""

    is_ray: bool
    address: str | None
    results: Results
    workers: int | None
    threads: int | None
    memory_gb: float | None

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Limit this process to its memory while models are opened and after; with Ray the memory is that of nodes.

        Raises:
            RequestError: what was loaded before, or is loaded meanwhile, takes more.
        """
        if self.memory_gb is None or self.is_ray:
            yield
            return
        from segkit.runtime import limit_memory

        limit_memory(self.memory_gb)
        try:
            _require_room()
            yield
            _require_room()
        except Exception as error:
            if not is_memory_error(error):
                raise
            limit_memory(None)  # so that there is memory for reporting the error
            raise RequestError(
                f"the models and what computes them take more than {self.memory_gb:.3g} GB",
                remedy="Pass a larger --memory; exported models take less than run folders, as they need no torch",
            ) from error

    def path(self, path: AnyPath) -> Path:
        """A path as the engine takes it: nodes have working directories of their own."""
        return Path(path).absolute() if self.is_ray else Path(path)

    def has_gpus(self, device: str | None) -> bool:
        """Whether cases are computed by GPUs of nodes; this machine need not have any."""
        return self.is_ray and device is not None and device.startswith("cuda")

    def loads_with(self, device: str | None, backend: str) -> tuple[str, str]:
        """Device and backend to load a model with; for GPUs of nodes it is loaded without one.

        Raises:
            RequestError: the backend computes on no GPU.
        """
        if not self.has_gpus(device):
            return device or "auto", backend
        if backend not in ("auto", "torch"):
            raise RequestError(f"backend {backend} computes on a CPU", remedy="Pass --device cpu, or --backend torch")
        return "cpu", "torch"


def _require_room() -> None:
    from segkit.runtime import room_mb

    if room_mb() < _LEAST_ROOM_MB:
        raise MemoryError


def choose_engine(
    engine: EngineName,
    address: str | None,
    results: Results,
    workers: int | None,
    threads: int | None,
    memory: str | float | None,
) -> Engine:
    """The engine that the options ask for.

    Raises:
        RequestError: options for a cluster without one, Ray is not installed, or the memory cannot be read.
    """
    if engine == "local" and (address is not None or results != "auto"):
        raise RequestError("--ray-address and --results are for a Ray cluster", remedy="Add --engine ray")
    if engine == "ray":
        from segkit.batch.ray_executor import require_ray

        require_ray()
    return Engine(engine == "ray", address, results, workers, threads, parse_gigabytes(memory))


def on_gpu(backend: Backend) -> Backend:
    """The same backend for the GPU of the machine that opens it."""
    from segkit.inference.backends import TorchBackend, torch_backend

    found = torch_backend(backend)
    return backend if found is None else TorchBackend(found.network, "cuda")


def executor_of(engine: Engine, backends: Iterable[Backend], folders: Sequence[Path]) -> Executor:
    """The executor of cases that `backends` compute and whose results go to `folders`."""
    from segkit.runtime import available_cores

    if not engine.is_ray:
        from segkit.batch.worker import LocalExecutor

        return LocalExecutor(min(1, available_cores() - 1) if engine.workers is None else engine.workers)
    from segkit.batch.ray_executor import RayExecutor, Share
    from segkit.inference.backends import torch_backend

    backends = list(backends)
    found = [torch_backend(backend) for backend in backends]
    uses_gpu = any(one is not None and one.device.type == "cuda" for one in found)
    threads = engine.threads or (1 if uses_gpu else max(backend.threads for backend in backends))
    share = Share(threads, int(uses_gpu), engine.memory_gb)
    return RayExecutor(folders, share, engine.address, workers=engine.workers or None, results=engine.results)


@dataclass(frozen=True)
class OpenFolder:
    """A folder whose cases are found and whose models are loaded."""

    task: Task[Any]
    cohort: Cohort
    output: Path
    engine: Engine
    model: str
    """Name of the model in the manifest."""
    part: str | None = None
    """Name of this part of the work, where several processes share a folder."""
    data: Path | None = None
    """Where the images are, for the manifest."""
    bank: Path | None = None
    """A second folder that results go to."""
    overwrite: bool = False

    def plan(self) -> tuple[list[Any], list[CaseRecord]]:
        """The plans of the cases that `run` would do, and the records of all others; nothing is written.

        Raises:
            RequestError: as `segkit.batch.runner.run_folder`.
        """
        from segkit.batch.cases import plan_cases
        from segkit.batch.runner import open_manifest

        manifest = open_manifest(self.task, self.cohort, self.output, self.model, self.part)
        plans, decided = plan_cases(self.task, self.cohort, self.output, manifest, overwrite=self.overwrite)
        return self.task.fit_memory(plans, self.engine.memory_gb)[1], decided

    def run(self, on_record: Callable[[CaseRecord], None] | None = None) -> dict[str, Any]:
        """Do the cases; returns the manifest. `on_record` is called after each case.

        Raises:
            RequestError: as `segkit.batch.runner.run_folder`.
        """
        from segkit.batch.runner import run_folder

        folders = [self.output, *([] if self.bank is None else [self.bank])]
        return run_folder(
            self.task,
            self.cohort,
            self.output,
            overwrite=self.overwrite,
            executor=executor_of(self.engine, self.task.backends(), folders),
            memory_gb=self.engine.memory_gb,
            on_record=on_record or (lambda record: None),
            model=self.model,
            part=self.part,
            data=self.data,
        )


@contextmanager
def open_folder(
    options: FolderOptions,
    find: Callable[[Path], tuple[Cohort, str | None]],
    load: Callable[[Cohort, Loading], Task[Any]],
    *,
    model: str,
    bank: Path | None = None,
    records_input: bool = False,
) -> Iterator[OpenFolder]:
    """Unpack the input, find its cases and load the models; the unpacked files are deleted afterwards.

    `find` returns the cases of a folder and the name of this part of the work. The limit set by `memory` ends with the
    block.

    Raises:
        RequestError: an input, a model or an option is missing or does not fit.
    """
    from segkit.reading.archives import opened
    from segkit.runtime import limit_memory

    engine = choose_engine(
        options.engine, options.ray_address, options.results, options.workers, options.threads, options.memory
    )
    input, output = engine.path(options.scans), engine.path(options.out)
    with ExitStack() as stack:
        try:
            source = stack.enter_context(opened(input))
        except DataError as error:
            raise as_request(error) from error
        cohort, part = find(source)
        if engine.memory_gb is not None and not engine.is_ray:
            stack.callback(limit_memory, None)
        try:
            with engine.limited():
                task = load(cohort, Loading(*engine.loads_with(options.device, options.backend), options.threads))
        except CheckpointError as error:
            raise as_request(error) from error
        if engine.has_gpus(options.device):
            task = task.with_backends(on_gpu)
        data = input if records_input and source == input else None
        yield OpenFolder(task, cohort, output, engine, model, part, data, bank, options.overwrite)
