"""Device, precision, seeds, threads and rank; only this module reads environment variables.

torch is imported inside functions, so that verbs without computation start fast.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import random
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from segkit.errors import RequestError, SegkitError, is_memory_error
from segkit.process_memory import peak_rss_mb

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessPlace:
    """Rank of this process, from 0, among all processes of a training and among those on this machine (`local`)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def process_place() -> ProcessPlace:
    """The place from RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, which torchrun sets; else a single process.

    Raises:
        RequestError: they contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "WORLD_SIZE" not in os.environ:
        return ProcessPlace()
    shown = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    try:
        rank, size = (int(os.environ[name]) for name in names[:2])
        place = ProcessPlace(rank, size, int(os.environ.get(names[2], 0)), int(os.environ.get(names[3], 1)))
    except (KeyError, ValueError):
        place = ProcessPlace(rank=-1)
    if not 0 <= place.rank < place.size or not 0 <= place.local_rank < place.local_size:
        raise RequestError(f"the rank of this process is unclear ({shown})", remedy="Start processes with torchrun")
    return place


def devices() -> tuple[str, ...]:
    """The devices of this machine, the best first: "cuda:0", "cuda:1" and so on, "mps", "cpu".

    torch is loaded only where there may be a GPU: on Linux, where there are device files of one.
    """
    if "torch" not in sys.modules and not _may_have_gpu():
        return ("cpu",)
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = ("mps",) if torch.backends.mps.is_available() else ()
    return (*(f"cuda:{number}" for number in range(gpus)), *mps, "cpu")


def _may_have_gpu() -> bool:
    if sys.platform != "linux":
        return True
    folder = Path("/dev")  # of NVIDIA, of NVIDIA's boards, of AMD, of NVIDIA within Windows
    return any(any(folder.glob(pattern)) for pattern in ("nvidia[0-9]*", "nv*gpu", "kfd", "dxg"))


def device_name(name: str | None = None) -> str:
    """The device to compute on, one of `devices`: the named one, or, with None or "auto", the best.

    "cuda" without a number is the GPU with the rank of this process among those of the machine.

    Raises:
        RequestError: the name is unknown or the machine lacks that device.
    """
    found = devices()
    kind, _, number = (found[0].partition(":")[0] if name in (None, "auto") else str(name)).partition(":")
    if kind not in ("cpu", "cuda", "mps") or not (number.isdecimal() or not number):
        remedy = "Pass one of them to --device"
        raise RequestError(f"device {name!r} is not known", expected="cpu, cuda, cuda:N or mps", remedy=remedy)
    index = int(number) if number else process_place().local_rank if kind == "cuda" else 0
    chosen = f"cuda:{index}" if kind == "cuda" else kind
    if chosen not in found or (kind != "cuda" and index):
        wanted = chosen if name in (None, "auto") else name
        raise RequestError(f"this machine has no usable {wanted} device", remedy=f"Pass --device {found[0]}")
    return chosen


def pick_device(name: str | None = None) -> torch.device:
    """`device_name` as a device of torch; a GPU is also made the current one of this process.

    Products of float32 are then rounded to TF32, as PyTorch has it for convolutions.

    Raises:
        RequestError: the name is unknown or the machine lacks that device.
    """
    import torch

    device = torch.device(device_name(name))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if device.type == "cpu":
        _report_spinning_threads()
    return device


Precision = Literal["fp32", "bf16", "fp16"]


def pick_precision(name: Literal["auto", Precision], device: torch.device) -> Precision:
    """The precision of the forward pass: "auto" is bf16 on processors and GPUs that compute it natively, else fp32.

    Of the other GPUs, those that compute fp16 fast (from V100, RTX 20 and T4 on) use fp16.
    """
    import torch

    if name != "auto":
        return name
    if device.type == "cuda":
        generation, _ = torch.cuda.get_device_capability(device)  # `is_bf16_supported` counts emulation
        return "bf16" if generation >= 8 else "fp16" if generation == 7 else "fp32"
    can: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return "bf16" if can.get("avx512_bf16") or can.get("amx_bf16") else "fp32"


def autocast(device: torch.device, precision: Precision | None) -> AbstractContextManager[Any]:
    """Inside, operations compute in this precision; with None in that of the surrounding code."""
    import torch

    if precision is None:
        return nullcontext()
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def exact_type(device: torch.device) -> torch.dtype:
    """The dtype of long sums: float64, or float32 on Apple GPUs, which have no float64."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch, the CPU and every GPU."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  libraries draw from the global state
    torch.manual_seed(seed)


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of the generators that `seed_everything` seeds, as plain values and tensors."""
    import numpy as np
    import torch

    of_numpy: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
    key = torch.from_numpy(of_numpy["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": {**of_numpy, "gauss": float(of_numpy["gauss"]), "state": {**of_numpy["state"], "key": key}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if device.type == "cuda" else [],
    }


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Restore `random_states`; GPU states only on a machine with the same number of GPUs."""
    import numpy as np
    import torch

    of_numpy = states["numpy"]
    key = of_numpy["state"]["key"].numpy().astype(np.uint32)
    random.setstate(states["python"])
    np.random.set_state({**of_numpy, "state": {**of_numpy["state"], "key": key}})  # noqa: NPY002
    torch.set_rng_state(states["torch"].cpu())
    if device.type == "cuda" and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def available_cores() -> int:
    """Processor cores that this process may use (its affinity mask, if the system has one)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def error_sentence(error: BaseException) -> str:
    """An error as one line for users who do not know Python."""
    text = " ".join(str(error).split())
    if isinstance(error, SegkitError):
        return text
    if is_memory_error(error):
        return (
            f"out of memory after {peak_rss_mb():.0f} MB. Close other programs, use a machine with more memory, "
            "or a model with a smaller patch or fewer outputs"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return f"unexpected {type(error).__name__}: {text[:300]}. This is a bug of segkit: run again with -v for the trace"


def cache_folder() -> Path:
    """The folder of files that can be recomputed: SEGKIT_CACHE, else `segkit` in the cache folder of the user."""
    if chosen := os.environ.get("SEGKIT_CACHE"):
        return Path(chosen)
    default = Path.home() / (".cache" if sys.platform != "win32" else "AppData/Local")
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "segkit"


def variables_with(**changes: str) -> dict[str, str]:
    """The environment variables of this process with changes, for another process."""
    return {**os.environ, **changes}


def refuse_telemetry() -> None:
    """Switch off usage reports of libraries, which need consent in a clinic; variables set by the user are kept.

    These report by default, some when they are loaded: OpenVINO (to Google Analytics), ONNX Runtime (to Microsoft, with
    a machine id from the cache folder of the user), Ray and MLflow. OpenVINO has no variable; it does not report if its
    telemetry package cannot be imported.
    """
    prefer_variables(
        HF_HUB_DISABLE_TELEMETRY="1",
        MLFLOW_DISABLE_TELEMETRY="true",
        ORT_DISABLE_TELEMETRY="1",
        RAY_USAGE_STATS_ENABLED="0",
    )
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as if not installed


_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def let_threads_sleep() -> None:
    """Let OpenMP threads sleep at barriers, unless the user chose otherwise or PyTorch was loaded before.

    They spin by default: beside one other busy process a training step on two cores then takes many times as long
    (`benchmarks/distributed.py time`). OpenMP reads the variable when PyTorch loads it.
    """
    if "torch" not in sys.modules and not os.environ.keys() & set(_WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"


@functools.cache
def _report_spinning_threads() -> None:
    import torch

    if torch.get_num_threads() > 1 and not os.environ.keys() & set(_WAITING):
        _log.warning(
            "torch was imported before segkit: its threads spin while they wait, which is slow beside other programs. "
            "Import segkit first, or set OMP_WAIT_POLICY=passive"
        )


def prefer_variables(**values: str) -> None:
    """Set environment variables, unless the user has set them."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def mlflow_server() -> str | None:
    """The address in MLFLOW_TRACKING_URI, if any."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def environment() -> dict[str, str]:
    """Versions and platform, as recorded in run folders, manifests and benchmark tables."""
    from importlib import metadata

    versions = {"python": platform.python_version(), "platform": platform.platform(), "cores": str(available_cores())}
    for package in ("segkit", "torch", "monai", "nibabel", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def is_debug() -> bool:
    """Whether SEGKIT_DEBUG asks for tracebacks instead of sentences."""
    return os.environ.get("SEGKIT_DEBUG", "") not in ("", "0")
