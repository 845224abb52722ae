"""`segkit compare` as it is typed: streams, exit codes, files."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from segkit.cli.evaluate import compare
from segkit.errors import RequestError

app = typer.Typer()
app.command()(compare)


@pytest.fixture
def folders(tmp_path):
    for name, gain in (("first", 0.0), ("second", 0.1), ("third", -0.2)):
        cases = [
            {"case": case, "regions": {"WT": {"dice": 0.6 + index / 20 + gain, "hd95_mm": 5.0, "nsd": 0.5}}}
            for index, case in enumerate("abcd")
        ]
        (tmp_path / name).mkdir()
        document = {"protocol": "legacy", "challenge": None, "cases": cases, "errors": [], "unscored": []}
        (tmp_path / name / "scores.json").write_text(json.dumps(document), encoding="utf-8")
    return tmp_path


def run(folder, *options):
    names = ("first", "second", "third")
    return CliRunner().invoke(app, [*(str(folder / name) for name in names), *options])


def test_json_is_alone_on_standard_output(folders):
    result = run(folders, "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert [own["model"] for own in document["ranking"]] == ["second", "first", "third"]
    assert [own["score"] for own in document["ranking"]] == [1.5, 2.0, 2.5]
    assert {own["p"] for own in document["exchanges"]} == {1 / 16}
    assert "equal scores are left out" in result.stderr


def test_tables_for_people(folders):
    result = run(folders, "--quiet")
    assert result.exit_code == 0
    assert "4 cases, protocol legacy" in result.stdout
    assert "second - first" in result.stdout
    assert "+0.1000" in result.stdout
    assert result.stderr == ""


def test_output_folder_and_metrics(folders):
    result = run(folders, "-o", str(folders / "out"), "--metrics", "nsd, dice", "--quiet")
    assert result.exit_code == 0
    assert {path.name for path in (folders / "out").iterdir()} == {
        "comparison.json",
        "comparison.csv",
        "comparison.md",
    }
    document = json.loads((folders / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert document["metrics"] == ["nsd", "dice"]
    assert len(document["pairs"]) == 3 * 2


def test_wrong_requests_have_exit_code_2(folders):
    (folders / "third" / "scores.json").write_text("{", encoding="utf-8")
    error = run(folders).exception
    assert isinstance(error, RequestError)
    assert error.exit_code == 2
    assert "third" in str(error)
    assert "is not readable JSON" in str(error)
