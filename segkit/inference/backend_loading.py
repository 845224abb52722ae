"""Opens the backend of a model folder.

The network of a run folder is computed by torch or, on a CPU with a faster runtime installed, written once as an ONNX
file, compared with torch, and kept in the user's cache with the files that the runtime compiles; later runs do not load
torch.
"""

import functools
import hashlib
import logging
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from segkit.checkpoint.card import GraphCard, ModelCard
from segkit.errors import CheckpointError, RequestError, free_memory_of, is_memory_error
from segkit.inference.backends import (
    Array,
    Backend,
    OnnxRuntimeBackend,
    ReopenableBackend,
    TorchBackend,
    has_cuda_runtime,
    installed_backends,
    open_graph,
    runtime_for,
)
from segkit.inference.graph import missing_exporters, require_onnx
from segkit.inference.graph_check import require_harmless
from segkit.inference.parity import LARGEST_DIFFERENCE, random_windows, relative_difference
from segkit.process_memory import has_memory_limit, keep_freed_memory, room_mb
from segkit.reading.files import file_sha256
from segkit.runtime import Precision, cache_folder, device_name, pick_device, pick_precision

if TYPE_CHECKING:
    import torch

GRAPH_NAME = "model.onnx"

_LAYOUT = 1
"""Part of the name in the cache: increase it when graphs are written in another way."""
_TORCH_MB = 700
"""Memory that loading torch needs; with less it ends the process."""
_SMALLEST_WINDOW = 16
"""Voxels along an axis: smaller windows are not tried."""

_log = logging.getLogger(__name__)


def open_backend(
    folder: Path, card: ModelCard, device: str, name: str, window: Sequence[int], *, threads: int | None = None
) -> Backend:
    """The backend of the model in `folder` for windows of `window` voxels.

    The device is cpu, cuda, cuda:N, mps or auto. Backend auto is torch on a GPU, and on a CPU the fastest that is
    installed. Exports are computed by a GPU where ONNX Runtime can use it, see `_device_of_exports`. `threads` are
    those on a CPU; None is the number of cores.

    Raises:
        CheckpointError: the model is missing or damaged.
        RequestError: the backend is not installed, or cannot compute this model on this device.
    """
    window = tuple(window)
    if card.export is not None:
        return _open_export(folder, card, _device_of_exports(device, name, folder), name, window, threads)
    if name == "torch" or device_name(device) != "cpu" or (name == "auto" and not can_write_graphs()):
        return _open_torch(folder, card, device, name, window, threads)
    require_onnx(", or pass --backend torch")
    if not card.sha256:
        raise RequestError("the weights of this model have no digest", where=folder, remedy="Pass --backend torch")
    cache = cache_folder() / "graphs" / f"{card.sha256[:32]}-{'x'.join(map(str, window))}-{_LAYOUT}"
    if not (cache / GRAPH_NAME).is_file():
        checked = _fill(cache, folder, card, name, window, threads)
        if checked is not None:
            return checked
    return open_graph(cache / GRAPH_NAME, name, cache, threads)


def open_with_room(
    reopen: Callable[[tuple[int, ...]], Backend], card: ModelCard, window: tuple[int, ...]
) -> tuple[tuple[int, ...], ReopenableBackend]:
    """The backend of a model with windows of this size, or of a smaller one if memory is too short."""
    while True:
        try:
            return window, ReopenableBackend(functools.partial(reopen, window), reopen(window))
        except Exception as error:
            smaller = smaller_window(window, card)
            if not is_memory_error(error) or smaller is None:
                raise
            free_memory_of(error)
            window = smaller


def smaller_window(window: tuple[int, ...], card: ModelCard) -> tuple[int, ...] | None:
    """A window of half the size along its longest axis; None if that is too small."""
    axis = max(range(len(window)), key=window.__getitem__)
    unit = card.divisor[axis]
    length = window[axis] // 2 // unit * unit
    if length < max(unit, _SMALLEST_WINDOW):
        return None
    return (*window[:axis], length, *window[axis + 1 :])


