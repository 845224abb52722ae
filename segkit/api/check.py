"""`segkit.check`: contents and problems of a data folder, the needs of a training, and the next command."""

from __future__ import annotations

import itertools
import logging
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segkit.api.arguments import AnyPath, nested_settings, parse_gigabytes
from segkit.api.training import preset_for, suited_presets
from segkit.errors import DataError, SegkitError, as_request

if TYPE_CHECKING:
    from segkit.errors import Problem
    from segkit.reading.case import Cohort
    from segkit.reading.checks import CaseReport
    from segkit.training.config import TrainConfig

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataCheck:
    """What a check found."""

    cohort: Cohort
    """Layout, label scheme, and every case with its files."""
    cases: list[CaseReport]
    """Shape, spacing in mm, orientation, labels and problems of each case."""
    problems: list[Problem]
    """Those of the folder as a whole."""
    estimate: dict[str, float] | None
    """`memory_gb` (GiB) and `minutes` of a training; None where nothing can be trained, or it was not asked for."""
    next_command: str
    """The command line to run next, quoted for a POSIX shell; empty where errors must be corrected first."""

    @property
    def is_usable(self) -> bool:
        """Whether every case and the folder can be used as they are, and no image belongs to no case."""
        is_any_error = any(problem.is_error for problem in self.cohort.problems)
        return all(case.is_usable for case in self.cases) and not is_any_error

    def all_problems(self) -> list[Problem]:
        """Those of the folder and of its cases, errors first."""
        found = [*self.problems, *(problem for case in self.cases for problem in case.problems)]
        return sorted(found, key=lambda problem: not problem.is_error)

    def to_json(self) -> dict[str, Any]:
        """The document of `segkit check --json`."""
        return {
            "layout": self.cohort.layout,
            "label_scheme": None if self.cohort.scheme is None else self.cohort.scheme.to_json(),
            "cases": [case.to_json() for case in self.cases],
            "problems": [problem.to_json() for problem in self.problems],
            "files": dict(self.cohort.files),
            "estimate": self.estimate,
            "next_command": self.next_command,
        }


