"""Devices, memory and the errors of the ground floor."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segkit.errors import ConfigError, DataError, Problem, RequestError, is_memory_error, some
from segkit.process_memory import available_memory_gb, current_rss_mb, peak_rss_mb
from segkit.runtime import (
    device_name,
    devices,
    environment,
    exact_type,
    pick_device,
    pick_precision,
    refuse_telemetry,
    variables_with,
)


def test_unknown_device_is_refused_with_the_choice() -> None:
    with pytest.raises(RequestError, match=r"device 'gpu' is not known; expected cpu, cuda"):
        pick_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_absent_device_is_refused_with_a_remedy() -> None:
    with pytest.raises(RequestError, match=r"no usable cuda device\. Pass --device cpu"):
        pick_device("cuda")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine with two GPUs, as torch reports them; the list gets the devices that are made the current one."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def test_gpus_have_an_index_and_are_made_the_current_one(two_gpus: list[torch.device]) -> None:
    assert devices() == ("cuda:0", "cuda:1", "cpu")
    assert [str(pick_device(name)) for name in (None, "auto", "cuda", "cuda:1", "cpu")] == [
        *("cuda:0", "cuda:0", "cuda:0", "cuda:1", "cpu"),
    ]
    assert [str(device) for device in two_gpus] == ["cuda:0", "cuda:0", "cuda:0", "cuda:1"]
    with pytest.raises(RequestError, match=r"no usable cuda:2 device\. Pass --device cuda:0"):
        pick_device("cuda:2")
    with pytest.raises(RequestError, match="no usable mps device"):
        pick_device("mps")


@pytest.mark.parametrize(("local_rank", "expected"), [(0, "cuda:0"), (1, "cuda:1")])
def test_each_process_has_its_own_gpu(
    two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch, local_rank: int, expected: str
) -> None:
    place = {"RANK": local_rank, "WORLD_SIZE": 3, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": 3}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    assert str(pick_device()) == str(pick_device("cuda")) == expected
    assert str(pick_device("cuda:0")) == "cuda:0"
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RequestError, match="no usable cuda:2 device"):
        pick_device()


def test_an_apple_gpu_is_used_where_it_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_name() == "mps"
    assert device_name("cpu") == "cpu"
    assert exact_type(torch.device("mps")) == torch.float32
    assert exact_type(torch.device("cpu")) == torch.float64


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16"), ((12, 0), "bf16")],
)
def test_auto_is_what_the_gpu_in_use_computes_itself(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    of_each = {"cuda:0": (9, 0), "cuda:1": capability}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: of_each[str(device)])
    assert pick_precision("auto", torch.device("cuda:1")) == expected
    assert pick_precision("fp32", torch.device("cuda:1")) == "fp32"


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({}, "fp32"), ({"avx512_f": True}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")],
)
def test_auto_is_bf16_on_processors_that_compute_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert pick_precision("auto", torch.device("cpu")) == expected
    assert pick_precision("fp32", torch.device("cpu")) == "fp32"
    assert pick_precision("auto", torch.device("mps")) == "fp32"


_FREES_A_LARGE_BLOCK = """
import sys, torch
from segkit.process_memory import current_rss_mb, keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory(torch.device("cpu"))
before = current_rss_mb()
torch.ones(128, 1024, 1024)  # 512 MB, freed at once
print(current_rss_mb() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives large blocks back at once")
def test_freed_memory_is_kept_where_asked() -> None:
    kept, given_back = (
        float(subprocess.check_output([sys.executable, "-c", _FREES_A_LARGE_BLOCK, how])) for how in ("keep", "not")
    )
    assert kept > 500
    assert given_back < 100


_FREES_BLOCKS_BETWEEN_OTHERS = """
import sys, torch
from segkit import process_memory
if sys.argv[1] == "return":
    process_memory.return_freed_memory(torch.device("cpu"))
torch.ones(7, 1024, 1024)  # 28 MB, freed: from now on glibc takes blocks of this size from its heap
before = process_memory.current_rss_mb()
blocks = [torch.ones(4, 1024, 1024) for _ in range(32)]  # 512 MB
del blocks[::2]  # 256 MB, each block below one that stays
print(process_memory.current_rss_mb() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps blocks on its heap")
def test_freed_memory_is_returned_where_asked() -> None:
    returned, held = (
        float(subprocess.check_output([sys.executable, "-c", _FREES_BLOCKS_BETWEEN_OTHERS, how]))
        for how in ("return", "not")
    )
    assert 250 < returned < 300
    assert held > 400


def test_memory_figures_agree() -> None:
    block = torch.ones(64, 1024, 1024)  # 256 MB
    assert current_rss_mb() > 256
    assert peak_rss_mb() >= 0.9 * current_rss_mb()
    assert 0 < available_memory_gb() < 2**14
    assert block.sum() == 64 * 1024**2


_LOADS_WHAT_REPORTS = """
import os, segkit, onnxruntime, openvino
from openvino.tools.ovc import telemetry_utils
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
print(telemetry_utils.tm.__name__)
"""


def test_libraries_do_not_report_to_their_makers(tmp_path: Path) -> None:
    """Those that do leave an identity of the machine in the user's home."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    home = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "CI": ""}
    set_here = (
        "HF_HUB_DISABLE_TELEMETRY",
        "MLFLOW_DISABLE_TELEMETRY",
        "ORT_DISABLE_TELEMETRY",
        "RAY_USAGE_STATS_ENABLED",
    )
    fresh = {name: value for name, value in variables_with(**home).items() if name not in set_here}
    reporter = subprocess.check_output([sys.executable, "-c", _LOADS_WHAT_REPORTS], env=fresh, text=True)
    assert reporter.strip() == "openvino.tools.ovc.telemetry_stub"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_who_wants_to_report_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    refuse_telemetry()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"


def test_environment_names_versions() -> None:
    assert environment()["torch"] == torch.__version__.split("+")[0] or "+" in environment()["torch"]


def test_errors_say_where_what_expected_and_remedy() -> None:
    error = DataError("has 3 axes", where="a.nii", expected="4", remedy="Convert it")
    assert str(error) == "a.nii: has 3 axes; expected 4. Convert it"
    assert error.exit_code == 1
    assert ConfigError([Problem("x", "bad", "mend")]).exit_code == 2
    assert str(Problem("x", "bad", "mend")) == "x: bad -> mend"


@pytest.mark.parametrize(
    "text",
    [
        *("CUDA out of memory. Tried to allocate 2.00 GiB", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        *("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "GET was unable to find an engine to run"),
        *("FIND was unable to find an engine to execute this computation", "DEVICE_ALLOCATION_FAILED"),
        "Unable to find a valid cuDNN algorithm to run convolution",
    ],
)
def test_libraries_of_gpus_say_in_many_ways_that_memory_ran_out(text: str) -> None:
    assert is_memory_error(RuntimeError(text))
    assert not is_memory_error(RuntimeError("CUDA error: device-side assert triggered"))


def test_some_of_many_names() -> None:
    assert some("abcde") == "a, b, c, d, e"
    assert some("abcdef") == "a, b, c, d, e, ..."
    assert some((), 2) == ""


def _python(code: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def test_threads_sleep_at_barriers_unless_the_user_chose_otherwise() -> None:
    shown = "import os, segkit; print(os.environ.get('OMP_WAIT_POLICY'))"
    assert _python(shown) == "passive\n"
    assert _python(shown, OMP_WAIT_POLICY="active") == "active\n"
    assert _python(shown, GOMP_SPINCOUNT="1000") == "None\n"


def test_torch_imported_before_segkit_is_reported_once() -> None:
    code = "import torch; from segkit.runtime import pick_device; [pick_device(name) for name in (None, 'cpu')]"
    reported = _python(code, OMP_NUM_THREADS="2", CUDA_VISIBLE_DEVICES="")
    assert reported.count("OMP_WAIT_POLICY=passive") == 1
    after = "from segkit.runtime import pick_device; import torch; pick_device()"
    assert _python(after, OMP_NUM_THREADS="2", CUDA_VISIBLE_DEVICES="") == ""
