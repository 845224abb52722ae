"""TensorBoard and MLflow, which get the rows of the journal.

Both write into the run folder (`tensorboard/`, `mlflow/`); only MLFLOW_TRACKING_URI sends data to a server. A resumed
run continues the same curves, each step once. A tracker that fails is dropped with a warning.
"""

import importlib.util
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from segkit.errors import RequestError
from segkit.runtime import mlflow_server, prefer_variables

_log = logging.getLogger(__name__)

SETTINGS_NAME = "settings.json"
TENSORBOARD_NAME, MLFLOW_NAME, MLFLOW_RUN_NAME = "tensorboard", "mlflow", "mlflow.json"
_NOT_SHOWN = ("step", "seconds", "epoch")
_EXPERIMENT = "segkit"
_MOST_AT_ONCE = 1000
"""Metrics that MLflow accepts in one call."""
_LONGEST_PARAMETER = 500
"""Characters that every MLflow server stores of a parameter."""


class Tracker(Protocol):
    """Receives the rows of the journal."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the row of a step; it may be stored by `keep`."""

    def keep(self) -> None:
        """Store the rows; called before a checkpoint is written."""

    def end(self, *, is_finished: bool) -> None:
        """End the session; `is_finished`: the training is complete."""


class TensorBoardTracker:
    """Event files: `tensorboard --logdir RUN`; see `Tracker`."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Readers ignore what earlier sessions wrote from that step on.
        self.writer = SummaryWriter(run / TENSORBOARD_NAME, purge_step=step + 1)

    def add(self, row: Mapping[str, Any]) -> None:  # noqa: D102
        for name, value in numbers_in(row):
            self.writer.add_scalar(name, value, row["step"])

    def keep(self) -> None:  # noqa: D102
        self.writer.flush()

    def end(self, *, is_finished: bool) -> None:  # noqa: D102
        self.writer.close()


class MlflowTracker:
    """A run of the experiment "segkit" with the settings as parameters; `mlflow.json` has its id."""

    def __init__(self, run: Path, step: int) -> None:
        prefer_variables(MLFLOW_ALLOW_FILE_STORE="true")
        from mlflow.tracking import MlflowClient

        path = run / MLFLOW_RUN_NAME
        earlier = json.loads(path.read_text(encoding="utf-8")) if step > 0 and path.exists() else None
        uri = earlier["tracking_uri"] if earlier else mlflow_server() or _local_store(run)
        self.client = MlflowClient(tracking_uri=uri)
        if earlier:
            self.run_id: str = earlier["run_id"]
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self.run_id = self._begin(run)
            path.write_text(json.dumps({"tracking_uri": uri, "run_id": self.run_id}) + "\n", encoding="utf-8")
        names = self.client.get_run(self.run_id).data.metrics
        histories = {name: self.client.get_metric_history(self.run_id, name) for name in names}
        self.known = {name: max(metric.step for metric in history) for name, history in histories.items()}
        """The last step of each metric; earlier ones are not sent again."""
        self.waiting: list[Any] = []

    def _begin(self, run: Path) -> str:
        experiment = self.client.get_experiment_by_name(_EXPERIMENT)
        identity = experiment.experiment_id if experiment else self.client.create_experiment(_EXPERIMENT)
        run_id: str = self.client.create_run(identity, run_name=run.resolve().name).info.run_id
        path = run / SETTINGS_NAME
        for name, value in _parameters(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}):
            self.client.log_param(run_id, name, value)
        return run_id

    def add(self, row: Mapping[str, Any]) -> None:  # noqa: D102
        from mlflow.entities import Metric

        now_ms = round(1000 * time.time())
        for name, value in numbers_in(row):
            key = re.sub(r"[^\w\-. :/]", "_", name)
            if row["step"] > self.known.get(key, -1):
                self.waiting.append(Metric(key, value, now_ms, row["step"]))

    def keep(self) -> None:  # noqa: D102
        while self.waiting:
            self.client.log_batch(self.run_id, metrics=self.waiting[:_MOST_AT_ONCE])
            self.waiting = self.waiting[_MOST_AT_ONCE:]

    def end(self, *, is_finished: bool) -> None:  # noqa: D102
        self.keep()
        self.client.set_terminated(self.run_id, "FINISHED" if is_finished else "KILLED")


TRACKERS: dict[str, tuple[str, Callable[[Path, int], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoardTracker),
    "mlflow": ("mlflow", MlflowTracker),
}
"""Name to package and constructor (run folder, last step of the journal)."""


def require_trackers(names: Sequence[str]) -> None:
    """Check that the packages of trackers are installed.

    Raises:
        RequestError: they are not.
    """
    missing = [TRACKERS[name][0] for name in names if importlib.util.find_spec(TRACKERS[name][0]) is None]
    if missing:
        found = f"training.trackers needs packages that are not installed: {', '.join(missing)}"
        raise RequestError(found, remedy='Install them with: pip install "segkit[trackers]"')


class Trackers:
    """All the trackers of a run; one that fails is dropped with a warning."""

    def __init__(self, names: Sequence[str], run: Path, step: int) -> None:
        self._open: dict[str, Tracker] = {}
        for name in names:
            with self._dropped_on_error(name):
                self._open[name] = TRACKERS[name][1](run, step)

    def each(self, work: Callable[[Tracker], object]) -> None:
        """Call something on every tracker."""
        for name, tracker in list(self._open.items()):
            with self._dropped_on_error(name):
                work(tracker)

    @contextmanager
    def _dropped_on_error(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            _log.warning("%s is left out from here on: %s", name, " ".join(str(error).split()))
            self._open.pop(name, None)


def numbers_in(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of a row by name; those of nested mappings as `dice/WT`."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from numbers_in(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value) and prefix + name not in _NOT_SHOWN:
            yield prefix + name, float(value)


def _parameters(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _parameters(value, f"{prefix}{name}.")
        else:
            yield prefix + name, str(value)[:_LONGEST_PARAMETER]


def _local_store(run: Path) -> str:
    """A database in the run folder, or plain files if MLflow lacks the packages for it (mlflow-skinny)."""
    folder = (run / MLFLOW_NAME).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    has_database = importlib.util.find_spec("sqlalchemy") and importlib.util.find_spec("alembic")
    return f"sqlite:///{folder / 'mlflow.db'}" if has_database else folder.as_uri()