def check(
    data: AnyPath,
    /,
    *,
    layout: str | None = None,
    label_scheme: str | None = None,
    modalities: Mapping[str, str] | None = None,
    patients: AnyPath | None = None,
    fast: bool = False,
    estimate: bool = True,
    preset: str | None = None,
    memory: str | float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> DataCheck:
    """Check a data folder: layout, labels, every problem at once, memory and time of a training, the next command.

    `fast` reads headers only. `patients` is a table of case and patient. `estimate` plans a training with `preset`,
    `memory` (GiB, or "8G") and `settings`, as `segkit.train` would. `on_progress` is called with the numbers of cases
    read and of all cases.

    Raises:
        RequestError: nothing was recognised, or an argument is wrong.

    Example:
        >>> found = segkit.check("data")  # doctest: +SKIP
        >>> found.is_usable, [str(problem) for problem in found.all_problems()]  # doctest: +SKIP
        (True, [])
    """
    from segkit.preparing.splits import with_patients
    from segkit.reading.checks import check_cohort, too_few_patients, usable_cases
    from segkit.reading.layouts.table import find_cases
    from segkit.runtime import available_cores

    preset = preset or _preset_of_this_machine()
    given = nested_settings(settings)
    config = _training_config(preset, given) if estimate or given else None
    folder = Path(data)
    try:
        cohort = find_cases(folder, layout=layout, modalities=modalities, label_scheme=label_scheme)
    except DataError as error:
        raise as_request(error) from error
    cohort = with_patients(cohort, None if patients is None else Path(patients))
    numbers = itertools.count(1)

    def count() -> None:
        if on_progress is not None:
            on_progress(next(numbers), len(cohort.cases))

    reports = check_cohort(cohort, read_voxels=not fast, workers=min(4, available_cores()), on_case=count)
    usable = usable_cases(cohort, reports)
    needs = _estimate(usable, config, memory) if config is not None and estimate else None
    problems = [*cohort.problems, *too_few_patients(usable)]
    reading = [] if layout is None else ["--layout", layout]
    reading += [] if label_scheme is None else ["--label-scheme", label_scheme]
    for name, suffix in (modalities or {}).items():
        reading += ["--modality", f"{name}={suffix}"]
    training = [*([] if patients is None else ["--patients", str(patients)]), *_training_words(preset, given, memory)]
    command = next_command(cohort, reports, usable, folder, reading, training)
    return DataCheck(cohort, reports, problems, needs, command)


def next_command(
    cohort: Cohort,
    reports: Sequence[CaseReport],
    usable: Cohort,
    data: Path,
    reading: Sequence[str] = (),
    training: Sequence[str] = (),
) -> str:
    """The command line to run after a check, quoted for a POSIX shell; empty where errors must be corrected first.

    `reading` are the options for reading the folder, `training` those that only `train` has.
    """
    from segkit.reading.geometry import REPAIR_COMMAND
    from segkit.reading.layouts.brats import SYNTHESIS_LAYOUT

    fatal = [problem for report in reports for problem in report.problems if problem.is_fatal]
    labelled = [case for case in usable.cases if case.label is not None]
    offered = (re.search(r"--label-scheme ([a-z0-9-]+)", problem.remedy) for problem in cohort.problems)
    choice = next((match[1] for match in offered if match), None)
    path = str(data)
    mapped = (re.search(r"`segkit (convert labels [^`]+)`", problem.remedy) for problem in cohort.problems)
    mapping = next((match[1] for match in mapped if match), None)
    if mapping:
        words = shlex.split(mapping)
    elif fatal and all(REPAIR_COMMAND in problem.remedy for problem in fatal):
        words = ["convert", "headers", path, "-o", f"{data.absolute().name}-repaired"]
    elif labelled and cohort.scheme is None and choice and choice not in reading:
        words = ["check", path, "--label-scheme", choice, *reading]
    elif labelled and cohort.scheme is not None:
        words = ["train", path, "-o", "run", *training, *reading]
    elif usable.cases and cohort.layout == SYNTHESIS_LAYOUT:
        words = ["inpaint", "-m", "run", "-i", path, "-o", "filled"]
    elif any(problem.is_fatal and problem.left_out for problem in cohort.problems) and "--modality" not in reading:
        words = ["check", path, *reading, "--modality", "image=SUFFIX", "--modality", "label=SUFFIX"]
    elif usable.cases:
        words = ["infer", "-m", "run", "-i", path, "-o", "masks", *reading]
    else:
        return ""
    return shlex.join(["segkit", *words])


def _training_words(preset: str, settings: Mapping[str, Any], memory: str | float | None) -> list[str]:
    """The options of `segkit train` for these settings."""
    words = ["--preset", preset]
    for name, value in _dotted(settings):
        words += ["--set", f"{name}={_yaml(value)}"]
    return words if memory is None else [*words, "--memory", memory if isinstance(memory, str) else f"{memory:g}G"]


def _preset_of_this_machine() -> str:
    """The preset for the best device of this machine."""
    from segkit.runtime import devices

    return preset_for(devices()[0].partition(":")[0])


def _training_config(preset: str, settings: Mapping[str, Any]) -> TrainConfig:
    from segkit.config import build_config, preset_layers
    from segkit.training.config import TrainConfig

    layers = [("--set", settings)]
    return build_config(TrainConfig, [*suited_presets(preset_layers(preset), layers), *layers])


def _estimate(cohort: Cohort, config: TrainConfig, memory: str | float | None) -> dict[str, float] | None:
    """Memory and minutes of training, by planning; None where nothing can be trained."""
    labelled = replace(cohort, cases=tuple(case for case in cohort.cases if case.label is not None))
    if labelled.scheme is None or not labelled.cases:
        return None
    from segkit.runtime import pick_device
    from segkit.training.segmentation_plan import estimate_training, memory_to_plan_for

    device = pick_device()
    memory_gb = memory_to_plan_for(parse_gigabytes(memory), device)
    try:
        plan, minutes = estimate_training(labelled, labelled.scheme, config, memory_gb, device)
    except SegkitError as error:
        _log.warning("No estimate: %s", error)
        return None
    return {"memory_gb": round(plan.memory_gb, 2), "minutes": round(minutes, 1)}


def _dotted(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The settings by dotted name."""
    found: list[tuple[str, Any]] = []
    for name, value in settings.items():
        is_section = isinstance(value, Mapping) and bool(value)
        found += _dotted(value, f"{prefix}{name}.") if is_section else [(prefix + name, value)]
    return found


def _yaml(value: Any) -> str:
    """A value as `--set` reads it."""
    import yaml

    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("...\n").strip()
