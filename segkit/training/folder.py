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
from datetime import UTC, datetime
from functools import reduce
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

CONFIG_NAME, CHANGES_NAME, SCORES_NAME, ORIGIN_NAME = "config.yaml", "changes.jsonl", "validation.json", "weights.json"
_PLAN_NAME, _SPLIT_NAME = "plan.json", "split.json"
_OF_ONE_RUN = (
    *(LAST_NAME, PREVIOUS_NAME, DAMAGED_NAME, CARD_NAME, WEIGHTS_NAME),
    *(METRICS_NAME, SCORES_NAME, SETTINGS_NAME, CHANGES_NAME, _PLAN_NAME, ORIGIN_NAME, PAGE_NAME, MLFLOW_RUN_NAME),
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
    document = read_object(run / _PLAN_NAME)
    return document.get("reasons", {}), document.get("estimate", {})


def write_split(
    run: Path, data: Sequence[Path], training: Sequence[str], validation: Sequence[str], excluded: Sequence[str]
) -> None:
    """Write `split.json`: ids of training, validation and excluded cases, and their folders."""
    ids = {"training": list(training), "validation": list(validation), "excluded": list(excluded)}
    write_json(run / _SPLIT_NAME, {"data": [str(folder.absolute()) for folder in data], **ids})


_OF_THE_SPLIT = {"data.fold", "data.folds", "data.split_seed", "data.split", "data.patients"}


def read_recorded_split(run: Path, config: Config, case_ids: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """Training and validation ids of a run, which a later version might split otherwise.

    None if the settings of the split differ, or if the ids are not all of `case_ids`.
    """
    if not _OF_THE_SPLIT.isdisjoint(changes_of(run, config, allow_changes=True)):
        return None
    before = read_object(run / _SPLIT_NAME)
    training, validation = before.get("training", []), before.get("validation", [])
    return (training, validation) if {*training, *validation} == set(case_ids) else None


def require_same_split(run: Path, training: Sequence[str], validation: Sequence[str]) -> None:
    """Check that a resumed run has the same cases, so that it does not train on its validation cases.

    Raises:
        RequestError: the split differs.
    """
    path = run / _SPLIT_NAME
    before = _read_to_resume(path)
    for what, ids in (("training", training), ("validation", validation)):
        if changed := sorted(set(before[what]) ^ set(ids)):
            found = f"the {what} cases are not those that the run began with: {', '.join(changed[:5])}"
            remedy = "Resume with the data, the fold and the excluded cases that it was started with"
            raise RequestError(found, where=path, remedy=remedy)


def _read_to_resume(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError("cannot be read, so the run cannot be resumed", where=path) from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write one strict JSON document."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


_REMOVED = {"views.rotation_degrees": 0.0, "graph_matching.solver.method": "segkit"}
"""Settings of version 0.1 that are gone, and the value as which all runs have them."""

Changes = Mapping[str, tuple[Any, Any]]
"""Dotted key of a setting -> its old and its new value."""


def settle_settings(run: Path, config: Config, *, resume: bool, allow_changes: bool) -> Changes:
    """Write the settings of a run; returns those that a resumed one changes.

    Raises:
        RequestError: see `changes_of`.
    """
    changes = changes_of(run, config, allow_changes=allow_changes) if resume else {}
    if changes:
        changed = {name: {"old": old, "new": new} for name, (old, new) in changes.items()}
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "changes": changed}
        with (run / CHANGES_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    text = json.dumps(config.model_dump(mode="json"), indent=2)
    (run / SETTINGS_NAME).write_text(text + "\n", encoding="utf-8")
    return changes


def changes_of(run: Path, config: Config, *, allow_changes: bool) -> Changes:
    """The settings in which a resumed run would differ from before, in their order, apart from `FREE_SETTINGS`.

    Raises:
        RequestError: settings differ and may not change, or those of the run cannot be read.
    """
    path = run / SETTINGS_NAME
    settings = _without_removed(_read_to_resume(path))
    before = dict(_leaves(build_config(type(config), [(str(path), settings)])))  # with newer defaults
    changes = {
        name: (before[name], value)
        for name, value in _leaves(config)
        if value != before[name] and name not in FREE_SETTINGS
    }
    if changes and not allow_changes:
        shown = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changes.items())
        remedy = "Repeat the settings of the run, or add --allow-changes to continue with the new ones"
        raise RequestError(f"the settings differ from those of the run: {shown}", where=run, remedy=remedy)
    return changes


def _without_removed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those that are gone, if they had the only value that there is now."""
    for name, value in _REMOVED.items():
        *sections, key = name.split(".")
        section = reduce(lambda found, one: found.get(one, {}), sections, settings)
        if section.get(key) == value:
            del section[key]
    return settings


def with_planned(run: Path, config: ConfigT) -> ConfigT:
    """The settings of a resumed run; those left to planning (None or auto) get the values planned for the run."""
    reasons, _ = read_plan(run)
    changes = changes_of(run, config, allow_changes=True) if reasons else {}
    planned = {name: old for name, (old, new) in changes.items() if name in reasons and new in (None, "auto")}
    return with_settings(config, planned)


def with_settings(config: ConfigT, values: Mapping[str, Any]) -> ConfigT:
    """The settings with these values, by dotted key."""
    document = config.model_dump(mode="json")
    for name, value in values.items():
        section = document
        *sections, last = name.split(".")
        for part in sections:
            section = section[part]
        section[last] = value
    return build_config(type(config), [("changes", document)])


def _leaves(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    document = config.model_dump(mode="json")
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, document[name]
