"""Backends: torch, ONNX Runtime and OpenVINO behind one call from windows to logits, both numpy arrays.

Only the torch backend loads torch, which takes seconds and half a gigabyte. Backends can be pickled with their network
and number of threads: with another number sums may round differently.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from segkit.errors import RequestError
from segkit.inference.graph import INPUT, OUTPUT, graph_files
from segkit.process_memory import has_memory_limit, keep_freed_memory
from segkit.runtime import Precision, autocast, available_cores, pick_device

if TYPE_CHECKING:
    import torch

BACKENDS = ("auto", "torch", "onnxruntime", "openvino")
_FASTEST_FIRST = ("openvino", "onnxruntime")
"""On a CPU, as `segkit bench speed` measures."""

_CUDA_PROVIDER = "CUDAExecutionProvider"

_CORE_LOCK = threading.Lock()
"""For threads that open networks at the same time."""

Array = NDArray[np.float32]


class Backend(Protocol):
    """A network, ready to compute; `name` is torch, onnxruntime or openvino, `threads` are those on a CPU."""

    name: str
    threads: int
    device: Any
    """As `runtime.device_name` names it."""

    def __call__(self, windows: Array) -> Array:
        """Logits (B, K, *window) float32 of windows (B, C, *window) float32."""
        ...


class TorchBackend:
    """A torch module on a CPU or a GPU; its training mode is restored after each call.

    Each of `at_once` windows of a call has a process of its own on a CPU (see `SampleProcesses`).

    `threads` on a CPU are set for the whole process; None leaves them unchanged. `precision` None is that of the code
    around a call.
    """

    name = "torch"

    def __init__(
        self,
        network: torch.nn.Module,
        device: torch.device | str = "cpu",
        threads: int | None = None,
        precision: Precision | None = None,
    ) -> None:
        import torch

        from segkit.models.sample_processes import SampleProcesses

        self.network, self.precision = network, precision
        self.device = torch.device(device)
        self.threads = threads or torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        # Windows that are computed at the same time need the memory of all.
        self.at_once = self.threads if self.device.type == "cpu" and not has_memory_limit() else 1
        self._sample_processes = SampleProcesses()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy on the CPU, moved to the device when it is unpickled."""
        network = self.network if self.device.type == "cpu" else copy.deepcopy(self.network).cpu()
        return _reopen_torch, (network, str(self.device), self.threads, self.precision)

    def __call__(self, windows: Array) -> Array:
        """Logits (B, K, *window) of windows (B, C, *window)."""
        import torch

        torch.backends.cudnn.benchmark = False  # windows around holes have many sizes
        result: Array = self.compute(torch.from_numpy(windows).to(self.device)).cpu().numpy()
        return result

    def compute(self, windows: torch.Tensor) -> torch.Tensor:
        """Logits (B, K, *window) float32 of windows (B, C, *window), on the device; of a list of logits, the first."""
        import torch

        was_training = self.network.training
        self.network.eval()
        try:
            with torch.inference_mode(), autocast(self.device, self.precision):
                logits = self._sample_processes(self.network, windows)
                return (logits if isinstance(logits, torch.Tensor) else logits[0]).float()
        finally:
            self.network.train(was_training)


class _GraphBackend:
    """An ONNX file; input `image`, output `logits`."""

    name: str
    device = "cpu"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self.path, self.threads = path, threads or available_cores()

    def __reduce__(self) -> tuple[Any, ...]:
        """The files are pickled too."""
        files = {path.name: path.read_bytes() for path in graph_files(self.path)}
        return _reopen_graph, (self.name, files, self.threads, self.device)


class OnnxRuntimeBackend(_GraphBackend):
    """An ONNX file in ONNX Runtime, on a CPU or on "cuda:N"; RequestError if it cannot use that GPU."""

    name = "onnxruntime"

    def __init__(self, path: Path, threads: int | None = None, device: str = "cpu") -> None:
        import onnxruntime

        super().__init__(path, threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        providers: list[Any] = ["CPUExecutionProvider"]
        if device != "cpu":  # TF32 would round the products of float32
            of_gpu = {"device_id": device.removeprefix("cuda:"), "use_tf32": "0"}
            providers.insert(0, (_CUDA_PROVIDER, of_gpu))
        self.device = device
        self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=providers)
        if device != "cpu" and _CUDA_PROVIDER not in self._session.get_providers():  # it only logs that
            expected = "the CUDA and cuDNN that onnxruntime-gpu was built for"
            remedy = "Install them, or pass --device cpu"
            raise RequestError(f"ONNX Runtime cannot use {device}", expected=expected, remedy=remedy)

    def __call__(self, windows: Array) -> Array:
        """Logits (B, K, *window) of windows (B, C, *window)."""
        result: Array = self._session.run([OUTPUT], {INPUT: windows})[0]
        return result