def can_write_graphs() -> bool:
    """Whether networks can be turned into ONNX files here, and a runtime for them is installed."""
    return bool(installed_backends()) and not missing_exporters()


def _device_of_exports(device: str, name: str, folder: Path) -> str:
    """The device that computes an export: a GPU needs ONNX Runtime's package for it; "auto" is a CPU without it.

    Raises:
        RequestError: the machine lacks the device, or the runtime cannot use it.
    """
    chosen = device_name(device)
    if chosen == "cpu" or (chosen.startswith("cuda") and name in ("auto", "onnxruntime") and has_cuda_runtime()):
        return chosen
    if device == "auto":
        return "cpu"
    raise RequestError(
        f"an export cannot be computed on {chosen} by backend {name}",
        where=folder,
        expected="a CPU, or an NVIDIA GPU with the package onnxruntime-gpu",
        remedy="Pass --device cpu, or use the run folder that was exported",
    )


def _open_export(
    folder: Path, card: ModelCard, device: str, name: str, window: tuple[int, ...], threads: int | None
) -> Backend:
    if card.export is None or window != card.patch_size:
        raise RequestError(
            f"an export computes windows of {card.patch_size} voxels only, not {window}",
            where=folder,
            remedy="Use the run folder, or train with a smaller patch",
        )
    approved = [graph for graph in card.export.graphs if graph.is_approved]
    timed = [graph for graph in approved if graph.seconds and device == "cpu"]  # the times are those of a CPU
    graph = min(timed, key=lambda one: min(one.seconds.values())) if timed else approved[0]
    _require_whole(folder, graph)
    if device != "cpu":
        name = "onnxruntime"
    if name == "auto" and graph.seconds:
        installed = [backend for backend in graph.seconds if backend in installed_backends()]
        name = min(installed, key=graph.seconds.__getitem__, default=name)
    path = folder / graph.file
    require_harmless(path, graph.sha256)
    with _explained(path):
        if runtime_for(name) == "openvino":
            _have_computed_elsewhere(path, graph, (1, card.input_channels, *window))
        return GuardedBackend(open_graph(path, name, threads=threads, device=device), path, card.network.out_channels)


def _have_computed_elsewhere(path: Path, graph: GraphCard, shape: tuple[int, ...]) -> None:
    """Compute an untrusted graph once in ONNX Runtime, if installed, before OpenVINO opens it.

    ONNX Runtime validates shapes; OpenVINO does not, and writes beyond its buffers. Computed graphs are recorded in the
    user's cache by their digests.
    """
    if "onnxruntime" not in installed_backends():
        return
    facts = f"{sorted(graph.sha256.items())} {shape}"
    known = cache_folder() / "computed" / hashlib.sha256(facts.encode()).hexdigest()
    if known.exists():
        return
    OnnxRuntimeBackend(path)(np.zeros(shape, np.float32))
    with suppress(OSError):  # a cache that cannot be written costs the time again
        known.parent.mkdir(parents=True, exist_ok=True)
        known.touch()


class GuardedBackend:
    """The runtime of an exported graph; its failures, and outputs that are not `outputs` logits, are CheckpointErrors.

    A single voxel would otherwise be broadcast over the window.
    """

    def __init__(self, backend: Backend, path: Path, outputs: int) -> None:
        self.name, self.threads, self.device = backend.name, backend.threads, backend.device
        self._backend, self._path, self._outputs = backend, path, outputs

    def __call__(self, windows: Array) -> Array:
        """Logits (B, K, *window) of windows (B, C, *window).

        Raises:
            CheckpointError: the graph does not compute them.
        """
        with _explained(self._path):
            logits: Array = np.asarray(self._backend(windows))
        expected = (len(windows), self._outputs, *windows.shape[2:])
        if logits.shape != expected or logits.dtype != np.float32:
            raise CheckpointError(
                f"the graph gives {logits.dtype} of shape {logits.shape}",
                where=self._path,
                expected=f"logits, float32 of shape {expected}",
                remedy="Export the model again",
            )
        return logits


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Report any failure of a runtime as a CheckpointError; memory errors pass unchanged."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RequestError) or is_memory_error(error):
            raise
        reason = " ".join(str(error).split())[:300]
        found = f"the graph cannot be computed ({reason})"
        raise CheckpointError(found, where=path, remedy="Export the model again") from error


