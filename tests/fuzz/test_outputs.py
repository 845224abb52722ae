"""Names from outside are shown in tables, spreadsheets and on terminals, and never obeyed."""

from __future__ import annotations

import ast
import csv
import io
import json
import logging
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fuzzing import seeds
from rich.console import Console

import segkit.cli
from segkit.batch.manifest import CaseRecord
from segkit.cli.infer import CaseProgress
from segkit.cli.options import print_json, print_table
from segkit.cli.train import ProgressBar
from segkit.errors import DataError, Problem, on_one_line, printable
from segkit.evaluation.pairing import Pairing
from segkit.evaluation.score_files import markdown_table, markdown_text, scores_csv
from segkit.evaluation.scores import CaseScores, Evaluation
from segkit.labels import classes_scheme
from segkit.reading.case import file_name_of
from segkit.reading.volume import Grid
from segkit.report.figures import curves_figure, overlay_figure
from tests.helpers import run_segkit, write_inpainting_run, write_segmentation_run

_COMMANDS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\ud800-\udfff]")
"""What a terminal obeys, or what changes how other letters are shown; a line feed is none."""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("BraTS2021_00001 (t1c)", "BraTS2021_00001 (t1c)"),
        ("\x1b[31mred", "\\u001b[31mred"),
        ("\x9b31m", "\\u009b31m"),
        ("a\nb\tc\rd", "a\nb\\u0009c\\u000dd"),
        ("\udce9", "\\udce9"),
        ("脳腫瘍 é 🧠", "脳腫瘍 é 🧠"),
        ("\U000e0001", "\\udb40\\udc01"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert json.loads(f'"{shown}"'.replace("\n", "\\n")) == text


def test_sentences_hold_no_commands(hostile_names: list[str]) -> None:
    for name in hostile_names:
        error = DataError(f"found {name}", where=Path("/data") / name, expected=name, remedy=name)
        for sentence in (str(error), str(Problem(f"/data/{name}", name, name))):
            assert not _COMMANDS.search(sentence)
        assert "\n" not in str(DataError("found", where=Path("/data") / name))


def test_what_is_printed_holds_no_commands(hostile_names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    print_json({name: [name] for name in hostile_names})
    printed = capsys.readouterr().out
    assert not _COMMANDS.search(printed)
    assert json.loads(printed) == {name: [name] for name in hostile_names}

    print_table("[red]title[/red]", ("[b]case[/b]", *hostile_names[8:9]), [(name, name) for name in hostile_names])
    printed = capsys.readouterr().out
    assert not _COMMANDS.search(printed)
    assert "[red]title[/red]" in printed
    assert "[b]case[/b]" in printed
    _require_legible(hostile_names, printed)

    with CaseProgress("segmenting", 1, is_quiet=False) as progress:
        for name in hostile_names:
            progress.show(CaseRecord(name, "done"))
            progress.show(CaseRecord(name, "failed", name))
    printed = capsys.readouterr().err
    assert not _COMMANDS.search(printed)
    assert len(printed.splitlines()) == 2 * len(hostile_names) + 1  # no name looks like the next line
    _require_legible(hostile_names, printed)


def _require_legible(names: Sequence[str], printed: str) -> None:
    """Every name stands there as `printable` tells it, wherever lines were broken."""
    squeezed = re.sub(r"[\s\u2500-\u257f]", "", printed)
    missing = [name for name in names if re.sub(r"\s", "", on_one_line(name)) not in squeezed]
    assert missing == []


def test_a_bar_on_a_terminal_shows_names_as_they_are(hostile_names: list[str]) -> None:
    screen = io.StringIO()
    bar = ProgressBar(Console(file=screen, force_terminal=True, markup=False, emoji=False, width=300))
    with bar:
        for name in hostile_names:
            bar.update(0.5, name)
            bar.bar.refresh()
    drawn = screen.getvalue()
    assert "\x1b]" not in drawn  # neither a title nor a link
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", drawn)
    assert not _COMMANDS.search(plain)
    _require_legible(hostile_names, plain)


def test_verbs_print_in_one_way_only() -> None:
    """`print_stdout`, `print_stderr`, `print_table` and `print_json` of `segkit.cli.options` make names harmless."""
    package = Path(segkit.cli.__file__).parents[1]
    found = set()
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if re.fullmatch(r"print|.*\.print|(typer\.)?(secho|echo)|sys\.std\w+\.write|.*print_exc", called):
                    found.add((path.relative_to(package).as_posix(), called))
    assert found == {
        ("bench/by_hand.py", "sys.stdout.write"),  # answers of a process to another one
        ("bench/memory.py", "print"),
        ("training/heartbeat.py", "sys.stderr.write"),  # the last words of a process, made printable there
        ("cli/options.py", "(above or console()).print"),
        ("cli/options.py", "out.print"),
        ("cli/options.py", "sys.stdout.write"),
        ("cli/options.py", "typer.echo"),
    }


def _printed(arguments: Sequence[object], capfd: pytest.CaptureFixture[str]) -> tuple[str, str]:
    run_segkit(*arguments)
    captured = capfd.readouterr()
    assert not _COMMANDS.search(captured.out + captured.err)
    return captured.out, captured.err


_NAMELESS = "[red]\x1b[31m\r\n\u202ex[/red]"
"""A name of a folder that is not there."""


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", _NAMELESS),
        ("train", _NAMELESS, "-o", "run", "-d", "cpu"),
        ("train", "data", "-o", "run", "--set", f"{_NAMELESS}=1"),
        ("pretrain", _NAMELESS, "-o", "run", "-d", "cpu"),
        ("infer", "-m", "run", "-i", _NAMELESS, "-o", "out"),
        ("infer", "-m", "run", "-i", ".", "-o", "out", "--cases", _NAMELESS),
        ("inpaint", "-m", "run", "-i", _NAMELESS, "-o", "out"),
        ("evaluate", "-p", ".", "-r", _NAMELESS),
        ("compare", _NAMELESS, "."),
        ("report", _NAMELESS, "-o", "page.html"),
        ("export", "-m", _NAMELESS, "-o", "out"),
        ("convert", "headers", _NAMELESS, "-o", "out"),
        ("convert", "labels", ".", "-o", "out", "--to", _NAMELESS),
        ("config", "validate", _NAMELESS),
        ("models", _NAMELESS),
        (_NAMELESS,),
        (f"--{_NAMELESS}",),
    ],
    ids=lambda arguments: " ".join(arguments[:2]).replace(_NAMELESS, "NAME"),
)
def test_complaints_of_every_verb_hold_no_commands(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for more in ((), ("-v",)):
        out, err = _printed([*arguments, *more], capfd)
        assert out == ""
        assert re.search(r"\[red\](\\\\|\\)(u001b|x1b)\[31m", re.sub(r"[\s\u2500-\u257f]", "", err)) is not None


def test_masks_of_hostile_names_are_scored_compared_converted_and_told(
    tmp_path: Path, hostile_names: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[2:4, 2:4, 2:4] = 1
    names = [name for name in hostile_names if "/" not in name]
    for kind in ("masks", "other", "references"):
        (tmp_path / kind).mkdir()
        for name in names:
            path = tmp_path / kind / f"{name}.nii.gz"
            nib.save(nib.Nifti1Image(labels, np.eye(4)), path)
            if kind == "masks" and name == "[bold red]alarm":
                path.write_bytes(path.read_bytes()[:40])
    folders = [tmp_path / f"{kind} [red]\x1b[31m" for kind in ("scores", "scores of others")]
    for kind, scores in zip(("masks", "other"), folders, strict=True):
        common = ("evaluate", "-p", tmp_path / kind, "-r", tmp_path / "references", "-o", scores)
        _, err = _printed([*common, "--label-scheme", "classes"], capfd)
        assert ("[bold red]alarm: " in err) == (kind == "masks")
    out, _ = _printed([*common, "--label-scheme", "classes", "--json"], capfd)
    assert len(json.loads(out)["cases"]) == len(names)
    out, _ = _printed(["compare", *folders, "-o", tmp_path / "comparison"], capfd)
    assert r"scores[red]\u001b[31m" in re.sub(r"[\s\u2500-\u257f]", "", out)
    assert not _COMMANDS.search((tmp_path / "comparison" / "comparison.md").read_text(encoding="utf-8"))
    assert not _COMMANDS.search((tmp_path / "comparison" / "comparison.csv").read_text(encoding="utf-8"))
    out, _ = _printed(["compare", *folders, "--json"], capfd)
    assert json.loads(out)["models"][0]["name"] == folders[0].name
    out, err = _printed(["report", folders[0], "-o", tmp_path / "page\x1b[31m.html"], capfd)
    assert r"page\u001b[31m.html" in out
    page = (tmp_path / "page\x1b[31m.html").read_text(encoding="utf-8")
    assert not _COMMANDS.search(page)


def test_converted_names_are_shown(tmp_path: Path, hostile_names: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    scan = seeds.packed(seeds.nifti())
    names = [name for name in hostile_names if "/" not in name]
    for name in names:
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        (folder / f"{name} t1c.nii.gz").write_bytes(scan[:40] if name == "[bold red]alarm" else scan)
    out, err = _printed(["convert", "headers", tmp_path / "data", "-o", tmp_path / "out"], capfd)
    assert "[bold red]alarm" in out
    assert "cases failed" in err
    out, _ = _printed(["convert", "headers", tmp_path / "data", "-o", tmp_path / "json", "--json"], capfd)
    assert len(json.loads(out)["cases"]) == len(names)


def test_scans_of_hostile_names_are_segmented_and_filled(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = ["[bold red]alarm", "[bold red]fine", "\x1b[31mred\x1b[0m", "line one\nline two"]
    scan = np.zeros((20, 22, 18), np.float32)
    scan[2:18, 3:19, 1:17] = np.random.default_rng(0).normal(500, 100, (16, 16, 16))
    hole = np.zeros(scan.shape, np.uint8)
    hole[6:9, 6:9, 6:9] = 1
    holes = tmp_path / "holes [red]\x1b[31m"
    holes.mkdir()
    for name in names:
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for modality in ("t1n", "t1c", "t2w", "t2f"):
            nib.save(nib.Nifti1Image(scan, np.eye(4)), folder / f"{name} {modality}.nii.gz")
        nib.save(nib.Nifti1Image(hole, np.eye(4)), holes / f"{file_name_of(name)}.nii.gz")
    spoilt = tmp_path / "data" / names[0] / f"{names[0]} t1n.nii.gz"
    spoilt.write_bytes(spoilt.read_bytes()[:40])
    segmenting, filling = tmp_path / "run [red]\x1b[31m", tmp_path / "filler [red]\x1b[31m"
    write_segmentation_run(segmenting)
    write_inpainting_run(filling)
    verbs: tuple[tuple[object, ...], ...] = (
        ("infer", "-m", segmenting),
        ("inpaint", "-m", filling, "--mask", holes, "--modality", "t1n= t1n"),
    )
    for number, verb in enumerate(verbs):
        common = (*verb, "-i", tmp_path / "data", "-o", tmp_path / f"out{number}", "--backend", "torch", "-d", "cpu")
        out, _ = _printed([*common, "--dry-run"], capfd)
        assert "[bold red]alarm" in out
        out, err = _printed(common, capfd)
        assert out == ""
        assert "[bold red]alarm: failed: " in err
        assert "[bold red]fine: done" in err
        out, _ = _printed([*common, "--json"], capfd)
        assert len(json.loads(out)["cases"]) == len(names)
    assert "torch fills holes from" in err


def test_log_lines_and_warnings_are_one_line_each(hostile_names: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    line = segkit.cli.PlainFormatter("%(levelname)s %(message)s")
    for name in hostile_names:
        record = logging.LogRecord("segkit", logging.WARNING, "", 0, "no picture of %s", (name,), None)
        assert line.format(record) == f"WARNING no picture of {on_one_line(name)}"
        text = warnings.formatwarning(name, UserWarning, "a.py", 1, "source()")
        shown = line.format(logging.LogRecord("py.warnings", logging.WARNING, "", 0, "%s", (text,), None))
        assert not re.search(r"[\x00-\x1f]", shown)


def test_an_unforeseen_error_is_told_safely(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> None:
        raise ValueError(f"bad {_NAMELESS}")

    monkeypatch.setattr("segkit.models.table.list_models", broken)
    _, err = _printed(["models"], capfd)
    assert "Traceback" in err
    assert r"ValueError: bad [red]\u001b[31m\u000d" in err


def test_pictures_take_names_for_no_formulas(tmp_path: Path, hostile_names: list[str]) -> None:
    labels = np.ones((4, 4), np.uint8)
    for name in hostile_names:
        if "$" in name or "\x1b" in name or name.startswith("_"):
            grid, scheme = Grid((4, 4), np.eye(4)), classes_scheme("own", {name: 1})
            path = tmp_path / "overlay.png"
            overlay_figure(path, np.eye(4, dtype=np.float32), labels, grid, scheme=scheme, title=name)
            curves_figure(tmp_path / "curves.png", [{"step": 1, "dice": {name: 0.5, "ET": 0.5}}])
            assert path.exists()


def test_a_folder_of_hostile_names_is_checked(
    tmp_path: Path, hostile_names: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    scan = seeds.packed(seeds.nifti())
    made = 0
    for name in hostile_names:
        if "/" not in name:
            folder = tmp_path / "data" / name
            folder.mkdir(parents=True)
            (folder / f"{name} t1c.nii.gz").write_bytes(scan)
            (folder / f"{name} seg.nii.gz").write_bytes(scan[:40])
            made += 1
    assert made > 25
    for arguments in (["check", str(tmp_path / "data"), "--no-estimate"], ["check", str(tmp_path / "none\x1b[31m")]):
        run_segkit(*arguments)
        printed = capfd.readouterr()
        assert not _COMMANDS.search(printed.out + printed.err)
        assert "\\u001b[31m" in printed.out + printed.err


def test_tables_in_markdown_keep_their_cells(hostile_names: list[str]) -> None:
    text = markdown_table(["name", "n"], [[name, "1"] for name in hostile_names])
    lines = text.splitlines()
    assert len(lines) == 2 + len(hostile_names)
    for line in lines:
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3
    assert markdown_text("a|b <b> [x](y) `c` *d*\n# e") == r"a\|b \<b\> \[x\](y) \`c\` \*d\* # e"
    assert markdown_text("BraTS2021_00001: 0.5") == "BraTS2021_00001: 0.5"


def test_spreadsheets_compute_no_names(hostile_names: list[str]) -> None:
    text = scores_csv({name: {"WT": {"dice": -0.5}} for name in hostile_names})
    rows = list(csv.reader(io.StringIO(text)))
    assert len(rows) == 1 + len(hostile_names)
    for name, (case, _, dice) in zip(hostile_names, rows[1:], strict=True):
        assert case[0] not in "=+-@\t\r"
        assert case.removeprefix("'" if name[0] in "=+-@" else "") == printable(name).replace("\n", "\\n")
        assert dice == "-0.5"
    assert rows[1 + hostile_names.index("=cmd|' /C calc'!A0")][0] == "'=cmd|' /C calc'!A0"


def test_scores_of_hostile_names(tmp_path: Path, hostile_names: list[str]) -> None:
    scores = tuple(CaseScores(name, {"label_1": {"dice": 1.0}}, is_missing=True) for name in hostile_names)
    errors = {name: f"{name} is bad" for name in hostile_names}
    pairing = Pairing((), classes_scheme("classes", {"label_1": 1}), challenge=None)
    evaluation = Evaluation(pairing, "legacy", scores, errors)
    evaluation.write(tmp_path)
    document = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert [case["case"] for case in document["cases"]] == hostile_names
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert not _COMMANDS.search(summary)
    assert "<script" not in summary.replace("\\<script", "")
    assert sum(line.startswith("- ") for line in summary.splitlines()) == len(hostile_names) + 1
