"""The files of a run folder other than weights and checkpoints.

`config.yaml` has every setting with its reason, and users may edit it; `settings.json` the settings that a resumed run
is compared with; `changes.jsonl` a line for each time that settings were changed; `plan.json` reasons and estimate,
since a resumed run is not planned again; `split.json` the training and validation cases; `weights.json` the origin of
the first weights, unless they were random.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from segkit.checkpoint.run_folder import CARD_NAME, DAMAGED_NAME, LAST_NAME, PREVIOUS_NAME, WEIGHTS_NAME
from segkit.config import Config, annotated_yaml, build_config, read_yaml
from segkit.errors import RequestError
from segkit.reading.files import remove_leftovers
from segkit.training.config import TrainConfig
from segkit.training.journal import METRICS_NAME, PAGE_NAME
from segkit.training.trackers import MLFLOW_RUN_NAME, SETTINGS_NAME, require_trackers

_log = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=Config)

CONFIG_NAME, CHANGES_NAME, SCORES_NAME = "config.yaml", "changes.jsonl", "validation.json"
_PLAN_NAME, _SPLIT_NAME, _ORIGIN_NAME = "plan.json", "split.json", "weights.json"
_OF_ONE_RUN = (
    *(LAST_NAME, PREVIOUS_NAME, DAMAGED_NAME, CARD_NAME, WEIGHTS_NAME),
    *(METRICS_NAME, SCORES_NAME, SETTINGS_NAME, CHANGES_NAME, _PLAN_NAME, _ORIGIN_NAME, PAGE_NAME, MLFLOW_RUN_NAME),
)
FREE_SETTINGS = (
    *("data.cache", "training.checkpoint_minutes", "training.live_page"),
    *("training.rank_timeout_s", "training.trackers", "training.workers"),
)
"""Settings that do not affect the weights: a resumed run may change them."""


def require_usable(run: Path, trackers: Sequence[str], *, resume: bool, overwrite: bool) -> None:
    """Check that a run may use a folder; nothing is changed.

    Raises:
        RequestError: the folder holds another run, or no run to resume, or a tracker is not installed.
    """
    require_trackers(trackers)
    if run.exists() and not run.is_dir():
        raise RequestError("is a file", where=run, expected="a folder, or a name that is free")
    if resume and not has_state(run):
        raise RequestError("there is nothing to resume", where=run, remedy="Start it without --resume")
    if has_state(run) and not resume and not overwrite:
        remedy = "Continue with --resume, start again with --overwrite, or name another folder"
        raise RequestError("holds a run already", where=run, remedy=remedy)


def has_state(run: Path) -> bool:
    """Whether the folder has a checkpoint."""
    return (run / LAST_NAME).exists() or (run / PREVIOUS_NAME).exists()


def open_folder(run: Path, config: Config, *, resume: bool, allow_changes: bool = False) -> None:
    """Make the folder and write the settings; a new run removes the files of an earlier one.

    Raises:
        RequestError: the folder cannot be written to, or the settings of a resumed run may not change.
    """
    try:
        (run / "figures").mkdir(parents=True, exist_ok=True)
        remove_leftovers(run)
        for name in () if resume else _OF_ONE_RUN:
            (run / name).unlink(missing_ok=True)
        settle_settings(run, config, resume=resume, allow_changes=allow_changes)
    except OSError as error:
        raise RequestError(f"cannot be written to ({error.strerror})", where=run) from error


@contextmanager
def restore_config_on_error(run: Path, *, is_first: bool) -> Iterator[None]:
    """Restore the settings in a run folder after a RequestError; only rank 0 writes.

    Whether a checkpoint fits changed settings is known only when network and optimiser are built.
    """
    paths = [run / name for name in (CONFIG_NAME, SETTINGS_NAME, CHANGES_NAME)]
    before = {path: path.read_bytes() for path in paths if path.is_file()}
    try:
        yield
    except RequestError:
        for path in filter(Path.is_file, paths) if is_first else ():
            if path not in before:
                path.unlink()
            elif path.read_bytes() != before[path]:
                path.write_bytes(before[path])
        raise


def write_config(run: Path, config: Config, reasons: Mapping[str, str], heading: str) -> None:
    """Write `config.yaml`: every setting with its meaning and, if it was planned, its reason."""
    run.mkdir(parents=True, exist_ok=True)
    (run / CONFIG_NAME).write_text(f"# {heading}\n{annotated_yaml(config, reasons)}", encoding="utf-8")


def read_config(run: Path) -> TrainConfig:
    """The settings of a segmentation run.

    Raises:
        RequestError: the file is missing or not valid.
    """
    path = run / CONFIG_NAME
    return build_config(TrainConfig, [(str(path), read_yaml(path))])


def write_plan(run: Path, reasons: Mapping[str, str], estimate: Mapping[str, float]) -> None:
    """Write `plan.json`, and log the reasons."""
    write_json(run / _PLAN_NAME, {"reasons": dict(reasons), "estimate": dict(estimate)})
    for key, reason in reasons.items():
        _log.info("%s: %s", key, reason)


def read_plan(run: Path) -> tuple[Mapping[str, str], Mapping[str, float]]:
    """Reasons by dotted key, and the estimate, from `plan.json`; empty if there is none."""
    try:
        document = json.loads((run / _PLAN_NAME).read_text(encoding="utf-8"))
        return dict(document["reasons"]), dict(document["estimate"])
    except (OSError, ValueError, KeyError):
        return {}, {}


def write_origin(run: Path, facts: Mapping[str, str], report: Mapping[str, Any]) -> None:
    """Write `weights.json`: the origin of the first weights, and the report of loading them."""
    write_json(run / _ORIGIN_NAME, {**facts, "report": dict(report)})


def read_origin(run: Path) -> dict[str, str]:
    """The facts in `weights.json`; empty for random weights."""
    try:
        document = json.loads((run / _ORIGIN_NAME).read_text(encoding="utf-8"))
        return {name: value for name, value in document.items() if isinstance(value, str)}
    except (OSError, ValueError, AttributeError):
        return {}


def write_split(
    run: Path, data: Sequence[Path], training: Sequence[str], validation: Sequence[str], excluded: Sequence[str]
) -> None:
    """Write `split.json`: ids of training, validation and excluded cases, and their folders."""
    ids = {"training": list(training), "validation": list(validation), "excluded": list(excluded)}
    write_json(run / _SPLIT_NAME, {"data": [str(folder.absolute()) for folder in data], **ids})


def require_same_split(run: Path, training: Sequence[str], validation: Sequence[str]) -> None:
    """Check that a resumed run has the same cases, so that it does not train on its validation cases.

    Raises:
        RequestError: the split differs.
    """
    path = run / _SPLIT_NAME
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError("cannot be read, so the run cannot be resumed", where=path) from error
    for what, ids in (("training", training), ("validation", validation)):
        changed = sorted(set(before[what]) ^ set(ids))
        if changed:
            found = f"the {what} cases are not those that the run began with: {', '.join(changed[:5])}"
            remedy = "Resume with the data, the fold and the excluded cases that it was started with"
            raise RequestError(found, where=path, remedy=remedy)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write one strict JSON document."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


@dataclass(frozen=True)
class Change:
    """A setting whose value changed; `key` is its path."""

    key: tuple[str, ...]
    old: Any
    new: Any

    @property
    def name(self) -> str:
        """The dotted key."""
        return ".".join(self.key)

    def __str__(self) -> str:
        return f"{self.name} {self.old} -> {self.new}"


def settle_settings(run: Path, config: Config, *, resume: bool, allow_changes: bool) -> list[Change]:
    """Write the settings of a run; returns those that a resumed one changes.

    Raises:
        RequestError: see `changes_of`.
    """
    changes = changes_of(run, config, allow_changes=allow_changes) if resume else []
    if changes:
        changed = {change.name: {"old": change.old, "new": change.new} for change in changes}
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "changes": changed}
        with (run / CHANGES_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    text = json.dumps(config.model_dump(mode="json"), indent=2)
    (run / SETTINGS_NAME).write_text(text + "\n", encoding="utf-8")
    return changes


def changes_of(run: Path, config: Config, *, allow_changes: bool) -> list[Change]:
    """The settings in which a resumed run would differ from before, apart from `FREE_SETTINGS`.

    Raises:
        RequestError: settings differ and may not change, or those of the run cannot be read.
    """
    path = run / SETTINGS_NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError("cannot be read, so the run cannot be resumed", where=path) from error
    before = build_config(type(config), [(str(path), document)])  # newer settings have their default
    changes = [change for change in compare(before, config) if change.name not in FREE_SETTINGS]
    if changes and not allow_changes:
        found = f"the settings differ from those of the run: {', '.join(map(str, changes))}"
        remedy = "Repeat the settings of the run, or add --allow-changes to continue with the new ones"
        raise RequestError(found, where=run, remedy=remedy)
    return changes


def with_planned(run: Path, config: ConfigT) -> ConfigT:
    """The settings of a resumed run; those left to planning (None or auto) get the values planned for the run."""
    reasons, _ = read_plan(run)
    changes = changes_of(run, config, allow_changes=True) if reasons else []
    left_open = [change for change in changes if change.name in reasons and change.new in (None, "auto")]
    return with_changes(config, [Change(change.key, change.new, change.old) for change in left_open])


def compare(before: ConfigT, after: ConfigT) -> list[Change]:
    """The settings that differ, in their order."""
    pairs = zip(_leaves(before), _leaves(after), strict=True)
    return [Change(key, old, new) for (key, old), (_, new) in pairs if old != new]


def with_changes(config: ConfigT, changes: list[Change]) -> ConfigT:
    """The settings with these changes."""
    document = config.model_dump(mode="json")
    for change in changes:
        section = document
        for part in change.key[:-1]:
            section = section[part]
        section[change.key[-1]] = change.new
    return build_config(type(config), [("changes", document)])


def _leaves(config: BaseModel, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    document = config.model_dump(mode="json")
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, (*key, name))
        else:
            yield (*key, name), document[name]
