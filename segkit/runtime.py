"""Device, precision, seeds, threads, rank and memory: the only reader of environment variables.

torch is imported inside the functions that need it, so that verbs which compute nothing start fast.
"""

from __future__ import annotations

import os
import platform
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segkit.errors import RequestError, SegkitError, is_memory_error

if TYPE_CHECKING:
    import torch

_GIB = 1024**3

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
"""Parameters of glibc's mallopt, from its malloc.h."""


@dataclass(frozen=True)
class ProcessPlace:
    """Which of the processes of a training this one is, from 0; `local` ones are those on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def process_place() -> ProcessPlace:
    """What torchrun tells in RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without it this process is alone.

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
        raise RequestError(
            f"the environment does not say which process this is ({shown})", remedy="Start processes with torchrun"
        )
    return place


def pick_device(name: str | None = None) -> torch.device:
    """The device to compute on: the one named, else CUDA where there is one, else the CPU.

    Of several processes on a machine each has a GPU of its own, unless the name has a number.

    Raises:
        RequestError: the name is unknown or the machine lacks that device.
    """
    import torch

    local_rank = process_place().local_rank
    if local_rank and name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{local_rank}"
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RequestError(
            f"device {name!r} is not known", expected="cpu, cuda, cuda:N or mps", remedy="Pass one of them to --device"
        ) from error
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    if (device.index or 0) >= counts.get(device.type, 0):
        raise RequestError(f"this machine has no usable {name} device", remedy="Pass --device cpu")
    return device


def may_have_gpu() -> bool:
    """Whether it is worth loading torch to ask for a GPU; on Linux the device files tell that there is none."""
    if sys.platform != "linux":
        return True
    return any(Path("/dev").glob("nvidia[0-9]*")) or any(Path("/dev", name).exists() for name in ("kfd", "dxg"))


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass: "auto" is bfloat16 on a GPU that has it and float32 elsewhere."""
    import torch

    if name == "auto":
        is_fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if is_fast else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch, the CPU and every GPU."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  libraries below us draw from the global state
    torch.manual_seed(seed)


def random_states(device: torch.device) -> dict[str, Any]:
    """Where the streams are that `seed_everything` begins, as plain values and tensors: Python, numpy, torch, GPUs."""
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
    """Go on where `random_states` was called; a machine with another number of GPUs begins their streams anew."""
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
    """Processor cores this process may use (its affinity mask, where the system has one)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory_gb(device: torch.device | None = None) -> float:
    """Memory this process may still take, in GiB: free GPU memory, else free RAM within the container's limit."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0] / _GIB
    free = _free_ram_bytes()
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists():
        text = limit.read_text().strip()
        if text != "max":
            free = min(free, int(text) - int(used.read_text()) + _reclaimable_bytes(limit.parent))
    return free / _GIB


def _reclaimable_bytes(group: Path) -> int:
    """Files that the kernel keeps in memory only as long as nobody needs it."""
    stat = group / "memory.stat"
    lines = stat.read_text().splitlines() if stat.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def _free_ram_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 8 * _GIB


def peak_rss_mb() -> float:
    """The largest resident memory this process has had so far, in MB; 0.0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


