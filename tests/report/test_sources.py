"""What is read from folders, and what of it stays on this machine."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from segkit.errors import RequestError
from segkit.evaluation.score_files import read_scores
from segkit.report.page import write_page
from segkit.report.sources import PathRedactor, read_run, read_sources
from tests.report_folders import write_json, write_masks, write_run, write_scores


@pytest.fixture
def redact():
    return PathRedactor([Path("/data of jane/study/masks"), Path("/srv/run")])


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("/data of jane/study/x y.nii.gz: is truncated", "\u2026/x y.nii.gz: is truncated"),
        ("/srv/run and /srvice", "\u2026/run and /srvice"),
        ("cannot read /mnt/disk/p1/t1.nii.gz; expected a volume", "cannot read \u2026/t1.nii.gz; expected a volume"),
        (r"C:\\Users\\jane\\t1.nii.gz is empty".replace("\\\\", "\\"), "\u2026/t1.nii.gz is empty"),
        ("'/home/jane/a.txt'", "'\u2026/a.txt'"),
        (f"{Path.home()}/models/best", "\u2026/models/best"),
        ("fp16/int8 and and/or, 1/2", "fp16/int8 and and/or, 1/2"),
        ("see https://arxiv.org/abs/2104.09648", "see https://arxiv.org/abs/2104.09648"),
        ("lr: 0.01  # 1/x per step", "lr: 0.01  # 1/x per step"),
    ],
)
def test_of_a_path_the_last_name_stays(redact, text, redacted):
    assert redact(text) == redacted


@pytest.mark.parametrize(("epoch_s", "patience_s"), [(10, 180), (100, 300), (1000, 3000)])
def test_a_run_that_is_silent_for_longer_than_ever_before_has_stopped(tmp_path, epoch_s, patience_s):
    write_run(tmp_path / "run", is_finished=False)
    journal = tmp_path / "run" / "metrics.jsonl"
    rows = [{"step": step, "loss": 1.0, "seconds": step * epoch_s, "epoch": step} for step in (1, 2, 3)]
    journal.write_text("\n".join(map(json.dumps, rows)))
    for silent_s, is_running in ((patience_s - 20, True), (patience_s + 20, False)):
        last = time.time() - silent_s
        os.utime(journal, (last, last))
        run = read_run(tmp_path / "run")
        assert run.patience_s == patience_s
        assert (run.is_running, run.is_cut_off) == (is_running, not is_running)


def test_a_run_is_over_when_its_last_scores_are_written(tmp_path):
    write_run(tmp_path / "run", is_finished=False)
    write_json(tmp_path / "run" / "validation.json", {"before": {"accuracy": 0.5}})  # of a pre-training
    assert read_run(tmp_path / "run").is_running
    write_json(tmp_path / "run" / "validation.json", {"before": {}, "after": {}, "minutes": 2.0})
    run = read_run(tmp_path / "run")
    assert (run.is_running, run.is_cut_off) == (False, False)


@pytest.mark.parametrize(
    ("folder", "config", "command"),
    [
        ("run", "lr: 0.01\n", "segkit train DATA -o run --resume"),
        ("run", "method: masked\nlr: 0.01\n", "segkit pretrain DATA -o run --resume"),
        ("cv/fold_1", "lr: 0.01\n", "segkit train DATA -o cv -f all --resume"),
    ],
)
def test_what_goes_on_with_a_run(tmp_path, folder, config, command):
    (tmp_path / "cv").mkdir()
    (tmp_path / "cv" / "config.yaml").write_text("")
    write_run(tmp_path / folder, is_finished=False)
    (tmp_path / folder / "config.yaml").write_text(config)
    assert read_run(tmp_path / folder).resume_command == command


def test_a_row_that_is_being_written_is_left_out(tmp_path):
    write_run(tmp_path / "run", rows=40)
    (run,) = read_sources([tmp_path / "run"]).runs
    assert [row["step"] for row in run.rows] == list(range(1, 41))


def test_of_a_row_the_numbers_are_kept(tmp_path):
    write_run(tmp_path / "run")
    lines = [
        "[1]",
        '{"loss": 1}',
        '{"step": "x", "loss": 1}',
        '{"step": 1, "loss": "x", "dice": {"WT": 0.5, "ET": []}}',
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines))
    (run,) = read_sources([tmp_path / "run"]).runs
    assert run.rows == ({"step": 1.0, "dice": {"WT": 0.5}},)


@pytest.mark.parametrize("name", ["masks/manifest.json", "run/model.json", "run/validation.json"])
@pytest.mark.parametrize("worse", [None, ["a list"]])
def test_any_field_may_hold_something_else(tmp_path, name, worse):
    write_masks(tmp_path / "masks", ["a"], failed={"b": "truncated"})
    write_run(tmp_path / "run")
    path = tmp_path / name
    document = json.loads(path.read_text())
    for place in places(document):
        changed = json.loads(path.read_text())
        parent = changed
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = worse
        write_json(tmp_path / "changed" / path.name, changed)
        write_page([tmp_path / "changed"], tmp_path / "page.html", with_viewer=False)
    assert "</html>" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("worse", [None, ["a list"], 7])
def test_scores_are_read_as_comparisons_read_them(tmp_path, worse):
    write_scores(tmp_path / "scores", {"a": 0.5})
    path = tmp_path / "scores" / "scores.json"
    original = path.read_text()
    refused = 0
    for place in places(json.loads(original)):
        changed = json.loads(original)
        parent = changed
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = worse
        write_json(path, changed)
        complaints = []
        for read in (lambda: read_scores(path), lambda: write_page([path], tmp_path / "page.html", with_viewer=False)):
            try:
                read()
            except RequestError as error:
                complaints.append(str(error))
        assert len(complaints) in (0, 2)
        assert len(set(complaints)) <= 1
        refused += bool(complaints)
    assert refused > 5


def places(document, above=()):
    """The keys that lead to every field of a document."""
    pairs = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in pairs:
        yield (*above, key)
        yield from places(value, (*above, key))


def test_folds_are_runs_of_their_own(tmp_path):
    for fold in ("fold_0", "fold_1"):
        write_run(tmp_path / "cv" / fold)
    write_json(tmp_path / "cv" / "validation.json", {"cases": {}})
    assert [run.name for run in read_sources([tmp_path / "cv"]).runs] == ["cv", "cv/fold_0", "cv/fold_1"]


def test_records_of_earlier_runs_count_where_this_one_has_none(tmp_path):
    write_masks(tmp_path / "masks", ["a"])
    path = tmp_path / "masks" / "manifest.json"
    document = json.loads(path.read_text())
    document["earlier"] = [{"case": "a", "status": "failed", "error": "old"}, {"case": "b", "status": "done"}]
    path.write_text(json.dumps(document))
    cases = read_sources([tmp_path / "masks"]).cases()
    assert [(case.id, case.reason) for case in cases] == [("a", None), ("b", None)]


def test_references_without_a_prediction_are_told_apart(tmp_path):
    write_scores(tmp_path / "scores", {"a": 0.0, "b": 0.5})
    path = tmp_path / "scores" / "scores.json"
    document = json.loads(path.read_text())
    document["cases"][0]["missing"] = True
    document["errors"] = [{"case": "c", "error": "is truncated"}]
    path.write_text(json.dumps(document))
    cases = read_sources([path]).cases()
    assert [(case.id, case.is_missing, case.reason) for case in cases] == [
        ("c", False, "is truncated"),
        ("a", True, None),
        ("b", False, None),
    ]


def test_a_folder_without_documents_is_the_masks_of_an_evaluation(tmp_path):
    (tmp_path / "masks").mkdir()
    write_scores(tmp_path / "scores", {"a": 0.5})
    findings = read_sources([tmp_path / "masks", tmp_path / "scores"])
    assert [(output.name, dict(output.manifest)) for output in findings.outputs] == [("masks", {})]
