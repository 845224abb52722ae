"""`segkit report` as it is typed: streams, exit codes, the file."""

from __future__ import annotations

import json

import typer
from typer.testing import CliRunner

from segkit.cli.report import report
from segkit.errors import RequestError
from segkit.evaluation.score_folder import evaluate_folders
from tests.report_folders import write_data, write_masks, write_run, write_scores

app = typer.Typer()
app.command()(report)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_page_about_a_run_and_an_evaluation(tmp_path):
    write_run(tmp_path / "run")
    write_scores(tmp_path / "scores", {"case 1": 0.5, "case 2": 0.75})
    page = tmp_path / "new" / "page.html"
    result = run(tmp_path / "run", tmp_path / "scores", "-o", page, "--title", "Two cases", "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert (document["cases"], document["stills"], document["volumes"]) == (2, 0, 0)
    assert document["bytes"] == page.stat().st_size
    assert "<h1>Two cases</h1>" in page.read_text(encoding="utf-8")


def test_words_for_people(tmp_path):
    write_scores(tmp_path / "scores", {"case 1": 0.5})
    result = run(tmp_path / "scores", "-o", tmp_path / "page.html")
    assert result.exit_code == 0
    assert "1 cases, 0 with pictures, 0 in the viewer" in result.stdout
    assert "--data" in result.stderr


def test_a_folder_is_no_page(tmp_path):
    result = run(tmp_path, "-o", tmp_path)
    assert isinstance(result.exception, RequestError)
    assert "is a folder" in str(result.exception)


def test_data_without_images_is_a_wrong_request(tmp_path):
    write_scores(tmp_path / "scores", {"case 1": 0.5})
    (tmp_path / "data").mkdir()
    result = run(tmp_path / "scores", "-o", tmp_path / "page.html", "--data", tmp_path / "data")
    assert isinstance(result.exception, RequestError)
    assert "no layout matches" in str(result.exception)


def test_scores_lead_to_images_and_masks(tmp_path):
    write_data(tmp_path / "data", ["BraTS2021_00001", "BraTS2021_00002"])
    write_masks(tmp_path / "masks", ["BraTS2021_00001", "BraTS2021_00002"])
    evaluate_folders(tmp_path / "masks", tmp_path / "data").write(tmp_path / "scores")
    result = run(tmp_path / "scores", "-o", tmp_path / "page.html", "--json")
    assert json.loads(result.stdout)["stills"] == 2
    assert str(tmp_path) not in (tmp_path / "page.html").read_text(encoding="utf-8")
