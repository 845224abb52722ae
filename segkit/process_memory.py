"""Memory of this process: what is free, taken and allowed, and what glibc does with freed blocks."""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_GIB = 1024**3
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
"""Parameters of mallopt, from malloc.h of glibc."""


def available_memory_gb(device: torch.device | None = None) -> float:
    """Memory that this process may still take, in GiB: free GPU memory, or free RAM within a container's limit."""
    if device is not None and device.type == "cuda":
        import torch

        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own free blocks
        return (torch.cuda.mem_get_info(device)[0] + cached) / _GIB
    available_kb = _number_after("MemAvailable:", Path("/proc/meminfo"))
    if available_kb is not None:
        free = available_kb * 1024
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    else:
        free = 8 * _GIB
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        page_cache = _number_after("inactive_file ", group / "memory.stat") or 0  # freed by the kernel on demand
        free = min(free, int(most) - int(used.read_text()) + page_cache)
    return free / _GIB


def _number_after(start: str, path: Path) -> int | None:
    """The number in the line of a kernel file that starts with `start`; None without the file or the line."""
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(start)), None)


def peak_rss_mb() -> float:
    """The largest resident memory of this process so far, in MB; 0.0 where the system does not report it."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


def children_mb() -> float:
    """Memory that the processes started by this one, and still there, do not share with it, in MB; 0.0 off Linux."""
    rollups = [Path(f"/proc/{process.pid}/smaps_rollup") for process in multiprocessing.active_children()]
    names = ("Private_Clean:", "Private_Dirty:")
    return sum(_number_after(name, rollup) or 0 for rollup in rollups for name in names) / 1024


def current_rss_mb() -> float:
    """Resident memory of this process now, in MB; the peak where the system reports only that."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024**2
    return peak_rss_mb()


def keep_freed_memory(device: torch.device) -> None:
    """Reuse the memory of freed CPU tensors in this process.

    glibc returns every block above 32 MiB to the system at once. A network needs the same sizes at each step, and
    clearing the pages each time can take as long as the arithmetic (`segkit bench speed`). Without glibc, or under a
    memory limit, nothing changes.
    """
    if not has_memory_limit():
        _set_allocator(device, {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})


def return_freed_memory(device: torch.device) -> None:
    """Return the memory of every large CPU tensor to the system when it is freed, which is slower.

    By default glibc puts blocks of up to 32 MiB between others on its heap, and the gaps are not always filled again
    (`segkit bench memory`). Without glibc nothing changes.
    """
    _set_allocator(device, {_M_MMAP_THRESHOLD: 4 * 1024**2})


def _set_allocator(device: torch.device, parameters: Mapping[int, int]) -> None:
    import ctypes

    is_glibc = device.type == "cpu" and platform.libc_ver()[0] == "glibc"
    for parameter, value in parameters.items() if is_glibc else ():
        ctypes.CDLL(None).mallopt(parameter, value)


def limit_memory(memory_gb: float | None) -> None:
    """Limit the memory of this process, in GiB, so that a request for more raises a MemoryError; on Linux only.

    None lifts the limit.
    """
    if sys.platform != "linux":
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = float("inf") if hard == resource.RLIM_INFINITY else hard
    limit = hard if memory_gb is None else int(min(memory_gb * _GIB, most))
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _memory_limit_bytes() -> int | None:
    if sys.platform != "linux":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return None if limit == resource.RLIM_INFINITY else limit


def has_memory_limit() -> bool:
    """Whether `limit_memory` or the parent process has set a limit."""
    return _memory_limit_bytes() is not None


def room_mb() -> float:
    """Memory that this process may still allocate, in MB: the free memory, within the memory limit."""
    free, limit = 1024 * available_memory_gb(), _memory_limit_bytes()
    used_kb = _number_after("VmData:", Path("/proc/self/status")) or 0
    return free if limit is None else min(free, limit / 1024**2 - used_kb / 1024)
