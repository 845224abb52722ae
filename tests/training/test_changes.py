"""What a resumed run may do otherwise than before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from segkit.config import build_config
from segkit.errors import RequestError
from segkit.pretraining.methods import PretrainConfig
from segkit.training.config import TrainConfig
from segkit.training.folder import FREE_SETTINGS, settle_settings, with_settings


def config(**sections: object) -> TrainConfig:
    return build_config(TrainConfig, [("test", sections)])


def settle(run: Path, asked: TrainConfig, *, allow_changes: bool = False) -> list[str]:
    changes = settle_settings(run, asked, resume=True, allow_changes=allow_changes)
    return [f"{name} {old} -> {new}" for name, (old, new) in changes.items()]


def test_the_same_settings_are_no_change(tmp_path: Path) -> None:
    settings = config(data={"modalities": {"t1": "T1"}}, network={"arguments": {"widths": [8, 12]}})
    settle_settings(tmp_path, settings, resume=False, allow_changes=False)
    assert settle(tmp_path, settings) == []
    assert not (tmp_path / "changes.jsonl").exists()


def test_every_changed_setting_is_named_with_both_values(tmp_path: Path) -> None:
    settle_settings(tmp_path, config(), resume=False, allow_changes=False)
    other = config(optimiser={"lr": 0.1}, network={"arguments": {"widths": [8]}}, training={"steps": 7})
    named = r"network.arguments {} -> {'widths': \[8\]}, optimiser.lr 0.002 -> 0.1, training.steps 50000 -> 7"
    with pytest.raises(RequestError, match=named):
        settle(tmp_path, other)
    with pytest.raises(RequestError, match=named):  # a refused request changed nothing
        settle(tmp_path, other)


def test_changes_that_are_allowed_are_recorded_and_hold_from_then_on(tmp_path: Path) -> None:
    settle_settings(tmp_path, config(), resume=False, allow_changes=False)
    assert settle(tmp_path, config(optimiser={"lr": 0.1}), allow_changes=True) == ["optimiser.lr 0.002 -> 0.1"]
    assert settle(tmp_path, config(optimiser={"lr": 0.1})) == []
    assert settle(tmp_path, config(), allow_changes=True) == ["optimiser.lr 0.1 -> 0.002"]
    lines = (tmp_path / "changes.jsonl").read_text().splitlines()
    assert [json.loads(line)["changes"]["optimiser.lr"]["new"] for line in lines] == [0.1, 0.002]


def test_what_changes_nothing_that_is_learnt_allow_changes(tmp_path: Path) -> None:
    settle_settings(tmp_path, config(), resume=False, allow_changes=False)
    free = config(data={"cache": "elsewhere"}, training={"workers": 3, "checkpoint_minutes": 1})
    assert settle(tmp_path, free) == []


def test_removed_settings_are_no_change_unless_they_were_used(tmp_path: Path) -> None:
    settings = build_config(PretrainConfig, [])
    settle_settings(tmp_path, settings, resume=False, allow_changes=False)
    path = tmp_path / "settings.json"
    document = json.loads(path.read_text())
    document["views"]["rotation_degrees"] = 0.0
    document["graph_matching"]["solver"]["method"] = "segkit"
    path.write_text(json.dumps(document))
    assert settle_settings(tmp_path, settings, resume=True, allow_changes=False) == {}
    document["views"]["rotation_degrees"] = 30.0
    path.write_text(json.dumps(document))
    with pytest.raises(RequestError, match=r"views.rotation_degrees"):
        settle_settings(tmp_path, settings, resume=True, allow_changes=False)


def test_the_free_settings_exist() -> None:
    document = config().model_dump()
    for name in FREE_SETTINGS:
        section, key = name.split(".")
        assert key in document[section], name


def test_a_setting_that_is_newer_than_the_run_has_its_default(tmp_path: Path) -> None:
    document = config().model_dump(mode="json")
    del document["training"]["accumulate"]
    (tmp_path / "settings.json").write_text(json.dumps(document))
    assert settle(tmp_path, config()) == []
    with pytest.raises(RequestError, match=r"training.accumulate 1 -> 2"):
        settle(tmp_path, config(training={"accumulate": 2}))


def test_settings_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(RequestError, match=r"settings.json: cannot be read, so the run cannot be resumed"):
        settle(tmp_path, config())


def test_changes_are_made_in_other_settings_of_the_kind() -> None:
    fold = config(network={"arguments": {"widths": [8, 12]}}, data={"fold": 2})
    changed = with_settings(fold, {"optimiser.lr": 0.1, "network.arguments": {"width": 4}})
    assert (changed.optimiser.lr, changed.network.arguments, changed.data.fold) == (0.1, {"width": 4}, 2)
