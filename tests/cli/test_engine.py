"""Where cases are done, as options tell it."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from segkit.api.folder import FolderOptions, Loading, on_gpu
from segkit.batch.ray_executor import RayExecutor, Share
from segkit.batch.worker import LocalExecutor
from segkit.errors import RequestError
from segkit.inference.backends import TorchBackend
from tests.helpers import run_segkit

FOLDERS = [Path("out").absolute(), Path("bank").absolute()]


def backend(threads: int) -> TorchBackend:
    made = TorchBackend(torch.nn.Identity())
    made.threads = threads  # those of the whole process stay as they are
    return made


@pytest.mark.parametrize("verb", ["infer", "inpaint"])
def test_without_ray_it_is_told_what_to_install(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run_segkit(verb, "-m", "run", "-i", tmp_path, "-o", tmp_path / "out", "--engine", "ray") == 2
    assert 'Ray is not installed. pip install "segkit[ray]", on every node' in capsys.readouterr().err


def test_here() -> None:
    options = FolderOptions("scans", "out", workers=3, memory="1.5G")
    assert (options.memory_gb, options.path("scans")) == (1.5, Path("scans"))
    executor = options.executor([backend(2)], FOLDERS)
    assert isinstance(executor, LocalExecutor)
    assert executor.workers == 3


@pytest.mark.parametrize(("threads", "expected"), [(None, 4), (1, 1)])
def test_on_nodes_a_case_takes_the_cores_of_its_largest_network(threads: int | None, expected: int) -> None:
    options = FolderOptions(
        "scans", "out", engine="ray", ray_address="auto", results="store", workers=0, threads=threads, memory="2G"
    )
    assert options.path("scans") == Path("scans").absolute()
    executor = options.executor([backend(2), backend(4)], FOLDERS)
    assert isinstance(executor, RayExecutor)
    assert executor.share == Share(expected, 0, 2.0)
    assert (executor.address, executor.results, executor.workers) == ("auto", "store", None)
    assert executor.folders == tuple(FOLDERS)


def test_gpus_of_nodes_need_none_here() -> None:
    options = FolderOptions("scans", "out", engine="ray")
    assert options.loading() == Loading("auto", "auto", None)
    assert replace(options, device="cuda").loading() == Loading("cpu", "torch", None)
    with pytest.raises(RequestError, match=r"backend openvino computes on a CPU\. Pass --device cpu"):
        replace(options, device="cuda:1", backend="openvino").loading()
    executor = options.executor([on_gpu(backend(4)), backend(4)], FOLDERS)
    assert isinstance(executor, RayExecutor)
    assert executor.share == Share(1, gpus=1)


def test_a_process_with_a_gpu_is_not_limited(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """CUDA reserves far more addresses than it takes memory."""
    monkeypatch.setattr("segkit.runtime.devices", lambda: ("cuda:0", "cpu"))
    monkeypatch.setattr("segkit.process_memory.limit_memory", lambda megabytes: pytest.fail("it was limited"))
    with FolderOptions("scans", "out", device="cuda", memory="2G").limited_memory():
        pass
    assert "the process itself is not limited with a GPU" in caplog.text
