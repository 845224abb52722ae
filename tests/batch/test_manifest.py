"""The manifest on disk: complete after every case, and enough to go on from."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from segkit.batch.manifest import STAGES, CaseRecord, Manifest, TaskName
from segkit.errors import DataError, RequestError

FACTS = {"model": {"name": "run"}, "environment": {"python": "3"}}


def open_manifest(folder: Path, ids: str = "abc", identity: str = "m1") -> Manifest:
    return Manifest(folder, list(ids), FACTS, identity)


def test_every_record_is_on_disk_at_once(tmp_path: Path) -> None:
    manifest = open_manifest(tmp_path / "new" / "folder")
    manifest.add(CaseRecord("b", "done", seconds=dict.fromkeys(STAGES, 0.5), peak_rss_mb=10.0, model="m1"))
    manifest.add(CaseRecord("a", "failed", "why"), CaseRecord("c", "skipped"))
    document = json.loads((tmp_path / "new" / "folder" / "manifest.json").read_text())
    assert document == manifest.to_json() | {"cases": document["cases"]}
    assert [(case["case"], case["status"], case["error"]) for case in document["cases"]] == [
        ("b", "done", None),
        ("a", "failed", "why"),
        ("c", "skipped", None),
    ]
    assert set(document["cases"][0]["seconds"]) == {"read", "preprocess", "predict", "decode", "write"}
    assert document["summary"] == {"done": 1, "failed": 1, "skipped": 1, "remaining": 0, "seconds": 2.5}
    assert document["model"] == {"name": "run"}


def test_what_was_done_is_known_to_the_next_run(tmp_path: Path) -> None:
    done = CaseRecord("a", "done", model="m1", label_scheme="brats2017", missing_modalities=("t2f",))
    open_manifest(tmp_path).add(done, CaseRecord("b", "failed", "why", label_scheme="brats2017", model="m1"))
    again = open_manifest(tmp_path)
    assert again.was_made("a", "brats2017", ("t2f",))
    assert not again.was_made("a", "brats2023", ("t2f",))
    assert not again.was_made("a", "brats2017", ())
    assert not again.was_made("b", "brats2017", ())
    assert not open_manifest(tmp_path, identity="m2").was_made("a", "brats2017", ("t2f",))


def test_cases_that_a_killed_run_may_have_written_are_known(tmp_path: Path) -> None:
    killed = open_manifest(tmp_path)
    killed.replacing = {"b"}
    killed.add(CaseRecord("a", "done", model="m1"))
    again = open_manifest(tmp_path)
    assert [case_id for case_id in "abc" if again.was_cut_short(case_id)] == ["c"]
    assert not open_manifest(tmp_path, identity="m2").was_cut_short("c")


def test_records_of_other_cases_are_kept(tmp_path: Path) -> None:
    records = [CaseRecord(case_id, "done", model="m1", label_scheme="s") for case_id in "ab"]
    open_manifest(tmp_path, "ab").add(*records)
    subset = open_manifest(tmp_path, "bc", "m2")
    subset.add(CaseRecord("b", "done", model="m2", label_scheme="s"))
    document = subset.to_json()
    assert [entry["case"] for entry in document["earlier"]] == ["a"]
    assert document["remaining"] == ["c"]
    assert open_manifest(tmp_path, "ab", "m1").was_made("a", "s", ())
    assert not open_manifest(tmp_path, "ab", "m1").was_made("b", "s", ())


def test_a_failure_does_not_forget_the_mask_before_it(tmp_path: Path) -> None:
    open_manifest(tmp_path, "a").add(CaseRecord("a", "done", model="m1", label_scheme="s"))
    open_manifest(tmp_path, "a", "m2").add(CaseRecord("a", "failed", "a mask of m1 is there"))
    again = open_manifest(tmp_path, "a")
    assert again.was_made("a", "s", ())
    again.add(CaseRecord("a", "skipped", model="m1", label_scheme="s"))
    assert again.to_json()["earlier"] == []


def test_of_many_cases_the_last_are_in_a_journal_that_the_next_run_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segkit.batch.manifest._AT_ONCE", 0)
    ids = [f"{number:02d}\u2028{os.fsdecode(bytes([0xE9]))}" for number in range(60)]  # rewritten with every third
    killed = Manifest(tmp_path, ids, FACTS, "m1")
    killed.add()
    sizes = []
    for case_id in ids[:8]:
        killed.add(CaseRecord(case_id, "done", model="m1", label_scheme="s"))
        sizes.append(len(json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))["cases"]))
    assert sizes == [0, 0, 3, 3, 3, 6, 6, 6]
    journal = tmp_path / "manifest.journal"
    assert journal.read_text().count("\n") == 2
    journal.write_text(journal.read_text() + '{"case": "08')  # killed in the midst of a line
    again = Manifest(tmp_path, ids, FACTS, "m1")
    assert [again.was_made(case_id, "s", ()) for case_id in ids] == [True] * 8 + [False] * 52
    assert [again.was_cut_short(case_id) for case_id in ids] == [False] * 8 + [True] * 52
    again.add(CaseRecord(ids[0], "skipped", model="m1"))  # the first of a run is written whole, with what remains
    assert not journal.exists()
    document = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert [entry["case"] for entry in document["earlier"]] == json.loads(json.dumps(ids[1:8]))
    assert len(document["remaining"]) == 59
    again.add(CaseRecord(ids[1], "skipped", model="m1"))
    assert journal.exists()
    again.close()
    assert not journal.exists()
    assert json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8")) == json.loads(
        json.dumps(again.to_json())
    )


def test_the_journal_of_one_part_is_not_that_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segkit.batch.manifest._AT_ONCE", 0)
    ids = [str(number) for number in range(100)]
    first, second = (Manifest(tmp_path, ids, FACTS, "m1", f"part_{number}_of_2") for number in (0, 1))
    for manifest, case_id in ((first, "0"), (second, "1")):
        manifest.add()
        manifest.add(CaseRecord(case_id, "done", model="m1", label_scheme="s"))
    whole = Manifest(tmp_path, ids, FACTS, "m1")
    assert [case_id for case_id in ids if whole.was_made(case_id, "s", ())] == ["0", "1"]


@pytest.mark.parametrize("part", [None, "part_0_of_2"])
@pytest.mark.parametrize("names_task", [True, False])
@pytest.mark.parametrize(("task", "other"), [("segmentation", "inpainting"), ("inpainting", "segmentation")])
def test_the_folder_of_another_task_is_refused(
    tmp_path: Path, task: TaskName, other: TaskName, names_task: bool, part: str | None
) -> None:
    facts = {**FACTS, "holes": {"from": "masks"}} if task == "inpainting" else FACTS
    Manifest(tmp_path, ["a"], facts, "m1", part, task=task).write()
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text())
    assert document["task"] == task
    if not names_task:  # as before manifests did
        del document["task"]
        path.write_text(json.dumps(document))
    Manifest(tmp_path, ["a"], facts, "m1", task=task)
    verb = {"segmentation": "infer", "inpainting": "inpaint"}[task]
    with pytest.raises(RequestError, match=f"{path.name}: was written by `segkit {verb}`.* another output folder"):
        Manifest(tmp_path, ["b"], FACTS, "m2", task=other)


@pytest.mark.parametrize("text", ['{"cases": [', '{"cases": 3}', "[]"])
def test_a_damaged_manifest_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        manifest = open_manifest(tmp_path)
    assert "it is replaced" in caplog.text
    manifest.write()
    assert json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))["remaining"] == ["a", "b", "c"]


def test_unwritable_output_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match="cannot be written"):
        Manifest(tmp_path / "out", ["a"], FACTS, "m1").write()


def test_a_case_whose_name_is_not_utf8_is_recorded_and_known_again(tmp_path: Path) -> None:
    name = os.fsdecode(b"Andr\xe9 n\xc3\xa4")
    Manifest(tmp_path, [name], FACTS, "m1").add(CaseRecord(name, "done", model="m1", label_scheme="s"))
    assert "Andr\\udce9 nä" in (tmp_path / "manifest.json").read_text(encoding="utf-8")
    assert Manifest(tmp_path, [name], FACTS, "m1").was_made(name, "s", ())
