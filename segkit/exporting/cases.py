"""Real cases for an export: windows to compare and to calibrate on, references to score masks by."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from segkit.batch.cases import choose_cases
from segkit.errors import DataError, SegkitError, as_request
from segkit.inference.backends import Array
from segkit.inference.predictor import Predictor
from segkit.metrics.overlap import dice_by_region
from segkit.preparing.preprocessing import LoadedCase, load_case
from segkit.reading.case import Case, Cohort, match_modalities
from segkit.reading.layouts.table import find_cases
from segkit.shapes import Image

MOST_OF_A_RUN = 20
_WINDOWS_PER_CASE = 4

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeasuringCases:
    """Cases to measure with, and where they come from."""

    cohort: Cohort
    source: str

    def loaded(self, predictor: Predictor) -> Iterator[LoadedCase]:
        """Each case with its reference in the values of the model; unreadable ones are logged and skipped."""
        card = predictor.card
        for case in self.cohort.cases:
            try:
                images = match_modalities(case, card.modalities)
                # match_modalities drops the reference.
                case = replace(images, label=case.label, scheme=case.scheme or self.cohort.scheme)
                yield load_case(case, card.modalities, predictor.scheme)
            except DataError as error:
                _log.warning("left out: %s", error)

    def windows(self, predictor: Predictor, count: int, seed: int = 0) -> list[Array]:
        """At most `count` windows (1, C, *window) of prepared cases, the first of each case from its middle."""
        rng = np.random.default_rng(seed)
        found: list[Array] = []
        for loaded in self.loaded(predictor):
            image = predictor.prepare(loaded).image
            wanted = min(_WINDOWS_PER_CASE, count - len(found))
            found += [_window(image, predictor.card.patch_size, rng if index else None) for index in range(wanted)]
            if len(found) == count:
                break
        return found

    def mean_dice(self, predictors: Sequence[Predictor]) -> list[float]:
        """Mean Dice of each predictor over cases and outputs; NaN where no case has a reference."""
        card = predictors[0].card
        regions = {output.name: output.members for output in card.outputs if output.label}
        scores: list[list[float]] = [[] for _ in predictors]
        for loaded in self.loaded(predictors[0]):
            if loaded.labels is None:
                continue
            for predictor, so_far in zip(predictors, scores, strict=True):
                labels = predictor.predict_loaded(loaded).labels
                found = dice_by_region(labels, loaded.labels, regions, card.scheme().ignore)
                so_far += [value for value in found.values() if value == value]
        return [float(np.mean(so_far)) if so_far else float("nan") for so_far in scores]


def named_cases(root: Path, case_ids: Sequence[str] | None = None) -> MeasuringCases:
    """The cases of a data folder, or those named by `case_ids`.

    Raises:
        RequestError: there are no cases, or an id is unknown.
    """
    try:
        cohort = find_cases(root)
    except DataError as error:
        raise as_request(error) from error
    return MeasuringCases(choose_cases(cohort, case_ids), str(root))


def validation_cases(run: Path) -> MeasuringCases | None:
    """At most `MOST_OF_A_RUN` validation cases of a run; None if its data were moved."""
    from segkit.training.folder import read_config

    try:
        split = json.loads((run / "split.json").read_text(encoding="utf-8"))
        data, ids = read_config(run).data, set(split["validation"])
        cohort = find_cases(
            Path(split["data"][0]),
            layout=data.layout,
            modalities=data.modalities,
            label_scheme=data.label_scheme,
            require_labels=True,
        )
    except (SegkitError, OSError, ValueError, KeyError) as error:
        _log.debug("no validation cases of %s: %s", run, error)
        return None
    chosen = [case for case in cohort.cases if case.id in ids]
    if not chosen:
        return None
    return MeasuringCases(replace(cohort, cases=_evenly(chosen, MOST_OF_A_RUN)), f"validation cases of {run}")


def _evenly(cases: Sequence[Case], most: int) -> tuple[Case, ...]:
    if len(cases) <= most:
        return tuple(cases)
    return tuple(cases[index] for index in np.linspace(0, len(cases) - 1, most).round().astype(int))


def _window(image: Image, window: Sequence[int], rng: np.random.Generator | None) -> Array:
    """A window (1, C, *window) of (C, *spatial), the middle one or random; smaller images are padded with zeros."""
    pads, box = [(0, 0)], [slice(None)]
    for size, length in zip(image.shape[1:], window, strict=True):
        missing = max(length - size, 0)
        pads.append((missing // 2, missing - missing // 2))
        spare = max(size - length, 0)
        start = spare // 2 if rng is None else int(rng.integers(spare + 1))
        box.append(slice(start, start + length))
    return np.ascontiguousarray(np.pad(image, pads)[tuple(box)][None], np.float32)
