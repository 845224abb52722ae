"""Names from outside are shown in tables, spreadsheets and on terminals, and never obeyed."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from fuzzing import seeds

import segkit.cli
from segkit.cli.options import print_json, print_table
from segkit.cli.progress import CaseProgress
from segkit.errors import DataError, Problem, printable
from segkit.inference.manifest import CaseRecord
from segkit.labels import classes_scheme
from segkit.report.evaluation import CaseScores, Evaluation
from segkit.report.tables import markdown_table, markdown_text, scores_csv

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

    print_table("[red]title[/red]", ("[b]case[/b]", "why"), [(name, name) for name in hostile_names])
    printed = capsys.readouterr().out
    assert not _COMMANDS.search(printed)
    assert "[red]title[/red]" in printed
    assert "[red]bold[/red]" in printed
    assert "[link=https://example.org]here[/link]" in printed

    with CaseProgress("segmenting", 1, is_quiet=False) as progress:
        for name in hostile_names:
            progress.show(CaseRecord(name, "done"))
            progress.show(CaseRecord(name, "failed", name))
    assert not _COMMANDS.search(capsys.readouterr().err)


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
        with pytest.raises(SystemExit):
            segkit.cli.main(arguments)
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
    evaluation = Evaluation("legacy", None, classes_scheme("classes", {"label_1": 1}), scores, errors)
    evaluation.write(tmp_path)
    document = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert [case["case"] for case in document["cases"]] == hostile_names
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert not _COMMANDS.search(summary)
    assert "<script" not in summary.replace("\\<script", "")
    assert sum(line.startswith("- ") for line in summary.splitlines()) == len(hostile_names) + 1
