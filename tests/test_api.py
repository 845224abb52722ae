"""The public functions: the results and the sentences of the commands of the same names."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import runpy
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import segkit
from segkit.api.arguments import nested_settings, read_case_ids
from segkit.errors import ConfigError, RequestError, SegkitError
from segkit.inference import graph
from tests.helpers import read_voxels, run_segkit, write_segmentation_run

FUNCTIONS = ("check", "evaluate", "export_model", "find_cases", "infer", "inpaint", "pretrain", "train")
SMALL: dict[str, Any] = {
    "network": {"arguments": {"widths": [8, 12]}},
    "planning.patch_limit": 16,
    "planning.batch_limit": 1,
    "data.folds": 2,
    "training": {"steps": 2, "steps_per_epoch": 1, "workers": 0},
}
SMALL_WORDS = (
    *("--set", "network.arguments.widths=[8, 12]", "--set", "planning.patch_limit=16"),
    *("--set", "planning.batch_limit=1", "--set", "data.folds=2", "--set", "training.workers=0"),
    *("--set", "training.steps=2", "--set", "training.steps_per_epoch=1"),
)


@pytest.fixture(scope="module")
def data(phantom_data: Callable[[int], Path]) -> Path:
    return phantom_data(2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_segmentation_run(tmp_path_factory.mktemp("model") / "run", widths=(4, 8))


def printed_error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that fails prints, without its prefix."""
    assert run_segkit(*arguments) in (1, 2)
    return capsys.readouterr().err.removeprefix("Error: ").rstrip("\n")


