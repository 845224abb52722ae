"""Correctness on a GPU, tested without one: `on_faked_cuda.py` in a process with a stand-in for the CUDA driver.

Needs a C compiler, and torch's CUDA build without a GPU. Elsewhere it is skipped, or fails if SEGKIT_REQUIRE_FAKE_CUDA
is 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segkit.runtime import variables_with

_HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that stands in for the driver, built from `no_driver.c`."""
    reason = ""
    if torch.version.cuda is None:
        reason = "this torch is not a CUDA build"
    elif torch.cuda.is_available():
        reason = "there is a GPU, with a driver of its own"
    elif (compiler := shutil.which("gcc")) is None:
        reason = "there is no gcc"
    if reason:
        (pytest.fail if os.environ.get("SEGKIT_REQUIRE_FAKE_CUDA") == "1" else pytest.skip)(reason)
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([str(compiler), *options, str(_HERE / "no_driver.c")], check=True)
    return library


def test_on_faked_cuda(driver: Path) -> None:
    """Steps in each precision, inference, and planned memory; one process, which builds each network once."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = variables_with(LD_PRELOAD=str(driver), OMP_NUM_THREADS="1")
    environment.pop("PYTEST_XDIST_WORKER", None)
    ended = subprocess.run(
        [*command, str(_HERE / "on_faked_cuda.py")],
        cwd=_HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
