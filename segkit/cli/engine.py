"""Options for where the cases of a folder are done, on this machine or a Ray cluster, and the executor for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from segkit.cli.options import parse_gigabytes
from segkit.errors import RequestError, is_memory_error

if TYPE_CHECKING:
    from segkit.batch.worker import Executor
    from segkit.inference.backends import Backend

WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=0,
        help="Threads that read ahead; 0: no threads at all. Default: 1, 0 on one core. With ray: cases at a time, by "
        "default as many as the nodes have room for.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, help="CPU cores that compute a case, here or on a node. Default: all of this one."
    ),
]
EngineOption = Annotated[
    Literal["local", "ray"], typer.Option("--engine", help="This machine, or the nodes of a Ray cluster.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        help="ray://HOST:10001, HOST:6379, auto or local. Default: RAY_ADDRESS, a cluster started here, else local.",
        show_default=False,
    ),
]
Results = Literal["auto", "files", "store"]
ResultsOption = Annotated[
    Results,
    typer.Option(
        "--results",
        help="With ray: nodes write to OUT (files), send results back (store), or each does what it can (auto).",
    ),
]


_LEAST_ROOM_MB = 64
"""Memory of the smallest case, with the libraries that are loaded for it."""


class Engine(NamedTuple):
    """Where cases are done, and what they may take there: None is as much as helps, or as is free."""

    is_ray: bool
    address: str | None
    results: Results
    workers: int | None
    threads: int | None
    memory_mb: float | None

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Keep this process to its memory from now on, while models are opened; with Ray the memory is that of nodes.

        Raises:
            RequestError: what is loaded before, or meanwhile, takes more by itself.
        """
        if self.memory_mb is None or self.is_ray:
            yield
            return
        from segkit.runtime import lift_memory_limit, limit_memory

        limit_memory(self.memory_mb)
        try:
            _require_room()
            yield
            _require_room()
        except Exception as error:
            if not is_memory_error(error):
                raise
            lift_memory_limit()
            raise RequestError(
                f"the models and what computes them take more than {self.memory_mb:.0f} MB",
                remedy="Pass a larger --memory; exported models take less than run folders, as they need no torch",
            ) from error

    def path(self, path: Path) -> Path:
        """A path as the engine takes it: nodes have working directories of their own."""
        return path.absolute() if self.is_ray else path

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
    engine: Literal["local", "ray"],
    address: str | None,
    results: Results,
    workers: int | None,
    threads: int | None,
    memory: str | None,
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
    memory_mb = None if memory is None else 1024 * parse_gigabytes(memory)
    return Engine(engine == "ray", address, results, workers, threads, memory_mb)


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
    share = Share(threads, int(uses_gpu), engine.memory_mb)
    return RayExecutor(folders, share, engine.address, workers=engine.workers or None, results=engine.results)
