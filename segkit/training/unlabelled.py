"""Base of pre-training and inpainting: data without label maps, and measures before and after the training."""

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor

from segkit.checkpoint.run_folder import load_card
from segkit.errors import DataError, RequestError, as_request
from segkit.models.blocks import SlicewiseConfig
from segkit.models.table import MODELS, configure
from segkit.preparing.fingerprint import take_fingerprint
from segkit.preparing.plan import plan_preprocessing
from segkit.preparing.preprocessing import PreprocessingConfig
from segkit.preparing.splits import train_and_validation
from segkit.reading.case import Cohort, usable_only
from segkit.report.figures import drawing
from segkit.training.config import DataConfig, NetworkConfig, RunConfig
from segkit.training.folder import SCORES_NAME, read_object, write_json
from segkit.training.task import Kind, RunPlan, SplitData, Task, TrainingRequest

_log = logging.getLogger(__name__)


class MeasuredTask(Task, Protocol):
    """A task with measures of its weights on held-out images."""

    method_name: str

    @property
    def images(self) -> Mapping[str, int]:
        """Number of training images, by data folder."""

    def measure(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """The measures of these weights."""

    def take_best(self, run: Path) -> None:
        """Load the weights that `save` wrote last."""


ConfigT = TypeVar("ConfigT", bound=RunConfig)
TaskT = TypeVar("TaskT", bound=MeasuredTask)


class UnlabelledKind(Kind[ConfigT, TaskT]):
    """A training without label maps, with measures on held-out patients."""

    what: str
    """Description of the data for config.yaml."""

    def plan(self, request: TrainingRequest[ConfigT]) -> RunPlan[ConfigT]:
        """Find and split the cases of every folder, and complete the settings."""
        try:
            data = tuple(self.find(folder, request.config) for folder in request.data)
        except DataError as error:
            raise as_request(error) from error
        request = replace(request, config=self.settle(request.config, data))
        folders = ", ".join(str(folder) for folder in request.data)
        return RunPlan(request, data, f"{self.what} in {folders}", *self.patch(request.config))

    @abstractmethod
    def find(self, folder: Path, config: ConfigT) -> SplitData:
        """The cases of a folder, see `find_split`."""

    @abstractmethod
    def settle(self, config: ConfigT, data: Sequence[SplitData]) -> ConfigT:
        """The settings, completed from the data.

        Raises:
            RequestError: settings and data do not fit.
        """

    @abstractmethod
    def patch(self, config: ConfigT) -> tuple[str, int | tuple[int, ...]]:
        """The name of the setting with the patch size, and the size in voxels."""

    def measure_before(self, plan: RunPlan[ConfigT], task: TaskT) -> dict[str, float]:
        """Measures of the first weights; a resumed run has them from validation.json."""
        request, path = plan.request, plan.request.run / SCORES_NAME
        if request.resume:
            return dict(read_object(path).get("before", {}))
        task.model.to(request.device)
        before = task.measure(task.model.state_dict())
        _log.info("before: %s", _on_one_line(before))
        if request.ranks.is_first:
            write_json(path, {"before": before})
        return before

    def score(self, plan: RunPlan[ConfigT], task: TaskT, before: Mapping[str, float]) -> dict[str, Any]:
        """Measures of the best weights, which are loaded into the model."""
        run = plan.request.run
        task.take_best(run)
        after = task.measure(task.model.state_dict())
        best = load_card(run).training_data.model_dump().get("step")
        _log.info("best at step %s: %s", best, _on_one_line(after))
        if plan.request.ranks.is_first:
            with drawing(run / "figures"):
                self.draw(run / "figures", task)
        return {"method": task.method_name, "before": before, "after": after, "images": dict(task.images)}

    def draw(self, folder: Path, task: TaskT) -> None:
        """Write figures of the result; none by default."""


def find_split(
    folder: Path, cohort: Cohort, data: DataConfig, asked: PreprocessingConfig, *, keeps_references: bool = False
) -> SplitData:
    """The usable cases of a data folder, split by patient, by default without references.

    A folder with one patient has no validation cases.

    Raises:
        DataError: no case can be read.
        RequestError: no case is left.
    """
    cohort = usable_only(cohort, data.exclude)
    cases = cohort.cases
    if not cases:
        raise RequestError("no case is left to learn from", where=folder, remedy="See `segkit check`")
    if not keeps_references:
        cases = tuple(replace(case, label=None, scheme=None) for case in cases)
    cohort = replace(cohort, cases=cases, scheme=cohort.scheme if keeps_references else None)
    reasons: dict[str, str] = {}
    preprocessing = plan_preprocessing(take_fingerprint(cohort), asked, reasons)
    for key, reason in reasons.items():
        _log.info("%s: %s: %s", folder.name, key, reason)
    patients = len({case.patient for case in cases})
    if patients == 1:
        return SplitData(cohort, preprocessing, tuple(case.id for case in cases), ())
    fold, folds = min(data.fold, patients - 1), min(data.folds, patients)
    training, validation = train_and_validation(cases, fold, folds, data.split_seed)
    return SplitData(cohort, preprocessing, tuple(training), tuple(validation))


def require_same_modalities(data: Sequence[SplitData], remedy: str) -> None:
    """Reject folders whose images have different modalities.

    Raises:
        RequestError: they do.
    """
    names = {split.cohort.modalities for split in data}
    if len(names) > 1:
        shown = " and ".join(", ".join(modalities) for modalities in sorted(names))
        raise RequestError(f"the folders have different modalities: {shown}", remedy=remedy)


def choose_dims(
    network: NetworkConfig, asked: Literal[2, 3] | None, data: Sequence[SplitData], what: str
) -> Literal[2, 3]:
    """Axes of crops (`what`): as set, else 2 for networks for images, else those of the data.

    Raises:
        RequestError: the network is not known, or dims is 3 for pictures.
    """
    configure(network.family, network.size, network.arguments)
    are_volumes = all(split.cohort.dims == 3 for split in data)
    is_planar = issubclass(MODELS[network.family].config, SlicewiseConfig)
    dims: Literal[2, 3] = asked or (3 if are_volumes and not is_planar else 2)
    if dims == 3 and not are_volumes:
        raise RequestError(f"pictures have no {what} in three dimensions", remedy="Set dims=2, or name volumes only")
    return dims


def _on_one_line(measures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in measures.items())
