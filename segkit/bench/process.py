"""Running a Python command and measuring its time and memory.

Nothing heavy is imported here: the peak memory that the system reports of a new process includes what its parent held
when it was started.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from segkit.runtime import variables_with


@dataclass(frozen=True)
class Finished:
    """Output of a process, its exit code, wall seconds and peak resident memory in MB."""

    output: str
    errors: str
    code: int
    seconds: float
    peak_rss_mb: float


def run_python(arguments: Sequence[str], **variables: str) -> Finished:
    """Run Python with these arguments and environment variables."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=output, stderr=errors, env=variables_with(**variables)
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        scale = 1024**2 if sys.platform == "darwin" else 1024
        return Finished(output.read(), errors.read(), process.returncode, seconds, usage.ru_maxrss / scale)
