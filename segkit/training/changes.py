"""What a resumed run was asked to do otherwise than before: refused by name, or done and written down.

The settings that a run began with are in `settings.json`, since `config.yaml` is for people, who may edit it. What was
changed on the way is in `changes.jsonl`, a line for each time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from segkit.config import Config, build_config
from segkit.errors import RequestError

ConfigType = TypeVar("ConfigType", bound=Config)

SETTINGS_NAME, CHANGES_NAME = "settings.json", "changes.jsonl"

FREE_SETTINGS = (
    "data.cache",
    "training.checkpoint_minutes",
    "training.live_page",
    "training.rank_timeout_s",
    "training.trackers",
    "training.workers",
)
"""Settings that say how a training is done and not what it learns: a resumed run takes them as they come."""


@dataclass(frozen=True)
class Change:
    """A setting with another value than before; `key` is its path."""

    key: tuple[str, ...]
    old: Any
    new: Any

    @property
    def name(self) -> str:
        """The setting as `--set` writes it."""
        return ".".join(self.key)

    def __str__(self) -> str:
        return f"{self.name} {self.old} -> {self.new}"


def settle_settings(run: Path, config: Config, *, resume: bool, allow_changes: bool) -> list[Change]:
    """Write down what a run is done with from now on; gives back what a resumed one does otherwise than before.

    Raises:
        RequestError: settings are others than before, and they may not change, or what they were cannot be read.
    """
    changes = _found(run, config) if resume else []
    if changes and not allow_changes:
        raise RequestError(
            f"the settings are not those of the run: {', '.join(map(str, changes))}",
            where=run,
            remedy="Leave them as they were, or go on with the new ones by --allow-changes",
        )
    if changes:
        told = {change.name: {"old": change.old, "new": change.new} for change in changes}
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "changes": told}
        with (run / CHANGES_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    text = json.dumps(config.model_dump(mode="json"), indent=2)
    (run / SETTINGS_NAME).write_text(text + "\n", encoding="utf-8")
    return changes


def _found(run: Path, config: Config) -> list[Change]:
    path = run / SETTINGS_NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError("cannot be read, so the run cannot be resumed", where=path) from error
    before = build_config(type(config), [(str(path), document)])  # settings that are new since then have their default
    return [change for change in compared(before, config) if change.name not in FREE_SETTINGS]


def compared(before: ConfigType, after: ConfigType) -> list[Change]:
    """What differs between two sets of settings, in their order."""
    pairs = zip(_leaves(before), _leaves(after), strict=True)
    return [Change(key, old, new) for (key, old), (_, new) in pairs if old != new]


def with_changes(config: ConfigType, changes: list[Change]) -> ConfigType:
    """Settings of another run of the same kind with the same changes made."""
    document = config.model_dump(mode="json")
    for change in changes:
        section = document
        for part in change.key[:-1]:
            section = section[part]
        section[change.key[-1]] = change.new
    return build_config(type(config), [("changes", document)])


def _leaves(config: BaseModel, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every setting by its path, with its value as it is in a file."""
    document = config.model_dump(mode="json")
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, (*key, name))
        else:
            yield (*key, name), document[name]