def current_rss_mb() -> float:
    """Resident memory of this process now, in MB; the peak where the system does not tell the present value."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024**2
    return peak_rss_mb()


def error_sentence(error: BaseException) -> str:
    """One line about an error that a user without knowledge of Python understands."""
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
    return (
        f"unexpected {type(error).__name__}: {text[:300]}. This is a fault of segkit: run again with -v for the trace"
    )


def keep_freed_memory(device: torch.device) -> None:
    """Let this process keep the memory that tensors on a CPU leave behind, for the next ones.

    glibc gives every block above 32 MiB back to the system at once. A network asks for the same sizes at each step, and
    the kernel has to clear the pages each time, which can take as long as the arithmetic (`segkit bench speed`). For
    processes that do little else: the setting is the whole process's. Without glibc, or under a limit of memory,
    nothing changes.
    """
    if has_memory_limit():
        return
    _set_allocator(device, {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})


def return_freed_memory(device: torch.device) -> None:
    """Let this process give the memory of every large tensor on a CPU back as soon as it is freed.

    Slower, but the least memory: as it comes, glibc puts blocks of up to 32 MiB between others on its heap, and what
    they leave is not always filled again (`segkit bench memory`). Without glibc nothing changes.
    """
    _set_allocator(device, {_M_MMAP_THRESHOLD: 4 * 1024**2})


def _set_allocator(device: torch.device, parameters: Mapping[int, int]) -> None:
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    import ctypes

    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in parameters.items():
        mallopt(parameter, value)


def cache_folder() -> Path:
    """Where segkit keeps what it can make again: SEGKIT_CACHE, else `segkit` in the cache folder of the user."""
    chosen = os.environ.get("SEGKIT_CACHE")
    if chosen:
        return Path(chosen)
    default = Path.home() / (".cache" if sys.platform != "win32" else "AppData/Local")
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "segkit"


def limit_memory(megabytes: float) -> None:
    """Let this process ask the system for no more memory than this, so that too much fails where it can be dealt with.

    Where the system has no such limit (Windows, macOS) nothing changes.
    """
    if sys.platform != "linux":
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = int(megabytes * 1024**2)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def lift_memory_limit() -> None:
    """Take back what `limit_memory` set, so that there is room to say what was too large for it."""
    if sys.platform != "linux":
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def room_mb() -> float:
    """Memory this process may still ask for, in MB: what is free, or what `limit_memory` leaves of it."""
    free = 1024 * available_memory_gb()
    if not has_memory_limit():
        return free
    import resource

    status = Path("/proc/self/status").read_text()
    used_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:"))
    return min(free, resource.getrlimit(resource.RLIMIT_DATA)[0] / 1024**2 - used_kb / 1024)


def has_memory_limit() -> bool:
    """Whether `limit_memory`, or whoever started this process, has set a limit."""
    if sys.platform != "linux":
        return False
    import resource

    return resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY


def variables_with(**changes: str) -> dict[str, str]:
    """The environment variables of this process with some changed, for a process to be started."""
    return {**os.environ, **changes}


def refuse_telemetry() -> None:
    """Keep the libraries below us from telling their makers that, where and with what they are used.

    Several do so unasked, some as soon as they are loaded: OpenVINO (to Google Analytics), ONNX Runtime (to Microsoft,
    with an identity of the machine that it leaves in the cache folder of the user), Ray and MLflow. Where patients are
    treated nothing leaves the house unasked. Whoever wants to report sets the variable otherwise; OpenVINO has none,
    and does without where its reporter cannot be loaded.
    """
    prefer_variables(
        HF_HUB_DISABLE_TELEMETRY="1",
        MLFLOW_DISABLE_TELEMETRY="true",
        ORT_DISABLE_TELEMETRY="1",
        RAY_USAGE_STATS_ENABLED="0",
    )
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # Python's way to say: not installed


def prefer_variables(**values: str) -> None:
    """Set environment variables that a library reads when it is loaded, unless the user has set them."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def mlflow_server() -> str | None:
    """Where MLFLOW_TRACKING_URI asks runs to be tracked; None keeps them in the run folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def environment() -> dict[str, str]:
    """Versions and platform, as recorded in run folders, manifests and benchmark tables."""
    from importlib import metadata

    packages = ("segkit", "torch", "monai", "nibabel", "numpy")
    versions = {"python": platform.python_version(), "platform": platform.platform(), "cores": str(available_cores())}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def is_debug() -> bool:
    """Whether SEGKIT_DEBUG asks for tracebacks instead of sentences."""
    return os.environ.get("SEGKIT_DEBUG", "") not in ("", "0")
