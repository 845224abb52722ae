"""What runs have in common that learn without label maps: the opening of their folder, and how they end."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from segkit.checkpoint.card import ModelCard, NetworkCard, PreprocessingCard, TrainingData
from segkit.checkpoint.run_folder import load_card
from segkit.errors import RequestError
from segkit.models.slicewise import SlicewiseConfig
from segkit.models.table import MODELS, configure
from segkit.runtime import environment, peak_rss_mb
from segkit.training.config import NetworkConfig
from segkit.training.folder import (
    SCORES_NAME,
    open_folder,
    require_same_split,
    require_usable,
    write_config,
    write_json,
    write_split,
)
from segkit.training.live_report import LiveView
from segkit.training.loop import fit
from segkit.training.request import UnlabelledRequest
from segkit.training.task import Task
from segkit.training.unlabelled_data import SplitCohort

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnlabelledSummary:
    """How a run ended: what was measured on held-out patients before and after, and what it cost."""

    run: Path
    method: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    steps: int
    minutes: float
    peak_rss_mb: float
    images: Mapping[str, int]
    """What was learnt from, by data folder."""
    skipped: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The document written as `validation.json`."""
        return {**{name: value for name, value in vars(self).items() if name != "run"}, "run": str(self.run)}


def require_usable_run(request: UnlabelledRequest[Any]) -> None:
    """Refuse to mix two runs in one folder, and to resume what never began; see `require_usable`.

    Raises:
        RequestError: as said.
    """
    asked = {"resume": request.resume, "overwrite": request.overwrite}
    request.ranks.from_first(lambda: require_usable(request.run, request.config.training.trackers, **asked))


def open_run(request: UnlabelledRequest[Any], cohorts: Sequence[SplitCohort], heading: str) -> None:
    """Make the run folder with its settings and its split.

    Raises:
        RequestError: it cannot be written to, or a resumed run has other cases or settings than before.
    """
    training, held_out = (
        [f"{found.name}/{case_id}" for found in cohorts for case_id in getattr(found, ids)]
        for ids in ("training_ids", "held_out_ids")
    )

    def write() -> None:
        if request.resume:
            require_same_split(request.run, training, held_out)
        open_folder(request.run, request.config, resume=request.resume, allow_changes=request.allow_changes)
        write_config(request.run, request.config, {}, f"{heading} " + ", ".join(str(folder) for folder in request.data))
        if not request.resume:
            write_split(request.run, request.data, training, held_out, request.config.data.exclude)

    request.ranks.from_first(write)


def axes_for(
    network: NetworkConfig, asked: Literal[2, 3] | None, cohorts: Sequence[SplitCohort], what: str
) -> Literal[2, 3]:
    """Axes of what is cut from the images: those of the data, but 2 for networks for images, unless others are asked.

    Raises:
        RequestError: the network is not known, or pictures are to give volumes; `what` names what is cut.
    """
    configure(network.family, network.size, network.arguments)
    are_volumes = all(found.cohort.dims == 3 for found in cohorts)
    is_planar = issubclass(MODELS[network.family].config, SlicewiseConfig)
    dims: Literal[2, 3] = asked or (3 if are_volumes and not is_planar else 2)
    if dims == 3 and not are_volumes:
        raise RequestError(f"pictures have no {what} in three dimensions", remedy="Set dims=2, or name volumes only")
    return dims


def first_card(
    task: Literal["pretraining", "inpainting"],
    network: NetworkConfig,
    cohorts: Sequence[SplitCohort],
    modalities: tuple[str, ...],
    dims: Literal[2, 3],
    method: str,
) -> ModelCard:
    """The card of a network that gives as many channels as it is given; patch and divisor are still to come."""
    return ModelCard(
        task=task,
        network=NetworkCard(
            family=network.family,
            size=network.size,
            in_channels=len(modalities),
            out_channels=len(modalities),
            arguments=network.arguments,
        ),
        dims=dims,
        modalities=modalities,
        patch_size=(),
        divisor=(),
        preprocessing=PreprocessingCard(**cohorts[0].preprocessing.model_dump()),
        versions=environment(),
        training_data=TrainingData(
            identity=f"{method}: " + ", ".join(found.name for found in cohorts),
            licence="; ".join(sorted({found.cohort.licence for found in cohorts if found.cohort.licence})) or None,
            cases=sum(len(found.training_ids) for found in cohorts),
        ),
    )


def with_patch(card: ModelCard, size: int | tuple[int, ...], key: str) -> ModelCard:
    """The card with the size of what is cut from the images, in voxels; `key` is the setting that says so.

    Raises:
        RequestError: it does not suit the network.
    """
    patch = (size,) * card.dims if isinstance(size, int) else size
    if len(patch) != card.dims or any(length % step for length, step in zip(patch, card.divisor, strict=False)):
        shown, steps = (" x ".join(map(str, numbers)) for numbers in (patch, card.divisor))
        raise RequestError(f"{key} {shown} does not suit the network", expected=f"multiples of {steps}")
    return card.model_copy(update={"patch_size": patch})


class MeasuredTask(Task, Protocol):
    """A task whose weights can be measured, not only scored."""

    def measure(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """What held-out images show of these weights."""
        ...

    def take_best(self, run: Path) -> None:
        """Take over the weights that `save` wrote last."""
        ...


def learn(
    request: UnlabelledRequest[Any],
    task: MeasuredTask,
    images: Mapping[str, int],
    skipped: Mapping[str, str],
    draw: Callable[[], None] = lambda: None,
) -> UnlabelledSummary:
    """Measure, train, measure the best weights, which the model then has, draw, and write how it ended."""
    view = LiveView(request.run, with_page=request.config.training.live_page)
    with view.until_finished() if request.ranks.is_first else nullcontext():
        before = _measured_before(request, task)
        state = fit(
            task,
            request.run,
            request.config.training,
            request.config.optimiser,
            device=request.device,
            ranks=request.ranks,
            deadline_s=request.deadline_s,
            resume=request.resume,
            allow_changes=request.allow_changes,
            on_progress=request.on_progress,
        )
        task.take_best(request.run)
        after = task.measure(task.model.state_dict())
        _log.info("best at step %s: %s", load_card(request.run).training_data.model_dump().get("step"), _shown(after))
        if request.ranks.is_first:
            draw()
        summary = UnlabelledSummary(
            run=request.run,
            method=request.config.method,
            before=before,
            after=after,
            steps=state.step,
            minutes=(time.monotonic() - request.started_s) / 60,
            peak_rss_mb=peak_rss_mb(),
            images=images,
            skipped=skipped,
        )
        if request.ranks.is_first:
            write_json(request.run / SCORES_NAME, summary.to_json())
            view.finish()
        return summary


def _measured_before(request: UnlabelledRequest[Any], task: MeasuredTask) -> dict[str, float]:
    """Measures of the weights that a run begins with; a resumed run keeps those of its beginning."""
    path = request.run / SCORES_NAME
    if request.resume:
        try:
            kept: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))["before"]
        except (OSError, ValueError, KeyError):
            return {}
        return kept
    task.model.to(request.device)
    before = task.measure(task.model.state_dict())
    _log.info("before: %s", _shown(before))
    if request.ranks.is_first:
        write_json(path, {"before": before})
    return before


def _shown(measures: Mapping[str, float]) -> str:
    """Measures on one line."""
    return "  ".join(f"{name} {value:.3f}" for name, value in measures.items())