def _require_whole(folder: Path, graph: GraphCard) -> None:
    if graph.file not in graph.sha256:
        raise CheckpointError(f"has no sha256 of {graph.file}", where=folder, remedy="Export the model again")
    for file, digest in graph.sha256.items():
        path = folder / file
        if not path.is_file() or file_sha256(path) != digest:
            found = "is damaged or was swapped" if path.is_file() else "is missing"
            raise CheckpointError(found, where=path, remedy="Copy the whole folder again, or export again")


def _open_torch(
    folder: Path, card: ModelCard, device: str, name: str, window: tuple[int, ...], threads: int | None
) -> Backend:
    _require_room_for_torch()
    from segkit.checkpoint.model import load_model

    chosen = pick_device(device)
    if name not in ("auto", "torch"):
        raise RequestError(f"backend {name} computes on a CPU", remedy="Pass --device cpu, or --backend torch")
    if chosen.type == "cpu":
        _require_room(card, window)
    keep_freed_memory(chosen)
    return TorchBackend(load_model(folder, chosen), chosen, threads, inference_precision(card, chosen))


def inference_precision(card: ModelCard, device: "torch.device") -> Precision:
    """The precision of a network's inference: on NVIDIA GPUs that of its training, if the GPU has it; else fp32.

    Networks that fill holes compute intensities, which have more digits than bf16.
    """
    trained = "fp16" if card.nnunet is not None else card.training_data.precision  # nnU-Net's own choice on a GPU
    if device.type != "cuda" or trained == "fp32" or card.task == "inpainting":
        return "fp32"
    return "fp16" if trained == "fp16" else pick_precision("auto", device)


def _require_room_for_torch() -> None:
    if has_memory_limit() and "torch" not in sys.modules and room_mb() < _TORCH_MB:
        raise MemoryError(f"torch takes {_TORCH_MB} MB, and {room_mb():.0f} MB are left")


def _require_room(card: ModelCard, window: tuple[int, ...]) -> None:
    """MemoryError if a memory limit is set and a window needs more than is left."""
    if not has_memory_limit():
        return
    from segkit.checkpoint.model import build_network
    from segkit.preparing.memory import window_bytes

    needed_mb = window_bytes(lambda: build_network(card, downloads=False), (1, card.input_channels, *window)) / 1024**2
    if needed_mb > room_mb():
        raise MemoryError(f"a window takes {needed_mb:.0f} MB, and {room_mb():.0f} MB are left")


def _fill(
    cache: Path, folder: Path, card: ModelCard, name: str, window: tuple[int, ...], threads: int | None
) -> Backend | None:
    """Write the network of a run folder into the cache; returns the torch backend if that fails or differs from it."""
    _require_room_for_torch()
    from segkit.checkpoint.model import load_model
    from segkit.inference.graph import write_graph

    _require_room(card, window)
    _log.info("preparing the network of %s for a faster runtime, once", folder)
    network = load_model(folder)
    torch_backend = TorchBackend(network, threads=threads)
    temporary = cache.with_name(f".{cache.name}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        write_graph(network, temporary / GRAPH_NAME, card.input_channels, window)
        (noise,) = random_windows(card.input_channels, window, 1)
        difference = relative_difference(open_graph(temporary / GRAPH_NAME, name), torch_backend, noise)
        if difference > LARGEST_DIFFERENCE:
            _log.warning("the network differs by %.1e in another runtime; torch computes it", difference)
            return torch_backend
        if cache.exists():  # another process was faster
            return None
        temporary.rename(cache)
    except Exception as error:
        if is_memory_error(error):
            raise  # a smaller window may do
        _log.warning("the network cannot be prepared for another runtime (%s); torch computes it", error)
        return torch_backend
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return None
