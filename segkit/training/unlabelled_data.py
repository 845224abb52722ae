"""Data folders that are learnt from without their label maps: who is held out, and how cases are prepared."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from segkit.errors import DataError, RequestError, as_request
from segkit.preparing.cache import PreparedStore, StoredCases
from segkit.preparing.fingerprint import take_fingerprint
from segkit.preparing.plan import plan_preprocessing
from segkit.preparing.preprocessing import PreprocessingConfig
from segkit.preparing.splits import train_and_validation
from segkit.reading.case import Case, Cohort
from segkit.reading.layouts.table import find_cases
from segkit.training.config import DataConfig
from segkit.training.distributed import Ranks
from segkit.training.run import prepare_cases

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitCohort:
    """One data folder: its cases, how they are prepared, and the ids of those that learn and those held out."""

    cohort: Cohort
    preprocessing: PreprocessingConfig
    training_ids: tuple[str, ...]
    held_out_ids: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.cohort.root.resolve().name

    def usable(self, ids: Sequence[str], folders: Mapping[str, Path]) -> tuple[StoredCases, tuple[str, ...]]:
        """The cases of these ids that could be prepared, and the patient of each."""
        patients = {case.id: case.patient for case in self.cohort.cases}
        kept = [case_id for case_id in ids if case_id in folders]
        return StoredCases([folders[case_id] for case_id in kept]), tuple(patients[case_id] for case_id in kept)


def find_split(
    folder: Path,
    data: DataConfig,
    asked: PreprocessingConfig,
    *,
    find: Callable[[Path, DataConfig], Cohort] | None = None,
    keeps_references: bool = False,
) -> SplitCohort:
    """The cases of a data folder, split by patient; `find` finds them, by default as any layout has them.

    Unless they are kept, references are not looked at. A folder of one patient learns and holds nobody out.

    Raises:
        RequestError: the folder cannot be made out, or no case is left.
    """
    try:
        cohort = (find or _find)(folder, data)
        cases = tuple(case for case in cohort.cases if _is_usable(case, data.exclude))
        if not cases:
            raise RequestError("no case is left to learn from", where=folder, remedy="See `segkit check`")
        cohort = replace(cohort, cases=cases)
        if not keeps_references:
            cohort = replace(cohort, cases=tuple(map(_without_reference, cases)), scheme=None)
        reasons: dict[str, str] = {}
        preprocessing = plan_preprocessing(take_fingerprint(cohort), asked, reasons)
    except DataError as error:
        raise as_request(error) from error
    for key, reason in reasons.items():
        _log.info("%s: %s: %s", folder.name, key, reason)
    ids, held_out = _split(cases, data)
    return SplitCohort(cohort, preprocessing, tuple(ids), tuple(held_out))


def prepare_cohort(
    cohort: SplitCohort, store: PreparedStore, memory_gb: float | None, ranks: Ranks
) -> tuple[dict[str, Path], dict[str, str]]:
    """Prepare every case: the folders by id, and why others are left out.

    Raises:
        DataError: no training case can be used.
    """
    found = cohort.cohort
    folders, skipped = prepare_cases(found.cases, found, store, cohort.preprocessing, memory_gb, ranks)
    if not any(case_id in folders for case_id in cohort.training_ids):
        first = next(iter(skipped.values()), "there is none")
        raise DataError("no case to learn from can be used", where=found.root, remedy=f"The first: {first}")
    return folders, skipped


def _find(folder: Path, data: DataConfig) -> Cohort:
    return find_cases(folder, layout=data.layout, modalities=data.modalities, label_scheme=data.label_scheme)


def _split(cases: Sequence[Case], data: DataConfig) -> tuple[list[str], list[str]]:
    """Who learns and who is held out; fewer patients than folds make fewer folds, and one patient is not held out."""
    patients = len({case.patient for case in cases})
    if patients == 1:
        return [case.id for case in cases], []
    return train_and_validation(cases, min(data.fold, patients - 1), min(data.folds, patients), data.split_seed)


def _without_reference(case: Case) -> Case:
    return replace(case, label=None, scheme=None)


def _is_usable(case: Case, excluded: Sequence[str]) -> bool:
    fatal = [problem for problem in case.problems if problem.is_fatal]
    for problem in fatal:
        _log.warning("left out: %s", problem)
    return not fatal and case.id not in set(excluded)
