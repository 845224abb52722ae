"""The run folder: who may use it, and the plan that is kept in it.

`config.yaml` is for people (every setting, and why planning chose it), `settings.json` for comparing them when the run
is resumed; `plan.json` keeps the reasons and the estimate for a resumed run, which never plans again; `split.json`
keeps who trains and who validates; `weights.json` keeps where the weights came from that the run began with, if it did
not begin with random ones.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from segkit.checkpoint.run_folder import CARD_NAME, DAMAGED_NAME, LAST_NAME, PREVIOUS_NAME, WEIGHTS_NAME
from segkit.config import Config, annotated_yaml, build_config, read_yaml
from segkit.errors import RequestError
from segkit.reading.files import remove_leftovers
from segkit.training.changes import CHANGES_NAME, SETTINGS_NAME, settle_settings
from segkit.training.config import TrainConfig
from segkit.training.journal import METRICS_NAME
from segkit.training.live_report import PAGE_NAME
from segkit.training.request import TrainingRequest
from segkit.training.trackers import MLFLOW_RUN_NAME, require_trackers

_log = logging.getLogger(__name__)

RequestT = TypeVar("RequestT", bound=TrainingRequest[Any, Any])
SummaryT = TypeVar("SummaryT")

CONFIG_NAME = "config.yaml"
SCORES_NAME = "validation.json"
_PLAN_NAME, _SPLIT_NAME, _ORIGIN_NAME = "plan.json", "split.json", "weights.json"
_OF_ONE_RUN = (
    *(LAST_NAME, PREVIOUS_NAME, DAMAGED_NAME, CARD_NAME, WEIGHTS_NAME),
    *(METRICS_NAME, SCORES_NAME, SETTINGS_NAME, CHANGES_NAME, _PLAN_NAME, _ORIGIN_NAME, PAGE_NAME, MLFLOW_RUN_NAME),
)


def require_usable(run: Path, trackers: Sequence[str], *, resume: bool, overwrite: bool) -> None:
    """Refuse to mix two runs in one folder, to resume what never began, and trackers that are not installed.

    Nothing is changed.

    Raises:
        RequestError: as said.
    """
    require_trackers(trackers)
    if run.exists() and not run.is_dir():
        raise RequestError("is a file", where=run, expected="a folder, or a name that is free")
    if resume and not has_state(run):
        raise RequestError("there is nothing to resume", where=run, remedy="Start it without --resume")
    if has_state(run) and not resume and not overwrite:
        raise RequestError(
            "holds a run already",
            where=run,
            remedy="Go on with --resume, start again with --overwrite, or name another folder",
        )


def has_state(run: Path) -> bool:
    """Whether a training began in the folder, so that it can be resumed."""
    return (run / LAST_NAME).exists() or (run / PREVIOUS_NAME).exists()


def open_folder(run: Path, config: Config, *, resume: bool, allow_changes: bool = False) -> None:
    """Make the folder; unless the run is resumed, remove what another run left in it, and keep its settings.

    Raises:
        RequestError: it cannot be written to, or a resumed run is to have other settings than before, by name, and
            they may not change.
    """
    try:
        (run / "figures").mkdir(parents=True, exist_ok=True)
        remove_leftovers(run)
        for name in () if resume else _OF_ONE_RUN:
            (run / name).unlink(missing_ok=True)
        settle_settings(run, config, resume=resume, allow_changes=allow_changes)
    except OSError as error:
        raise RequestError(f"cannot be written to ({error.strerror})", where=run) from error


def settings_return_if_refused(go: Callable[[RequestT], SummaryT]) -> Callable[[RequestT], SummaryT]:
    """What does a run, made so that a request which turns out to be wrong leaves the settings in its folder as before.

    Whether the state of a run goes with other settings is known only once its network and its optimiser are built.
    """

    @functools.wraps(go)
    def go_or_undo(request: RequestT) -> SummaryT:
        paths = [request.run / name for name in (CONFIG_NAME, SETTINGS_NAME, CHANGES_NAME)]
        before = {path: path.read_bytes() for path in paths if path.is_file()}
        try:
            return go(request)
        except RequestError:
            for path in filter(Path.is_file, paths) if request.ranks.is_first else ():
                if path not in before:
                    path.unlink()
                elif path.read_bytes() != before[path]:
                    path.write_bytes(before[path])
            raise

    return go_or_undo


def write_config(run: Path, config: Config, reasons: Mapping[str, str], heading: str) -> None:
    """Write `config.yaml`: every setting with its meaning and, where planning chose, its reason."""
    run.mkdir(parents=True, exist_ok=True)
    (run / CONFIG_NAME).write_text(f"# {heading}\n{annotated_yaml(config, reasons)}", encoding="utf-8")


def read_config(run: Path) -> TrainConfig:
    """The settings of a segmentation run.

    Raises:
        RequestError: the file is missing or was spoilt by editing.
    """
    path = run / CONFIG_NAME
    return build_config(TrainConfig, [(str(path), read_yaml(path))])


def write_plan(run: Path, reasons: Mapping[str, str], estimate: Mapping[str, float]) -> None:
    """Keep why planning chose what it chose, and what it expects."""
    write_json(run / _PLAN_NAME, {"reasons": dict(reasons), "estimate": dict(estimate)})
    for key, reason in reasons.items():
        _log.info("%s: %s", key, reason)


def read_plan(run: Path) -> tuple[Mapping[str, str], Mapping[str, float]]:
    """What `write_plan` kept: reasons by dotted key, and the estimate; empty where it was lost."""
    try:
        document = json.loads((run / _PLAN_NAME).read_text(encoding="utf-8"))
        return dict(document["reasons"]), dict(document["estimate"])
    except (OSError, ValueError, KeyError):
        return {}, {}


def write_origin(run: Path, facts: Mapping[str, str], report: Mapping[str, Any]) -> None:
    """Keep where the first weights came from, and what became of each of their tensors."""
    write_json(run / _ORIGIN_NAME, {**facts, "report": dict(report)})


def read_origin(run: Path) -> dict[str, str]:
    """The facts that `write_origin` kept; empty where the run began with random weights."""
    try:
        document = json.loads((run / _ORIGIN_NAME).read_text(encoding="utf-8"))
        return {name: value for name, value in document.items() if isinstance(value, str)}
    except (OSError, ValueError, AttributeError):
        return {}


def write_split(
    run: Path, data: Sequence[Path], training: Sequence[str], validation: Sequence[str], excluded: Sequence[str]
) -> None:
    """Keep who trains and who validates, and in which folders they are."""
    split = {
        "data": [str(folder.absolute()) for folder in data],
        "training": list(training),
        "validation": list(validation),
        "excluded": list(excluded),
    }
    write_json(run / _SPLIT_NAME, split)


def require_same_split(run: Path, training: Sequence[str], validation: Sequence[str]) -> None:
    """Refuse to go on with other cases: what validated would be trained on.

    Raises:
        RequestError: the split differs from that of the run.
    """
    path = run / _SPLIT_NAME
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError("cannot be read, so the run cannot be resumed", where=path) from error
    for what, ids in (("training", training), ("validation", validation)):
        changed = sorted(set(before[what]) ^ set(ids))
        if changed:
            raise RequestError(
                f"the {what} cases are not those that the run began with: {', '.join(changed[:5])}",
                where=path,
                remedy="Resume with the data, the fold and the excluded cases that it was started with",
            )


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write one strict JSON document."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