class OpenvinoBackend(_GraphBackend):
    """An ONNX file in OpenVINO; `cache` is a folder for the compiled network, which loads faster."""

    name = "openvino"

    def __init__(self, path: Path, threads: int | None = None, cache: Path | None = None) -> None:
        super().__init__(path, threads)
        with _CORE_LOCK:
            core = _openvino_core()
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        settings["INFERENCE_NUM_THREADS"] = self.threads
        if cache is not None:
            settings["CACHE_DIR"] = str(cache)
        model = core.read_model(path)
        shape = model.input(INPUT).partial_shape
        shape[0] = 1  # a free batch size takes twice as long: OpenVINO then does not choose layouts
        model.reshape({INPUT: shape})
        self._network: Any = core.compile_model(model, "CPU", settings)

    def __call__(self, windows: Array) -> Array:
        """Logits (B, K, *window) of windows (B, C, *window), computed one by one."""
        return np.concatenate([self._network({INPUT: window[None]})[OUTPUT] for window in windows])


class ReopenableBackend:
    """A backend whose memory can be released; the next call opens it again. It is pickled as the opened backend."""

    def __init__(self, reopen: Callable[[], Backend], opened: Backend) -> None:
        self.name, self.threads, self.device = opened.name, opened.threads, opened.device
        self._reopen = reopen
        self._opened: Backend | None = opened

    @property
    def opened(self) -> Backend:
        """The backend itself, opened again if it was released; raises what opening it raises."""
        if self._opened is None:
            self._opened = self._reopen()
        return self._opened

    def release(self) -> None:
        """Free its memory."""
        self._opened = None

    def __call__(self, windows: Array) -> Array:
        """Logits (B, K, *window) of windows (B, C, *window); raises what `opened` raises."""
        return self.opened(windows)

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        return self.opened.__reduce_ex__(protocol)


def torch_backend(backend: object) -> TorchBackend | None:
    """The torch backend behind `backend`; None for other runtimes and functions."""
    opened = backend.opened if isinstance(backend, ReopenableBackend) else backend
    return opened if isinstance(opened, TorchBackend) else None


def installed_backends() -> tuple[str, ...]:
    """Backends for ONNX files that this Python has, the fastest first."""
    return tuple(name for name in _FASTEST_FIRST if importlib.util.find_spec(name) is not None)


def has_cuda_runtime() -> bool:
    """Whether the installed ONNX Runtime is one for NVIDIA GPUs."""
    if "onnxruntime" not in installed_backends():
        return False
    import onnxruntime

    return _CUDA_PROVIDER in onnxruntime.get_available_providers()


def runtime_for(name: str) -> str:
    """The fastest installed runtime for "auto", else the name itself."""
    return next(iter(installed_backends()), "onnxruntime") if name == "auto" else name


def open_graph(
    path: Path, name: str, cache: Path | None = None, threads: int | None = None, device: str = "cpu"
) -> Backend:
    """The backend `name` with an ONNX file; auto is the fastest that is installed; default threads: all cores.

    Raises:
        RequestError: that backend, or any, is not installed.
    """
    chosen = runtime_for(name)
    if chosen not in installed_backends():
        raise RequestError(
            f"backend {chosen} is not installed" if chosen in _FASTEST_FIRST else f"{chosen} does not read ONNX files",
            expected=f"one of {', '.join(_FASTEST_FIRST)}",
            remedy="Install it: pip install 'segkit[onnx]' or 'segkit[openvino]'",
        )
    return OpenvinoBackend(path, threads, cache) if chosen == "openvino" else OnnxRuntimeBackend(path, threads, device)


def windows_at_once(backend: object) -> int:
    """How many windows a call should have: on a CPU torch computes each in a process of its own."""
    found = torch_backend(backend)
    return 1 if found is None else found.at_once


@functools.cache
def _openvino_core() -> Any:
    """The one OpenVINO core, kept to the end of the process.

    Its CPU plugin gives the thread that loads it a signal stack, and frees it when it is unloaded. If several are not
    unloaded in reverse order, the thread keeps a freed signal stack, and the next signal kills the process.
    """
    import openvino

    return openvino.Core()


def _reopen_torch(network: torch.nn.Module, device: str, threads: int, precision: Precision | None) -> TorchBackend:
    chosen = pick_device(device)
    keep_freed_memory(chosen)
    return TorchBackend(network.to(chosen), chosen, threads, precision)


def _reopen_graph(name: str, files: Mapping[str, bytes], threads: int, device: str) -> Backend:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, file) for file in files]
        for path, content in zip(paths, files.values(), strict=True):
            path.write_bytes(content)
        return open_graph(paths[0], name, threads=threads, device=device)
