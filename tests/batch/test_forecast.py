"""What a case takes, told before: arithmetic for the volumes, a measured window for the network."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from segkit.batch.cases import find_input, plan_cases
from segkit.batch.forecast import Forecaster, fit_memory, kept_by_crop, window_cost
from segkit.batch.runner import open_manifest, run_folder
from segkit.batch.segment import Segment, SegmentPlan
from segkit.batch.worker import LocalExecutor
from segkit.inference.backends import ReopenableBackend, torch_backend
from segkit.inference.predictor import Predictor
from segkit.runtime import cache_folder

MakeRun = Callable[..., Path]
MB = 1024**2


@pytest.fixture
def data(tmp_path: Path, scans: Any) -> Path:
    for number in (1, 2):
        scans.write_case(tmp_path / "data", f"BraTS2021_0000{number}", {"t1c": scans.stairs((40, 24, 16))})
    return tmp_path / "data"


def tasks_of(predictor: Predictor, data: Path, out: Path) -> list[SegmentPlan]:
    cohort = find_input(data)
    task = Segment(predictor)
    return plan_cases(task, cohort, out, open_manifest(task, cohort, out))[0]


def test_a_window_is_measured_once_for_each_model_and_size(make_run: MakeRun) -> None:
    predictor = Predictor.load(make_run())
    calls, whole = [], predictor.backend

    class Counted:
        name, threads, device = "counted", 1, "cpu"

        def __call__(self, windows: NDArray[np.float32]) -> NDArray[np.float32]:
            calls.append(windows.shape)
            return whole(windows)

    predictor = replace(predictor, backend=Counted())
    first = window_cost(predictor)
    assert window_cost(predictor) == first
    assert calls == [(1, 1, 8, 8, 8)] * 2  # once to warm up
    window_cost(replace(predictor, window=(4, 8, 8)))
    assert calls[2:] == [(1, 1, 4, 8, 8)] * 2
    assert len(list((cache_folder() / "costs").iterdir())) >= 2
    Counted.device = "cuda:0"
    window_cost(predictor)
    assert calls[4:] == [(1, 1, 8, 8, 8)] * 2, "another device takes another time"


def test_bytes_of_the_stages_are_those_of_their_arrays(make_run: MakeRun, data: Path, tmp_path: Path) -> None:
    predictor = Predictor.load(make_run())
    (task, _) = tasks_of(predictor, data, tmp_path / "out")
    forecast = Forecaster(predictor).forecast(task.case)
    voxels = 40 * 24 * 16
    # Loaded and prepared image, and 9 bytes a voxel for mask and values of the normalisation.
    assert forecast.read_mb == pytest.approx((4 + 4 + 9) * voxels / MB)
    # Prepared image, rows of 8 x 24 x 16 voxels of 3 outputs and a weight, half as much leaving them, mask thrice.
    assert forecast.compute_mb == pytest.approx((4 * voxels + 1.5 * 4 * 4 * 8 * 24 * 16 + 3 * voxels) / MB)
    assert forecast.peak_mb(100, is_overlapped=True) == 100 + forecast.read_mb + forecast.compute_mb
    assert forecast.peak_mb(100, is_overlapped=False) == 100 + max(forecast.read_mb, forecast.compute_mb)


def test_what_the_crop_leaves_of_the_first_case_is_what_is_forecast(
    make_run: MakeRun, tmp_path: Path, scans: Any
) -> None:
    image = np.zeros((40, 24, 16), np.float32)
    image[10:30, 6:12] = 1.0
    scans.write_case(tmp_path / "data", "BraTS2021_00001", {"t1c": image})
    predictor = Predictor.load(make_run())
    (task,) = tasks_of(predictor, tmp_path / "data", tmp_path / "out")
    assert kept_by_crop(predictor, task.case) == (0.5, 0.25, 1.0)
    whole = Forecaster(predictor).forecast(task.case)
    cropped = Forecaster(predictor, (0.5, 0.25, 1.0)).forecast(task.case)
    assert whole.read_mb - cropped.read_mb == pytest.approx(4 * (40 * 24 - 20 * 6) * 16 / MB)
    _, fitted, _ = fit_memory(predictor, [task])
    assert fitted[0].predicted is not None
    assert fitted[0].predicted["seconds"] == pytest.approx(cropped.seconds, abs=0.01)
    preprocessing = predictor.card.preprocessing.model_copy(update={"crop": "none"})
    whole_image = replace(predictor, card=predictor.card.model_copy(update={"preprocessing": preprocessing}))
    assert kept_by_crop(whole_image, task.case) == (1.0, 1.0, 1.0)


def test_the_forecast_stands_beside_what_came_true(make_run: MakeRun, data: Path, tmp_path: Path) -> None:
    manifest = run_folder(Segment(Predictor.load(make_run())), find_input(data), tmp_path / "out")
    for entry in manifest["cases"]:
        assert set(entry["predicted"]) == {"peak_rss_mb", "seconds"}
        assert entry["window"] == (8, 8, 8)
    kept = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert kept["cases"][0]["predicted"]["seconds"] > 0


def test_short_memory_makes_windows_smaller(
    make_run: MakeRun, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = Predictor.load(make_run(patch_size=(64, 32, 32)))
    tasks = tasks_of(predictor, data, tmp_path / "out")
    smaller, fitted, overlaps = fit_memory(predictor, tasks, memory_gb=1 / 1024)
    assert not overlaps
    assert predictor.window == (64, 32, 32)
    assert smaller.window == (16, 16, 16)  # the smallest, and still it does not fit
    assert "it may fail" in caplog.text
    assert all(task.predicted["peak_rss_mb"] > 1 for task in fitted)


def test_with_room_nothing_changes(make_run: MakeRun, data: Path, tmp_path: Path) -> None:
    predictor = Predictor.load(make_run())
    same, fitted, overlaps = fit_memory(predictor, tasks_of(predictor, data, tmp_path / "out"))
    assert overlaps
    assert same.window == (8, 8, 8)
    assert [replace(task, predicted={}) for task in fitted] == tasks_of(predictor, data, tmp_path / "out")


@pytest.mark.parametrize("workers", [0, 1])
def test_out_of_memory_goes_on_with_smaller_windows(
    make_run: MakeRun, data: Path, tmp_path: Path, scans: Any, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = Predictor.load(make_run(patch_size=(32, 16, 16)))
    reopen = predictor.reopen
    assert reopen is not None

    class Full:
        """Has room for windows of 16 voxels only."""

        name, threads, device = "torch", 1, "cpu"

        def __init__(self, window: tuple[int, ...]) -> None:
            self.whole, self.window = reopen(window), window

        def __call__(self, windows: NDArray[np.float32]) -> NDArray[np.float32]:
            if max(self.window) > 16:
                raise MemoryError
            return self.whole(windows)

    window_cost(predictor)  # known from an earlier run, so that the cases are the first to find out
    predictor = replace(predictor, reopen=Full, backend=Full((32, 16, 16)))
    out = tmp_path / "out"
    manifest = run_folder(Segment(predictor), find_input(data), out, executor=LocalExecutor(workers))
    assert [entry["status"] for entry in manifest["cases"]] == ["done", "done"]
    assert manifest["cases"][0]["window"] == (16, 16, 16)
    assert "out of memory; trying again with windows of 16 x 16 x 16 voxels" in caplog.text
    mask = scans.read(out / "BraTS2021_00001.nii.gz")[1]
    assert np.array_equal(mask, scans.labels((40, 24, 16)))


def test_no_room_for_smaller_windows_costs_that_case_only(make_run: MakeRun, data: Path, tmp_path: Path) -> None:
    """The network that had to go is opened again for the next case, by when there is room for it."""
    predictor = Predictor.load(make_run(patch_size=(32, 16, 16)))
    reopen = predictor.reopen
    assert reopen is not None
    opened: list[tuple[int, ...]] = []

    def reopen_later(window: tuple[int, ...]) -> Any:
        opened.append(window)
        if len(opened) < 2:
            raise MemoryError
        return reopen(window)

    class Full:
        name, threads, device = "torch", 1, "cpu"

        def __call__(self, windows: NDArray[np.float32]) -> NDArray[np.float32]:
            raise MemoryError

    window_cost(predictor)
    backend = ReopenableBackend(lambda: reopen_later((32, 16, 16)), Full())
    predictor = replace(predictor, reopen=reopen_later, backend=backend)
    manifest = run_folder(Segment(predictor), find_input(data), tmp_path / "out", executor=LocalExecutor(0))
    assert [entry["status"] for entry in manifest["cases"]] == ["failed", "done"]
    assert "out of memory after" in manifest["cases"][0]["error"]
    assert opened == [(16, 16, 16), (32, 16, 16)]


def test_a_retry_has_the_memory_of_the_failed_pass(make_run: MakeRun, data: Path, tmp_path: Path) -> None:
    """The error's traceback must not keep the tensors of the pass alive while the smaller windows are computed."""
    predictor = Predictor.load(make_run(patch_size=(32, 16, 16)))
    reopen = predictor.reopen
    assert reopen is not None
    made: list[weakref.ref[torch.Tensor]] = []
    alive_bytes: list[int] = []

    class Full:
        name, threads, device = "torch", 1, "cpu"

        def __init__(self, window: tuple[int, ...]) -> None:
            self.whole, self.window = reopen(window), window

        def __call__(self, windows: NDArray[np.float32]) -> NDArray[np.float32]:
            alive_bytes.append(sum(tensor.nbytes for one in made if (tensor := one()) is not None))
            if max(self.window) > 16:
                self._pass_that_fails()
            return self.whole(windows)

        def _pass_that_fails(self) -> None:
            activations = torch.ones(2 * MB)
            made.append(weakref.ref(activations))
            raise RuntimeError("the layer failed: out of memory") from MemoryError()

    window_cost(predictor)
    predictor = replace(predictor, reopen=Full, backend=Full((32, 16, 16)))
    manifest = run_folder(Segment(predictor), find_input(data), tmp_path / "out", executor=LocalExecutor(0))
    assert [entry["status"] for entry in manifest["cases"]] == ["done", "done"]
    assert made
    assert alive_bytes == [0] * len(alive_bytes), "as before the first try"


def test_rows_that_have_room_on_a_gpu_take_no_memory_of_the_host(
    make_run: MakeRun, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor.load(make_run())
    (plan, _) = tasks_of(predictor, data, tmp_path / "out")
    forecaster = Forecaster(predictor)
    on_cpu = forecaster.forecast(plan.case)
    torch_backend(predictor.backend).device = torch.device("cuda", 0)  # type: ignore[union-attr]
    found = []
    for free_gb in (1.0, 0.0):
        monkeypatch.setattr("segkit.batch.forecast.available_memory_gb", lambda _: free_gb)  # noqa: B023
        found.append(forecaster.forecast(plan.case))
    assert found[0] is not None
    assert on_cpu is not None
    row_mb = 4 * 4 * 8 * 24 * 16 * 1.5 / MB  # a depth of 8 of 40 voxels, three outputs and the weights
    assert on_cpu.compute_mb - found[0].compute_mb == pytest.approx(row_mb)
    assert found[1] == on_cpu