def test_training_equals_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shares: list[float] = []
    summary = segkit.train(
        data,
        tmp_path / "api",
        preset="tiny",
        device="cpu",
        on_progress=lambda share, message: shares.append(share),
        **SMALL,
    )
    assert capsys.readouterr().out == ""
    assert (
        run_segkit("train", data, "-o", tmp_path / "cli", "--preset", "tiny", "-d", "cpu", "--json", *SMALL_WORDS) == 0
    )
    document = json.loads(capsys.readouterr().out)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("api", "cli"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (summary.run, summary.steps, summary.skipped) == (tmp_path / "api", 2, {})
    assert summary.to_json()["dice"] == document["dice"]
    assert shares == sorted(shares)
    assert shares[-1] == 1

    with pytest.raises(RequestError, match=r"training.steps 2 -> 3.*--allow-changes"):
        segkit.train(data, tmp_path / "api", resume=True, **{"training.steps": 3})
    resumed = segkit.train(data, tmp_path / "api", resume=True, allow_changes=True, **{"training.steps": 3})
    assert resumed.steps == 3


def test_masks_equal_those_of_the_command(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records: list[Any] = []
    manifest = segkit.infer(run, data, tmp_path / "api", backend="torch", on_record=records.append)
    assert capsys.readouterr().out == ""
    assert run_segkit("infer", "-m", run, "-i", data, "-o", tmp_path / "cli", "--backend", "torch", "-q") == 0
    assert json.loads(json.dumps(manifest)) == json.loads(
        (tmp_path / "api" / "manifest.json").read_text(encoding="utf-8")
    )
    assert manifest["summary"]["done"] == len(records) == 2
    for name in sorted(path.name for path in (tmp_path / "cli").glob("*.nii.gz")):
        np.testing.assert_array_equal(read_voxels(tmp_path / "api" / name), read_voxels(tmp_path / "cli" / name))

    first = records[0].case
    again = segkit.infer([run], data, tmp_path / "api", backend="torch", cases=[first])
    assert [(case["case"], case["status"]) for case in again["cases"]] == [(first, "skipped")]


def test_scores_equal_those_of_the_command(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    segkit.infer(run, data, tmp_path / "masks", backend="torch")
    evaluation = segkit.evaluate(tmp_path / "masks", data, tmp_path / "scores", protocol="brats2023")
    assert capsys.readouterr().out == ""
    arguments = ("-p", tmp_path / "masks", "-r", data, "--protocol", "brats2023", "--json")
    assert run_segkit("evaluate", *arguments) == 0
    assert evaluation.to_json() == json.loads(capsys.readouterr().out)
    assert evaluation.summary["WT"]["dice"]["n"] == len(evaluation.cases) == 2
    assert (tmp_path / "scores" / "summary.md").exists()


def test_a_check_equals_the_command(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts: list[tuple[int, int]] = []
    found = segkit.check(
        data,
        preset="tiny",
        memory=4,
        on_progress=lambda *count: counts.append(count),
        training={"steps": 7},
        overlap=0.25,
    )
    assert capsys.readouterr().out == ""
    assert sorted(counts) == [(1, 2), (2, 2)]
    words = ("--set", "training.steps=7", "--set", "overlap=0.25")
    assert run_segkit("check", data, "--preset", "tiny", "--memory", "4G", *words, "--json") == 0
    ours, theirs = found.to_json(), json.loads(capsys.readouterr().out)
    assert ours.pop("estimate")["memory_gb"] == theirs.pop("estimate")["memory_gb"]  # its minutes are measured
    assert ours == theirs
    assert found.is_usable
    assert [case.id for case in segkit.find_cases(str(data)).cases] == [case.case for case in found.cases]


def test_inpainting_after_pretraining(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small: dict[str, Any] = {"patches": {"size": 16}, "validation_holes": 1, "training.workers": 0}
    summary = segkit.pretrain(
        [data], tmp_path / "run", method="inpainting", preset="tiny", device="cpu", **small, **{"training.steps": 1}
    )
    assert summary.scores["method"] == "inpainting"
    filled = [segkit.inpaint(summary.run, data, tmp_path / "api", lesions=data, backend="torch")]
    assert capsys.readouterr().out == ""
    options = ("--lesions", data, "--backend", "torch", "--json")
    assert run_segkit("inpaint", "-m", summary.run, "-i", data, "-o", tmp_path / "cli", *options) == 0
    filled.append(json.loads(capsys.readouterr().out))
    assert filled[0]["summary"]["done"] == filled[1]["summary"]["done"] == 2
    names = sorted(path.name for path in (tmp_path / "cli").glob("*.nii.gz"))
    assert len(names) >= 4
    for name in names:
        np.testing.assert_array_equal(read_voxels(tmp_path / "api" / name), read_voxels(tmp_path / "cli" / name))


def test_an_export_is_a_model(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(graph, "_by_capture", graph._by_tracing)  # takes seconds
    run = write_segmentation_run(tmp_path / "run", widths=(4, 8))
    document = segkit.export_model(run, tmp_path / "export")
    assert [model["folder"] for model in document["models"]] == [str(tmp_path / "export")]
    assert (tmp_path / "export" / "model.onnx").exists()
    with pytest.raises(RequestError, match="--cases names cases of a data folder"):
        segkit.export_model(run, tmp_path / "other", cases=["a"])


def test_errors_are_those_of_the_commands(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    calls: list[tuple[Callable[[], object], tuple[object, ...]]] = [
        (lambda: segkit.check(tmp_path), ("check", tmp_path)),
        (
            lambda: segkit.train(data, out, training={"steps": 2, "step": 5}, device="cpu"),
            ("train", data, "-o", out, "--set", "training.steps=2", "--set", "training.step=5", "-d", "cpu"),
        ),
        (lambda: segkit.train(data, out, budget="soon"), ("train", data, "-o", out, "--budget", "soon")),
        (lambda: segkit.train(data, out, resume=True), ("train", data, "-o", out, "--resume")),
        (
            lambda: segkit.pretrain(data, out, preset="huge"),
            ("pretrain", data, "-o", out, "--preset", "huge"),
        ),
        (lambda: segkit.infer("no_run", data, out), ("infer", "-m", "no_run", "-i", data, "-o", out)),
        (
            lambda: segkit.infer(run, data, out, cases=["BraTS-GLI-9"]),
            ("infer", "-m", run, "-i", data, "-o", out, "--cases", tmp_path / "ids.txt"),
        ),
        (
            lambda: segkit.inpaint("no_run", data, out, mask=data, lesions=data),
            ("inpaint", "-m", "no_run", "-i", data, "-o", out, "--mask", data, "--lesions", data),
        ),
        (
            lambda: segkit.evaluate(out, data, protocol="brats1999"),
            ("evaluate", "-p", out, "-r", data, "--protocol", "brats1999"),
        ),
        (lambda: segkit.export_model("no_run", out), ("export", "-m", "no_run", "-o", out)),
    ]
    (tmp_path / "ids.txt").write_text("BraTS-GLI-9\n", encoding="utf-8")
    for call, command in calls:
        with pytest.raises(SegkitError) as caught:
            call()
        assert str(caught.value) == printed_error(capsys, *command)
    assert not out.exists()


def test_every_wrong_setting_is_named_with_the_nearest_key(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        segkit.train(data, tmp_path / "run", device="cpu", training={"steps": 2, "step": 5}, **{"optimiser.lr": -1})
    assert len(caught.value.problems) == 2
    assert "training.step: no such key -> did you mean 'steps'?" in str(caught.value)
    assert "optimiser.lr: Input should be greater than 0 (got -1)" in str(caught.value)


def test_settings_are_sections_or_dotted_names() -> None:
    nested = {"training": {"steps": 5, "seed": 1}, "overlap": 0.5}
    assert nested_settings({"training": {"steps": 5}, "training.seed": 1, "overlap": 0.5}) == nested
    assert nested_settings({"training.steps": 5, "training.seed": 1, "overlap": 0.5}) == nested


def test_case_ids_come_from_a_list_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("a  # the first\n\nb\n", encoding="utf-8")
    assert read_case_ids(tmp_path / "ids") == read_case_ids(str(tmp_path / "ids")) == read_case_ids(("a", "b"))
    assert read_case_ids(None) is None
    with pytest.raises(RequestError, match="the list of cases is empty"):
        read_case_ids([])


def test_no_module_hides_a_public_name() -> None:
    for module in pkgutil.walk_packages(segkit.__path__, "segkit."):
        importlib.import_module(module.name)
    assert not set(segkit.__all__) & {module.name for module in pkgutil.iter_modules(segkit.__path__)}
    for name in set(segkit.__all__) - {"__version__"}:
        found = getattr(segkit, name)
        assert not isinstance(found, ModuleType)
        assert found.__name__ == name
        assert name not in FUNCTIONS or isinstance(found, FunctionType)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_documented(name: str) -> None:
    text = inspect.getdoc(getattr(segkit, name)) or ""
    assert "Raises:" in text
    assert ">>> " in text
    assert f"{name}(" in (segkit.__doc__ or "")
    annotations = [p.annotation for p in inspect.signature(getattr(segkit, name)).parameters.values()]
    assert inspect.Parameter.empty not in annotations


def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "from_python.py"))
    example["main"](tmp_path)
    assert "Dice of new cases: {'WT': " in capsys.readouterr().out
    assert (tmp_path / "scores" / "scores.json").exists()
