"""The command line as a whole: exit codes, sentences instead of traces, the public face."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import segkit
from segkit.api.arguments import parse_gigabytes, parse_minutes
from segkit.cli import VERBS
from segkit.config import INPAINTING_PRESETS, PRETRAINING_PRESETS, list_presets, preset_path
from segkit.errors import RequestError
from tests.helpers import run_segkit


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_segkit(verb, "--help") == 0
    assert len(capsys.readouterr().out) > 200


def _verbs_and_their_parts() -> Iterator[tuple[str, ...]]:
    for verb, target in VERBS.items():
        module, _, name = target.partition(":")
        loaded = getattr(importlib.import_module(module), name)
        if isinstance(loaded, typer.Typer):
            for part in loaded.registered_commands:
                assert part.callback is not None
                yield verb, part.name or part.callback.__name__
        else:
            yield (verb,)


@pytest.mark.parametrize("verb", sorted(_verbs_and_their_parts()), ids=" ".join)
def test_every_verb_can_be_quiet_and_verbose(
    verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run_segkit(*verb, "--help") == 0
    told = capsys.readouterr().out
    for long, short, meaning in (("quiet", "q", "Only errors."), ("verbose", "v", "Also details and tracebacks")):
        assert re.search(rf"--{long}\s+-{short}\s.*{meaning}", told) is not None


def test_quiet_verbs_tell_errors_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    assert run_segkit("phantom", str(data), "--cases", "4", "--size", "24", "--with-problems", "-q") == 0
    assert capsys.readouterr() == ("", "")
    assert run_segkit("check", str(data), "-q") == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()
    assert all(line.startswith("ERROR ") for line in out.splitlines())
    scan = next(data.rglob("*_t1ce.nii.gz"))
    scan.write_bytes(scan.read_bytes()[:40])
    assert run_segkit("convert", "headers", str(data), "-o", str(tmp_path / "copies"), "-q") == 1
    out, err = capsys.readouterr()
    assert "failed" in out
    assert "done" not in out
    assert run_segkit("config", "validate", "-q", str(preset_path("tiny"))) == 0
    assert capsys.readouterr() == ("", "")


def test_wrong_requests_exit_with_2_and_a_sentence(
    tmp_path: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_segkit("config", "show", "--preset", "huge") == 2
    captured = capsys.readouterr()
    assert captured.err == "Error: preset 'huge' is not known; expected one of cpu, default, large, tiny\n"
    assert captured.out == ""


def test_verbose_adds_the_trace_and_keeps_therun_segkit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "nowhere", "-o", "run", "--budget", "soon"]
    assert run_segkit(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert run_segkit(*arguments, "-v") == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "Error: --budget 'soon' cannot be read" in said


def test_interrupted_verbs_exit_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("segkit.models.table.list_models", stopped)
    assert run_segkit("models") == 130
    assert "what was finished is kept" in capsys.readouterr().err


def test_unknown_verb_exits_with_2() -> None:
    assert run_segkit("trian") == 2


def test_models_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_segkit("models", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert {entry["name"] for entry in document} == {info.name for info in segkit.list_models()}
    assert set(document[0]) == {"name", "size", "parameters", "divisor", "dims", "reference", "tensors"}


def test_models_json_counts_at_the_channels_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_segkit("models", "--in-channels", "1", "--out-channels", "105", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert {e["size"]: (e["parameters"], e["tensors"]) for e in document if e["name"] == "stunet"} == {
        "S": (14_596_941, 130),
        "B": (58_262_669, 130),
        "L": (440_302_605, 218),
        "H": (1_457_326_221, 306),
    }


def test_models_table_says_what_it_counted_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def counted(in_channels: int, out_channels: int) -> list[segkit.ModelInfo]:
        assert (in_channels, out_channels) == (4, 2)
        return [segkit.ModelInfo("unet", "small", 1_234_567, (8, 16), (2,), "a paper", tensors=89)]

    monkeypatch.setattr("segkit.models.table.list_models", counted)
    assert run_segkit("models", "--out-channels", "2") == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.strip() == "Networks at 4 inputs and 2 outputs (3D where there is one)"
    row = [cell.strip() for cell in lines[-2].strip("│").split("│")]
    assert row == ["unet", "small", "1,234,567", "89", "8 x 16", "2D", "a paper"]


def test_models_refuses_channels_below_one() -> None:
    assert run_segkit("models", "--in-channels", "0") == 2


@pytest.mark.parametrize("preset", list_presets(PRETRAINING_PRESETS))
def test_presets_of_pretraining_are_valid_for_their_verb_alone(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(preset_path(preset, PRETRAINING_PRESETS))
    assert run_segkit("config", "validate", "--for", "pretrain", path) == 0
    assert run_segkit("config", "validate", path) == 2
    assert "batch_size: no such key" in capsys.readouterr().err
    assert run_segkit("config", "show", "--for", "pretrain", "--preset", preset) == 0
    assert "graph_matching:" in capsys.readouterr().out


@pytest.mark.parametrize("preset", list_presets(INPAINTING_PRESETS))
def test_presets_of_inpainting_are_valid_for_their_method_alone(
    preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(preset_path(preset, INPAINTING_PRESETS))
    assert run_segkit("config", "validate", "--for", "inpainting", path) == 0
    assert run_segkit("config", "validate", "--for", "pretrain", path) == 2
    assert "patches: no such key" in capsys.readouterr().err
    assert run_segkit("config", "show", "--for", "inpainting", "--preset", preset) == 0
    assert "hidden_lesions:" in capsys.readouterr().out


def test_config_show_and_validate(capsys: pytest.CaptureFixture[str], tmp_path: pytest.TempPathFactory) -> None:
    assert run_segkit("config", "show", "--preset", "cpu", "--set", "optimiser.lr=0.5") == 0
    shown = capsys.readouterr().out
    assert "  # Peak learning rate.\n  lr: 0.5\n" in shown
    path = tmp_path / "run.yaml"  # type: ignore[operator]
    path.write_text(shown)
    assert run_segkit("config", "validate", str(path)) == 0
    path.write_text(shown.replace("lr: 0.5", "lr: -1\n  momentum: 3"))
    assert run_segkit("config", "validate", str(path)) == 2
    problems = capsys.readouterr().err
    assert "optimiser.lr: Input should be greater than 0 (got -1)" in problems
    assert "optimiser.momentum: no such key" in problems


@pytest.mark.parametrize(("text", "minutes"), [("30m", 30), ("90s", 1.5), ("1h30m", 90), ("2h", 120), ("1.5h", 90)])
def test_budgets(text: str, minutes: float) -> None:
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize("text", ["30", "m", "30 minutes", "", "1h-3m"])
def test_budgets_that_cannot_be_read(text: str) -> None:
    with pytest.raises(RequestError, match="expected a duration such as 90s, 30m or 1h30m"):
        parse_minutes(text)


@pytest.mark.parametrize(("text", "gigabytes"), [("8G", 8), ("512M", 0.5), ("8GB", 8), ("8gib", 8), ("1T", 1024)])
def test_sizes(text: str, gigabytes: float) -> None:
    assert parse_gigabytes(text) == gigabytes


def test_public_names_load_on_first_use() -> None:
    assert all(getattr(segkit, name) is not None for name in segkit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = segkit.nothing
